"""MLflow: the same run, live. This module imports it late, with its telemetry and progress bars off.

The store is a SQLite file beside the run folders unless `tracking.uri` names another; it is created under a file lock,
because two processes that open a new store at once break each other. One batched call per step carries all scalars.
MLflow has no histogram and no chart for one, so each is drawn over training and logged as an image with key and step,
which its comparison view pages through; the numbers themselves are in the run folder's files, logged at the end.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from opd_lab.tracking.stored import quiet
from opd_lab.tracking.tracker import RunInfo
from opd_lab.types import Report

if TYPE_CHECKING:
    from mlflow import MlflowClient

LONGEST = {"key": 250, "param": 6000, "tag": 8000, "digest": 36}  # characters that MLflow takes
IDENTITY = "mlflow.json"  # in the run folder: which MLflow run it is
ANALYSIS = "analysis"  # in the run folder: what was asked of the run after it had finished


def key(name: str) -> str:
    """A name that MLflow takes: `pass@1` -> `pass_at_1`, `a[0]` -> `a_0_`."""
    name = re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))
    parts = [part for part in name.split("/") if part.strip(".")]
    return "/".join(parts)[: LONGEST["key"]]


def shorten(value: Any, limit: int) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


@dataclass(frozen=True)
class Store:
    client: MlflowClient
    uri: str
    experiment_id: str


def open_store(uri: str | None, folder: Path, experiment: str) -> Store:
    """The store and the experiment, made if need be. Raises ValueError if it cannot be written."""
    quiet()
    from filelock import FileLock
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    folder = folder.resolve()
    uri = f"sqlite:///{folder / 'mlflow.db'}" if uri is None else _absolute(uri)
    location = None if uri.startswith(("http://", "https://")) else (folder / "artifacts").as_uri()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "mlflow.lock"):
            client = MlflowClient(tracking_uri=uri)
            found = client.get_experiment_by_name(experiment)
            if found is None:
                experiment_id = client.create_experiment(experiment, artifact_location=location)
            elif found.lifecycle_stage == "deleted":
                raise ValueError(f"experiment {experiment} was deleted; restore it, or choose another")
            else:
                experiment_id = found.experiment_id
            if uri.startswith("sqlite:///"):
                with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
                    database.execute("PRAGMA journal_mode=WAL")
    except (OSError, MlflowException, SQLAlchemyError, sqlite3.Error, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise ValueError(
            f"tracking.uri must be a store that can be written (SQLite file, database or MLflow server), got {uri}: "
            f"{reason}; choose another tracking.folder or tracking.uri, or set tracking.mlflow to false"
        ) from error
    return Store(client, uri, experiment_id)


def _absolute(uri: str) -> str:
    """A SQLite file means the same from every working directory."""
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    return uri


class MLflow:
    """A tracker; `run_id` is known once it has started."""

    name: ClassVar[str] = "mlflow"
    remote: ClassVar[bool] = True

    def __init__(self, uri: str | None, folder: Path) -> None:
        self._uri, self._folder = uri, folder
        self.run_id = ""

    def start(self, run: RunInfo) -> None:
        """Create the run, or go on with the one that the run folder or MLFLOW_RUN_ID names."""
        store = open_store(self._uri, self._folder, run.experiment)
        self._client, self._run_folder = store.client, run.folder
        self._history = _history(run)
        identity = run.folder / IDENTITY
        known = os.environ.get("MLFLOW_RUN_ID")
        if run.step and identity.exists():
            known = json.loads(identity.read_text())["run_id"]
        if known:
            self.run_id = known
            self._client.update_run(known, status="RUNNING", name=run.name)
        else:
            tags = {"mlflow.parentRunId": run.parent} if run.parent else {}
            started = _ms(run.folder, "started")
            made = self._client.create_run(store.experiment_id, started, tags, run_name=run.name)
            self.run_id = made.info.run_id
        run.folder.mkdir(parents=True, exist_ok=True)
        identity.write_text(json.dumps({"uri": store.uri, "run_id": self.run_id}))
        self._describe(run)

    def _describe(self, run: RunInfo) -> None:
        from mlflow.entities import Param, RunTag

        from opd_lab.tracking.origin import commit

        have = self._client.get_run(self.run_id).data.params
        params = {key(name): shorten(value, LONGEST["param"]) for name, value in run.params.items()}
        tags = {"mlflow.source.git.commit": commit() or "unknown", **run.tags}
        self._client.log_batch(
            self.run_id,
            params=[Param(name, value) for name, value in params.items() if name not in have],
            tags=[RunTag(key(name), shorten(value, LONGEST["tag"])) for name, value in tags.items()],
        )
        self._client.log_text(self.run_id, run.config_yaml, "config.yaml")
        if run.dataset and not have:
            self._client.log_inputs(self.run_id, [_dataset_input(**run.dataset)])

    def log(self, report: Report) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key(name), value, now, report.step) for name, value in report.scalars.items()]
        if metrics:
            self._client.log_batch(self.run_id, metrics=metrics, synchronous=True)
        for name, histogram in report.histograms.items():
            self._draw(name, report.step, histogram.bins, histogram.counts_K.tolist())
        if rows := report.tables.get("high_loss_tokens"):
            self._table("high_loss_tokens.json", rows)
        if rows := report.tables.get("rollouts"):
            self._client.log_text(self.run_id, _readable(rows), f"rollouts/step_{report.step:06d}.txt")

    def _draw(self, name: str, step: int, bins: str, counts: list[int]) -> None:
        from opd_lab.tracking.figures import heat_map

        steps, counts_SK = self._history.setdefault(name, ([], []))
        steps.append(step)
        counts_SK.append(counts)
        picture = heat_map(name, bins, steps, counts_SK)
        self._client.log_image(self.run_id, picture, key=re.sub(r"[^\w\-./ ]", "_", key(name), flags=re.A), step=step)

    def _table(self, file: str, rows: list[dict[str, Any]]) -> None:
        """One file, rewritten: MLflow's own `log_table` appends by downloading, and fails at its 149th file."""
        columns = list(rows[0])
        content = {"columns": columns, "data": [[row[column] for column in columns] for row in rows]}
        self._client.log_text(self.run_id, json.dumps(content), file)
        self._client.set_tag(self.run_id, "mlflow.loggedArtifacts", json.dumps([{"path": file, "type": "table"}]))

    def artifact(self, path: Path, folder: str = "") -> None:
        self._client.log_artifact(self.run_id, str(path), folder or None)

    def tag(self, name: str, value: str) -> None:
        self._client.set_tag(self.run_id, key(name), shorten(value, LONGEST["tag"]))

    def finish(self, status: str) -> None:
        """Log the run folder's files, then close the run."""
        for path in sorted(self._run_folder.iterdir()):
            if path.suffix in (".parquet", ".txt", ".diff", ".yaml", ".html"):
                self.artifact(path)
        if (self._run_folder / ANALYSIS).is_dir():
            self._client.log_artifacts(self.run_id, str(self._run_folder / ANALYSIS), ANALYSIS)
        self._client.set_terminated(self.run_id, status, _ms(self._run_folder, "ended"))


