"""An experiment's page in MLflow, arranged: runs in one flat list, best first, beside the charts that compare them.

Opened bare, MLflow lists the folded tree and draws charts of what is listed: of a sweep, next to none. What the menu
"Views" of its own page stores and opens is used here: a tag of the experiment, `mlflow.sharedViewState.KEY`, which the
page reads where its address has `viewStateShareKey=KEY`. The format is private to MLflow's page; what stands here is
that of MLflow 3.17, and stands here alone. A page that cannot read it says so and shows itself bare; to a store it is
an ordinary tag.
"""

from __future__ import annotations

import base64
import json
import logging
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("opd_lab.tracking")
RUNS, METHODS = "opd_lab", "opd_lab.methods"  # keys: every run for itself; the mean of a method's runs
TITLES = {RUNS: "opd_lab: runs", METHODS: "opd_lab: methods, averaged"}  # in the menu of views
TAG = "mlflow.sharedViewState."
TRAINED = "tags.method != ''"  # a run that trains says its method; a sweep and its trials have nothing to draw
TEST, VALIDATION = "eval/test/pass_at_1", "eval/validation/pass_at_1"  # avg@k, under one name for every k
TEST_KL, PROBE_KL = "eval/test/reverse_kl_mean_nats", "probe/reverse_kl_mean_nats"
COLUMNS = (TEST, TEST_KL, VALIDATION, PROBE_KL, "cost/generated_tokens", "cost/teacher_scored_tokens")
SECTIONS = {
    "Results": [("LINE", VALIDATION), ("LINE", PROBE_KL), ("BAR", TEST), ("BAR", TEST_KL)],
    "Training": [
        ("LINE", "kl/reverse_mean_nats"),
        ("LINE", "entropy/student_mean_nats"),
        ("LINE", "optim/gradient_norm"),
        ("LINE", "rollout/length_mean_tokens"),
    ],
    "KL of tokens over training": [("IMAGE", "kl/reverse_nats")],
}


def address(server: str, experiment_id: str) -> str:
    """The arranged page of an experiment behind an MLflow server."""
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?viewStateShareKey={RUNS}&compareRunsMode=CHART"


def arrange(
    client: MlflowClient, experiment_id: str, *, steps: int, params: Sequence[str] = (), again: bool = True
) -> None:
    """Leave both arrangements beside an experiment's runs. `steps`: the last step, whose pictures show all of training;
    `params`: what differs between the runs, as columns; `again=False` leaves alone what is there."""
    try:
        experiment = client.get_experiment(experiment_id)
        if not again and TAG + RUNS in experiment.tags:
            return
        for key, title in TITLES.items():
            state = zlib.compress(json.dumps(_view(key, steps, params)).encode())
            made = {"createdAt": experiment.creation_time, "updatedAt": experiment.creation_time}
            said = {"name": title, "state": f"deflate;{base64.b64encode(state).decode()}"} | made
            client.set_experiment_tag(experiment_id, TAG + key, json.dumps(said))
    except Exception as error:
        log.warning("MLflow's page stays as it is, the store did not take its arrangement: %r", error)


def _view(key: str, steps: int, params: Sequence[str]) -> dict[str, Any]:
    """What the page calls its state."""
    widths = {f"params.`{name}`": 130 for name in params} | {f"metrics.`{name}`": 180 for name in COLUMNS}  # pixels
    by_method = {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "method"}]}
    charts = [
        {"uuid": f"{key}.{section}.{name}", "metricSectionId": section} | _chart(kind, name, steps)
        for section, shown in SECTIONS.items()
        for kind, name in shown
    ]
    return {
        "searchFilter": TRAINED,
        "orderByKey": f"metrics.`{TEST}`",
        "orderByAsc": False,
        "selectedColumns": ["attributes.`Duration`", *widths],
        "columnOrder": list(widths),
        "columnWidths": widths,
        "runsHiddenMode": "FIRST_20_RUNS",  # all are listed, so many are drawn
        "groupBy": by_method if key == METHODS else None,
        "isAccordionReordered": True,  # these sections stay above those that the page adds for all other metrics
        "compareRunSections": [{"uuid": name, "name": name, "display": True, **_size(name)} for name in SECTIONS],
        "compareRunCharts": charts,
    }


def _size(section: str) -> dict[str, int]:
    """A picture of every run needs the whole width."""
    pictures = any(kind == "IMAGE" for kind, _ in SECTIONS[section])
    return {"columns": 1, "cardHeight": 720} if pictures else {"columns": 2, "cardHeight": 320}


def _chart(kind: str, name: str, steps: int) -> dict[str, Any]:
    chart: dict[str, Any] = {"type": kind, "isGenerated": False, "runsCountToCompare": 20}
    if kind == "IMAGE":
        return chart | {"imageKeys": [name], "step": steps, "showRunParams": False}
    chart["metricKey"] = name
    if kind == "LINE":
        chart |= {"xAxisKey": "step", "xAxisScaleType": "linear", "scaleType": "linear", "range": {}}
        chart |= {"yAxisKey": "metric", "yAxisExpressions": [], "lineSmoothness": 0}
        chart |= {"useGlobalXaxisKey": True, "useGlobalLineSmoothing": True}
    return chart
