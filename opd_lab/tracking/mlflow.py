"""MLflow: the same run, live. This module imports it late, with its telemetry and progress bars off.

The store is a SQLite file beside the run folders unless `tracking.uri` names another; it is created under a file lock,
because two processes that open a new store at once break each other. One batched call carries all scalars that have
come since the last (`bulk.py`).
MLflow has no histogram and no chart for one, so each is drawn over training and logged as an image with key and step,
which its comparison view pages through; the numbers themselves are in the run folder's files, logged at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from opd_lab.tracking.arranged import arrange
from opd_lab.tracking.bulk import log_metrics
from opd_lab.tracking.model import log_model
from opd_lab.tracking.showing import TABLES, Shown
from opd_lab.tracking.stored import PARAMS, quiet
from opd_lab.tracking.tracker import RunInfo
from opd_lab.types import Report

if TYPE_CHECKING:
    from mlflow import MlflowClient

LONGEST_PARAM, LONGEST_TAG, LONGEST_DIGEST = 6000, 8000, 36  # characters that MLflow takes
BATCH = 1000  # metrics that MLflow takes in one call
LOGGED = (".parquet", ".txt", ".diff", ".yaml", ".html", ".png", ".json", ".jsonl")
NOT_LOGGED = ("checkpoints", "segments", "student", "status.json", "mlflow.json", "journal.jsonl", "undelivered")
SHOWN = ("method", "optim", "rollout")  # groups of settings
WAITING = "undelivered"  # in the run folder: files that wait, as metrics and tags do in memory
IDENTITY = "mlflow.json"  # in the run folder: which MLflow run it is


def shorten(text: str, limit: int, where: str) -> str:
    """A text that fits, with a note where all of it is."""
    note = f"... (whole in {where})"
    return text if len(text) <= limit else text[: limit - len(note)] + note


def is_shown(name: str, value: Any) -> bool:
    """Whether a setting is a param of MLflow's, to filter and sort by: what methods are and how they are trained.

    MLflow prints every param above every picture of a chart, and eighty of them leave no room for it. All settings are
    in PARAMS and in config.yaml, what they are about (models, data) in tags.
    """
    group = name.split(".")[0]
    return (group in SHOWN or group == name) and name != "method._target_" and value not in (None, [], "")


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
    """A tracker; `run_id` is known once it has started. A report that the store has already is not sent again."""

    name: ClassVar[str] = "mlflow"
    remote: ClassVar[bool] = True

    tables: ClassVar[Collection[str]] = (*TABLES, "positions")

    def __init__(self, uri: str | None, folder: Path, log_model_megabytes: float = 0, picture_every: int = 1) -> None:
        self._uri, self._folder, self._log_model_megabytes = uri, folder, log_model_megabytes
        self._shown = Shown(picture_every)
        self.run_id = ""

    def start(self, run: RunInfo) -> None:
        """Create the run, or go on with the one that the run folder or MLFLOW_RUN_ID names."""
        self._store = store = open_store(self._uri, self._folder, run.experiment)
        self._client, self._run_folder = store.client, run.folder
        before = self._known(run)
        mine = before if run.step else None
        if before is not None and mine is None and before.info.status == "RUNNING":
            self._client.set_terminated(before.info.run_id, "KILLED")  # killed before it had a checkpoint
        if made := os.environ.get("MLFLOW_RUN_ID"):
            mine = self._client.get_run(made)
        if mine is not None:
            self.run_id = mine.info.run_id
            self._client.update_run(self.run_id, status="RUNNING", name=run.name)
        else:
            tags = {"mlflow.parentRunId": run.parent} if run.parent else {}
            started = _ms(run.folder, "started")
            self.run_id = self._client.create_run(store.experiment_id, started, tags, run.name).info.run_id
        last = [metric.step for metric in mine.data._metric_objs] if mine else []
        self._last = max(last, default=-1)  # no report is cut in two, and its scalars are the last thing sent of it
        self._metrics: list[Any] = []
        self._files = run.folder / WAITING
        shutil.rmtree(self._files, ignore_errors=True)
        self._tags: dict[str, str] = {}
        run.folder.mkdir(parents=True, exist_ok=True)
        known = {"uri": store.uri, "experiment_id": store.experiment_id, "run_id": self.run_id}
        (run.folder / IDENTITY).write_text(json.dumps(known))
        self._describe(run, set(mine.data.params) if mine else set())
        if not made:  # a sweep that makes its runs arranges their page as well
            arrange(self._client, store.experiment_id, steps=int(str(run.params.get("steps", 0))), again=False)

    def _known(self, run: RunInfo) -> Any:
        """The MLflow run that the folder's last attempt had in this store; None where there is none."""
        from mlflow.exceptions import MlflowException

        path = run.folder / IDENTITY
        known = json.loads(path.read_text()) if path.exists() else {}
        if known.get("uri") != self._store.uri:
            return None
        try:
            return self._client.get_run(known["run_id"])
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _describe(self, run: RunInfo, have: set[str]) -> None:
        from mlflow.entities import Param

        shown = {name: value for name, value in run.params.items() if is_shown(name, value)}
        params = {name: shorten(str(value), LONGEST_PARAM, PARAMS) for name, value in shown.items()}
        new = [Param(name, value) for name, value in params.items() if name not in have]
        commit = _said(run.folder).get("commit") or "unknown"
        self._client.log_batch(self.run_id, params=new, tags=_tags({"mlflow.source.git.commit": commit, **run.tags}))
        self._client.log_text(self.run_id, run.config_yaml, "config.yaml")
        self._client.log_text(self.run_id, json.dumps(dict(run.params)), PARAMS)
        if run.dataset and not have:
            self._client.log_inputs(self.run_id, _dataset_inputs(run.dataset))

    def log(self, report: Report) -> None:
        """What `flush` sends."""
        from mlflow.entities import Metric

        if report.step <= self._last:
            self._shown.skip(report)
            return
        if len(self._metrics) + len(report.scalars) > BATCH:
            self.flush()
        self._tags |= self._shown.add(report, self._files, seed=self._run_folder.name)
        at = round(1000 * (report.time or time.time()))
        self._metrics += [Metric(name, value, at, report.step) for name, value in report.scalars.items()]
        self._last = report.step

    def artifact(self, path: Path, folder: str = "") -> None:
        self._client.log_artifact(self.run_id, str(path), folder or None)

    def tag(self, name: str, value: str) -> None:
        self._client.log_batch(self.run_id, tags=_tags({name: value}))

    def flush(self) -> None:
        """Send what waits, scalars last: they say that a report is complete. Where that fails it waits on."""
        self._send_files()
        if self._metrics:
            log_metrics(self._client, self.run_id, self._metrics, _tags(self._tags))
            self._metrics, self._tags = [], {}

    def _send_files(self) -> None:
        if self._files.exists():
            self._client.log_artifacts(self.run_id, str(self._files))
            shutil.rmtree(self._files)

    def finish(self, status: str) -> None:
        """Log the run folder's files and all of its tags, and the student as a model; then close the run."""
        self.flush()
        if status == "FINISHED":
            self._shown.finish(self._files, seed=self._run_folder.name)
            self._send_files()
        for path in sorted(self._run_folder.rglob("*")):
            inside = path.relative_to(self._run_folder)
            if path.is_file() and path.suffix in LOGGED and inside.parts[0] not in NOT_LOGGED:
                self.artifact(path, "" if inside.parent == Path() else str(inside.parent))
        said = _said(self._run_folder)
        self._client.log_batch(self.run_id, tags=_tags(said.get("tags", {})))
        if status == "FINISHED":
            log_model(self._store, self.run_id, self._run_folder / "student", self._log_model_megabytes, self._last)
        self._client.set_terminated(self.run_id, status, _ms(self._run_folder, "ended"))


def _tags(tags: Mapping[str, str]) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(name, shorten(str(value), LONGEST_TAG, "the run folder")) for name, value in tags.items()]


def _said(folder: Path) -> dict[str, Any]:
    """What the run folder says of the run; nothing where it says nothing yet."""
    path = folder / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _ms(folder: Path, when: str) -> int | None:
    """`started` or `ended` of the run folder, so that both tell the same; None where there is none."""
    at = _said(folder).get(when)
    return None if at is None else round(1000 * at)


def _dataset_inputs(dataset: Mapping[str, str]) -> list[Any]:
    """One input per split, by its digest."""
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    source = CodeDatasetSource({"source": dataset["source"]})
    return [
        DatasetInput(
            MetaDataset(source, name=dataset["name"], digest=digest[:LONGEST_DIGEST])._to_mlflow_entity(),
            [InputTag("mlflow.data.context", split)],
        )
        for split, digest in dataset.items()
        if split not in ("name", "source")
    ]
