"""Metrics put into the table at once: what MLflow says of them is what it says of those that it has logged itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException

from opd_lab.tracking.bulk import log_metrics
from opd_lab.tracking.mlflow import open_store

VALUES = [0.25, math.nan, math.inf, -math.inf, 0.1, -3.0, 1e-320]
METRICS = [Metric(key, value, 1000 + step, step) for step, value in enumerate(VALUES) for key in ("kl/a", "loss/b")]
METRICS.insert(4, Metric("eval/rare", 0.5, 1001, 1))


@pytest.fixture
def client(tmp_path: Path) -> MlflowClient:
    return open_store(None, tmp_path, "bulk").client


def made(client: MlflowClient) -> str:
    experiment = client.get_experiment_by_name("bulk")
    assert experiment is not None
    return client.create_run(experiment.experiment_id).info.run_id


def said(client: MlflowClient, run_id: str) -> tuple[Any, ...]:
    """Histories and latest values, NaN as text."""
    run = client.get_run(run_id)
    keys = sorted(run.data.metrics)
    return (
        [[(m.timestamp, m.step, str(m.value)) for m in client.get_metric_history(run_id, key)] for key in keys],
        [(key, str(run.data.metrics[key])) for key in keys],
        sorted((m.key, m.step, m.timestamp) for m in run.data._metric_objs),
    )


def test_histories_and_latest_values_are_those_of_the_client(client: MlflowClient) -> None:
    ours, theirs = made(client), made(client)
    log_metrics(client, ours, METRICS[:7], [])
    log_metrics(client, ours, METRICS[7:], [RunTag("said", "yes")])
    client.log_batch(theirs, metrics=METRICS)
    assert said(client, ours) == said(client, theirs)
    assert client.get_run(ours).data.tags["said"] == "yes"


def test_what_is_there_already_is_there_once(client: MlflowClient) -> None:
    ours, theirs = made(client), made(client)
    log_metrics(client, ours, METRICS[:9], [])
    log_metrics(client, ours, METRICS, [])
    log_metrics(client, ours, METRICS, [])
    client.log_batch(theirs, metrics=METRICS)
    assert said(client, ours) == said(client, theirs)


def test_the_newest_values_are_logged_last(client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The latest step in the store says how far it has everything."""
    run_id = made(client)
    with monkeypatch.context() as patch:
        patch.setattr(client, "log_batch", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            log_metrics(client, run_id, METRICS, [])
    assert client.get_run(run_id).data.metrics == {}
    assert [m.step for m in client.get_metric_history(run_id, "kl/a")] == list(range(len(VALUES) - 1))


def test_an_unknown_run_is_refused_in_the_words_of_mlflow(client: MlflowClient) -> None:
    with pytest.raises(MlflowException, match=r"Run with id=0123456789abcdef0123456789abcdef not found"):
        log_metrics(client, "0123456789abcdef" * 2, METRICS, [])