def _ms(folder: Path, when: str) -> int | None:
    """What the run folder says of `started` or `ended`, so that both tell the same; None where there is none."""
    path = folder / "status.json"
    at = json.loads(path.read_text())[when] if path.exists() else None
    return None if at is None else round(1000 * at)


def _history(run: RunInfo) -> dict[str, tuple[list[int], list[list[int]]]]:
    """The histograms that a resumed run has logged already, so that its pictures show all of training."""
    from opd_lab.tracking.run_folder import read_table

    out: dict[str, tuple[list[int], list[list[int]]]] = {}
    table = read_table(run.folder, "histograms") if run.step else None
    for row in [] if table is None else table.to_pylist():
        if row["step"] < run.step:
            steps, counts_SK = out.setdefault(row["name"], ([], []))
            steps.append(row["step"])
            counts_SK.append(row["counts"])
    return out


def _dataset_input(name: str, source: str, digest: str) -> Any:
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    data = MetaDataset(CodeDatasetSource({"source": source}), name=name, digest=shorten(digest, LONGEST["digest"]))
    return DatasetInput(data._to_mlflow_entity(), [InputTag("mlflow.data.context", "train")])


def _readable(rows: list[dict[str, Any]]) -> str:
    return "\n\n".join(
        f"rollout {row['uid']}  reward {row['reward']}\n{row['prompt']}\n>>> {row['text']}" for row in rows
    )
