"""The trial's side: runs the job of a folder, and tells of it. Starts wherever a launcher calls `main`."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from opd_lab.sweep.contract import Job, Mail, Order
from opd_lab.train import Evaluated, Progress, Pruned


class Report(Protocol):
    """What a task may say while it works."""

    def evaluated(self, seen: Evaluated) -> None:
        """Tell of an evaluation, and wait until the sweep has decided; raises `Pruned`."""
        ...

    def step(self, progress: Progress) -> None: ...


Task = Callable[[Order, Sequence[str], Report], Mapping[str, float]]


def main(folder: str) -> None:
    """Run the job of a folder to its end. Whatever happens is in the events; nothing is raised, nothing returned."""
    mail = Mail(Path(folder))
    job = mail.job()
    assert job is not None, folder
    signal.signal(signal.SIGTERM, _stop)
    mail.post("started", attempt=job.attempt, pid=os.getpid(), host=socket.gethostname(), time=time.time())
    state, error = "complete", None
    try:
        module, _, name = job.task.partition(":")
        task: Task = getattr(importlib.import_module(module), name)
        for run, order in enumerate(job.runs):
            _run(mail, job, task, run, order)
    except Pruned:
        state = "pruned"
    except (SystemExit, KeyboardInterrupt):
        state = "stopped"
    except Exception:  # whatever it is, this trial alone has failed
        state, error = "failed", traceback.format_exc()
        print(error, flush=True)
    mail.post("outcome", attempt=job.attempt, state=state, error=error)


def train(order: Order, metrics: Sequence[str], report: Report) -> Mapping[str, float]:
    """The task of every sweep: one run of opd_lab, and what it reached."""
    from omegaconf import DictConfig, OmegaConf

    from opd_lab.config import settings_of
    from opd_lab.run import execute, metric

    cfg = OmegaConf.create(order.config)
    assert isinstance(cfg, DictConfig)
    done = execute(
        settings_of(cfg),
        order.method,
        config_yaml=order.config,
        on_step=report.step,
        on_evaluation=report.evaluated,
        say=lambda text: print(text, flush=True),
    )
    return {name: metric(done.folder, name) for name in metrics}


def _run(mail: Mail, job: Job, task: Task, run: int, order: Order) -> None:
    if order.mlflow_run_id is not None:
        os.environ["MLFLOW_RUN_ID"] = order.mlflow_run_id
    values = dict(task(order, job.metrics, _Reporter(mail, job, run)))
    mail.post("run", attempt=job.attempt, run=run, values=[values[name] for name in job.metrics])


class _Reporter:
    def __init__(self, mail: Mail, job: Job, run: int) -> None:
        self._mail, self._job, self._run = mail, job, run

    def step(self, progress: Progress) -> None:
        said = {"accuracy": progress.accuracy, "seconds_left": progress.seconds_left}
        self._mail.post("step", run=self._run, step=progress.step, steps=progress.steps, **said)

    def evaluated(self, seen: Evaluated) -> None:
        tokens = seen.scalars.get("cost/generated_tokens", float("nan"))
        values = [seen.scalars.get(name) for name in self._job.metrics]
        said: dict[str, Any] = {"tokens": tokens, "seconds": seen.seconds, "problems": dict(seen.problems)}
        self._mail.post("evaluated", run=self._run, step=seen.step, values=values, **said)
        while self._job.waits:
            go = self._mail.verdict(self._run, seen.step)
            if go is False:
                raise Pruned
            if go:
                return
            time.sleep(self._job.poll_seconds)


def _stop(signal_number: int, frame: Any) -> None:
    raise SystemExit(128 + signal_number)
