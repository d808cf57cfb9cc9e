"""A sweep in MLflow: sweep -> trial -> seed. The sweep makes every run and closes those whose process has died.

Nothing here stops a sweep once it has begun: a store that is away is told of once, and the study and the run folders
have everything.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from socket import gethostname
from typing import Any

import optuna

from opd_lab.settings import TrackingSettings
from opd_lab.sweep.contract import Order
from opd_lab.sweep.found import NOTE, table
from opd_lab.sweep.points import KEY
from opd_lab.sweep.question import Question
from opd_lab.sweep.space import Params
from opd_lab.sweep.study import Study
from opd_lab.sweep.trials import Running
from opd_lab.tracking.arranged import arrange
from opd_lab.tracking.mlflow import IDENTITY, LONGEST_PARAM, LONGEST_TAG, is_shown, open_store, shorten

log = logging.getLogger("opd_lab.sweep")
RUN, RUNS = "mlflow_run_id", "mlflow_run_ids"  # attributes: of the study and of a trial; by run folder, of a trial


class MLflowTree:
    """A `Tree`."""

    def __init__(self, t: TrackingSettings, question: Question, study: Study) -> None:
        """Open the store before any trial does, and find or make the sweep's own run.

        Raises:
            ValueError: the store cannot be written.
        """
        self._store = open_store(t.uri, Path(t.folder), t.experiment)
        self._client, self._question, self._study = self._store.client, question, study
        self._warned = False
        known = study.optuna.user_attrs.get(RUN)
        run = self._run(known["id"]) if known and known["uri"] == self._store.uri else None
        if run is None:
            run = self._client.create_run(self._store.experiment_id, run_name=question.name)
            study.optuna.set_user_attr(RUN, {"uri": self._store.uri, "id": run.info.run_id})
        self.run_id = run.info.run_id
        self._client.update_run(self.run_id, status="RUNNING")
        s = question.settings
        self._say(
            self.run_id,
            {"sweep": question.name, "kind": "sweep", "sweep.question": s.question or "", "sweep.host": gethostname()},
            {"sampler": s.sampler or "grid", "pruner": str(s.pruner), "trials": study.target, "seeds": str(s.seeds)}
            | {f"space.{p.key}": p.text for p in study.space.parameters}
            | {f"objective.{name}": way for name, way in question.objective.items()},
            known=run.data.params,
        )
        varied = [key for key in study.space.keys if key != "method" and is_shown(key, "varied")]
        steps = max(order.steps for order, _ in question.samples)
        arrange(self._client, self._store.experiment_id, steps=steps, params=varied)

    def orders(self, trial: optuna.Trial, params: Params, runs: Sequence[Order]) -> list[Order]:
        """The runs of a trial, each with its MLflow run below the trial's."""
        try:
            return self._orders(trial, params, runs)
        except Exception as error:
            self._missed(error)
            return list(runs)

    def close(self, running: Running, state: str, why: str) -> None:
        try:
            self._close(running, state, why)
        except Exception as error:
            self._missed(error)

    def finish(self, files: Sequence[Path], status: str) -> None:
        """The results, then the end."""
        try:
            self._finish(files, status)
        except Exception as error:
            self._missed(error)

    def _orders(self, trial: optuna.Trial, params: Params, runs: Sequence[Order]) -> list[Order]:
        tags = {"sweep": self._question.name, "sweep.trial": trial.number, "sweep.state": "running"}
        tags |= {f"sweep.param.{key}": value for key, value in params.items()}
        if (retried := trial.user_attrs.get("retry_of")) is not None:
            tags["sweep.retry_of"] = retried
        parent = self.run_id
        if self._question.settings.seeds:
            name = ", ".join([f"trial {trial.number}", *([params[KEY]] if KEY in params else [])])
            run = self._run(trial.user_attrs.get(RUN)) or self._make(name, self.run_id)
            parent = run.info.run_id
            trial.set_user_attr(RUN, parent)
            self._client.update_run(parent, status="RUNNING")
            self._say(parent, tags | {"kind": "trial"}, params, run.data.params)
        out, made = [], trial.user_attrs.get(RUNS, {})
        for order in runs:
            folder = Path(order.folder)
            run = self._of_folder(folder) or self._run(made.get(order.folder)) or self._make(folder.name, parent)
            self._say(run.info.run_id, tags | {"kind": "run", "mlflow.parentRunId": parent, "seed": order.seed})
            out.append(replace(order, mlflow_run_id=run.info.run_id))
        trial.set_user_attr(RUNS, {order.folder: order.mlflow_run_id for order in out})
        return out

    def _close(self, running: Running, state: str, why: str) -> None:
        tags = {"sweep.state": state, "sweep.pruned": state == "pruned"}
        if why:
            tags["sweep.why"] = why.strip()
        if state == "pruned":
            tags["sweep.pruned_at_step"] = running.position(running.run, running.step)
        metrics = self._study.trials()[running.number].values if state == "complete" else None
        tags |= {f"sweep.{name}": f"{value:.6g}" for name, value in zip(running.job.metrics, metrics or ())}
        died = running.outcome is None or state != "failed"
        status = "FINISHED" if state == "complete" else "KILLED" if died else "FAILED"
        trial: str | None = running.trial.user_attrs.get(RUN)
        values = [running.finals.get(run, []) for run in range(len(running.job.runs))]
        ids = [(order.mlflow_run_id, here) for order, here in zip(running.job.runs, values)]
        for run_id, here in [*ids, (trial, [])]:
            if run_id is None:
                continue
            self._say(run_id, tags)
            senseless = not all(map(math.isfinite, here))  # a run that finished, but whose result is not a number
            if senseless or self._client.get_run(run_id).info.status == "RUNNING":
                self._client.set_terminated(run_id, status)
        if trial and metrics:
            for name, value in zip(running.job.metrics, metrics):
                self._client.log_metric(trial, name, value)
        if metrics and len(metrics) == 1 and (best := self._study.best()) and best.value is not None:
            name = f"sweep/best/{running.job.metrics[0]}"
            self._client.log_metric(self.run_id, name, best.value, step=running.number)

    def _finish(self, files: Sequence[Path], status: str) -> None:
        for path in files:
            self._client.log_artifact(self.run_id, str(path))
        frame = table(self._study, list(self._question.objective))
        rows = json.loads(str(frame.to_json(orient="split", index=False)))
        content = {"columns": rows["columns"], "data": rows["data"]}
        self._client.log_text(self.run_id, json.dumps(content), "trials.json")
        shown = json.dumps([{"path": "trials.json", "type": "table"}])
        text = "".join(path.read_text() for path in files if path.name == NOTE)
        self._say(self.run_id, {"mlflow.note.content": text, "mlflow.loggedArtifacts": shown})
        self._client.set_terminated(self.run_id, status)

    def _of_folder(self, folder: Path) -> Any:
        """The MLflow run that a run folder has already in this store."""
        path = folder / IDENTITY
        known = json.loads(path.read_text()) if path.exists() else {}
        return self._run(known["run_id"]) if known.get("uri") == self._store.uri else None

    def _run(self, run_id: str | None) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return None if run_id is None else self._client.get_run(run_id)
        except MlflowException:
            return None

    def _make(self, name: str, parent: str) -> Any:
        return self._client.create_run(self._store.experiment_id, tags={"mlflow.parentRunId": parent}, run_name=name)

    def _say(
        self, run_id: str, tags: Mapping[str, Any], params: Params | None = None, known: Collection[str] = ()
    ) -> None:
        """Tags, and the params that the run does not have yet."""
        from mlflow.entities import Param, RunTag

        self._client.log_batch(
            run_id,
            params=[
                Param(key, shorten(str(value), LONGEST_PARAM, "the study"))
                for key, value in (params or {}).items()
                if key not in known
            ],
            tags=[RunTag(key, shorten(str(value), LONGEST_TAG, "the study")) for key, value in tags.items()],
        )

    def _missed(self, error: Exception) -> None:
        if not self._warned:
            log.warning("MLflow did not take a part of the sweep; the study and the run folders have it: %r", error)
        self._warned = True
