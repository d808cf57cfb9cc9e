"""The sweep's loop: start a trial when a slot is free, judge its evaluations, keep what became of it.

Everything that is decided is in the study or in the trial's folder before the trial may act on it, so that a sweep
killed at any moment goes on as if nothing had happened.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import optuna
from optuna.trial import TrialState

from opd_lab.sweep.contract import Ended, Job, Launcher, Mail, Order
from opd_lab.sweep.owner import STOP, write_card
from opd_lab.sweep.settings import SweepSettings
from opd_lab.sweep.space import Params
from opd_lab.sweep.study import Study, spread

TRAIN = "opd_lab.sweep.worker:train"


@dataclass
class Running:
    """A trial that has been started."""

    trial: optuna.Trial
    params: Params
    mail: Mail
    job: Job
    where: str
    started: float | None = None  # time.monotonic() when its process was made, then when it began to work
    run: int = 0  # which of its runs is on
    step: int = 0
    seconds_left: float = math.nan
    value: float = math.nan  # of the last evaluation
    finals: dict[int, list[float]] = field(default_factory=dict)  # run -> objectives
    tokens: dict[int, float] = field(default_factory=dict)  # run -> student tokens so far
    seconds: dict[int, float] = field(default_factory=dict)  # run -> training time so far
    outcome: Mapping[str, Any] | None = None

    @property
    def number(self) -> int:
        return self.trial.number

    @property
    def steps(self) -> int:
        """Of all its runs."""
        return sum(order.steps for order in self.job.runs)

    def position(self, run: int, step: int) -> int:
        """Steps of the trial after so many steps of one of its runs."""
        return sum(order.steps for order in self.job.runs[:run]) + step


class View(Protocol):
    """What people see."""

    def started(self, running: Running) -> None: ...
    def moved(self, running: Running) -> None: ...
    def ended(self, running: Running, state: str, why: str) -> None: ...
    def say(self, text: str) -> None: ...


class Tree(Protocol):
    """Where the runs of a sweep belong together."""

    def orders(self, trial: optuna.Trial, params: Params, runs: Sequence[Order]) -> list[Order]:
        """The runs of a trial, each with the id under which it is to log."""
        ...

    def close(self, running: Running, state: str, why: str) -> None: ...
    def finish(self, files: Sequence[Path], status: str) -> None: ...


@dataclass(frozen=True)
class Plan:
    """What the loop must know of the question."""

    folder: Path  # the sweep's own
    metrics: Sequence[str]  # the objectives
    settings: SweepSettings
    orders: Callable[[Params], list[Order]]  # params -> the runs of a trial
    poll_seconds: float
    task: str = TRAIN


class Trials:
    """One sweep, from where it stands to its end."""

    def __init__(self, plan: Plan, study: Study, launcher: Launcher, tree: Tree, view: View) -> None:
        self.plan, self.study, self.launcher, self.tree, self.view = plan, study, launcher, tree, view
        self.running: dict[Path, Running] = {}
        self.stopped: str | None = None  # why no further trial is started
        self._interrupts = 0  # how often Ctrl-C was pressed
        self._heeded = 0  # of these
        self._stopping = False  # running trials were asked to stop; they are to be resumed
        self._held: list[tuple[optuna.Trial, Params, list[Order]]] = []

    def run(self) -> None:
        """Until there are enough trials, or it is stopped: then `stopped` says why."""
        self.plan.folder.mkdir(parents=True, exist_ok=True)
        (self.plan.folder / STOP).unlink(missing_ok=True)
        self._card()
        with _signals(self._interrupted):
            try:
                for trial, params in self.study.unfinished():
                    self._held.append((trial, params, self.plan.orders(params)))
                self._fill()
                while self.running:
                    ended = self.launcher.wait_any(self.plan.poll_seconds)
                    for running in self.running.values():
                        self._listen(running)
                    for one in ended:
                        self._end(self.running.pop(one.folder), one)
                    self._watch()
                    self._fill()
            finally:
                self.launcher.close()

    # starting ---------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        while len(self.running) < self.launcher.slots and self.stopped is None:
            chosen = self._next()
            if chosen is None:
                return
            self._start(*chosen)

    def _next(self) -> tuple[optuna.Trial, Params, list[Order]] | None:
        """A trial none of whose run folders is in use by another one."""
        while True:
            busy = {order.folder for running in self.running.values() for order in running.job.runs}
            for place, waiting in enumerate(self._held):
                if not busy & {order.folder for order in waiting[2]}:
                    return self._held.pop(place)
            if len(self._held) >= self.launcher.slots or (asked := self.study.ask()) is None:
                return None
            trial, params = asked
            try:
                self._held.append((trial, params, self.plan.orders(params)))
            except ValueError as error:  # params that no run can have
                self.study.fail(trial, str(error))
                self.view.say(f"trial {trial.number} FAILED: {error}")
                self._after_failure()

    def _start(self, trial: optuna.Trial, params: Params, orders: list[Order]) -> None:
        mail = Mail(self.plan.folder / f"trial_{trial.number:04d}")
        before = mail.job()
        if before is not None and self.launcher.adopt(mail.folder):
            self.running[mail.folder] = Running(trial, params, mail, before, "still running")
        else:
            job = Job(
                trial=trial.number,
                attempt=before.attempt + 1 if before else 1,
                task=self.plan.task,
                metrics=list(self.plan.metrics),
                runs=self.tree.orders(trial, params, orders),
                waits=self.plan.settings.pruner is not None,
                poll_seconds=self.plan.poll_seconds,
            )
            trial.set_user_attr("attempts", job.attempt)
            mail.write_job(job)
            self.running[mail.folder] = Running(trial, params, mail, job, self.launcher.submit(mail.folder))
        self.view.started(self.running[mail.folder])

    # listening --------------------------------------------------------------------------------------------------

    def _listen(self, running: Running) -> None:
        for said in running.mail.events():
            kind = said["kind"]
            if kind == "step":
                running.run, running.step = said["run"], said["step"]
                running.seconds_left = said["seconds_left"]
            elif kind == "evaluated":
                self._judge(running, said)
            elif said["attempt"] != running.job.attempt:
                continue
            elif kind in ("placed", "started"):
                running.started = time.monotonic()
            elif kind == "run":
                running.finals[said["run"]] = said["values"]
            else:
                running.outcome = said
            self.view.moved(running)

    def _judge(self, running: Running, said: Mapping[str, Any]) -> None:
        """Keep an evaluation, and decide whether the trial may go on. What was decided before stays decided."""
        run, step = said["run"], said["step"]
        running.run, running.step = run, step
        running.tokens[run], running.seconds[run] = said["tokens"], said["seconds"]
        if len(self.plan.metrics) == 1 and said["values"][0] is not None:
            earlier = [values[0] for before, values in running.finals.items() if before < run]
            running.value = fmean([*earlier, said["values"][0]])
        if running.mail.verdict(run, step) is not None:
            return
        go = True
        if math.isfinite(running.value):
            self._report(running, said)
            last = running.position(run, step) == running.steps
            go = last or self.plan.settings.pruner is None or not running.trial.should_prune()
        if running.job.waits:
            running.mail.decide(run, step, go)

    def _report(self, running: Running, said: Mapping[str, Any]) -> None:
        """Intermediate values: by step, or for the Wilcoxon test by problem and evaluation."""
        run, step = said["run"], said["step"]
        values = {running.position(run, step): running.value}
        if self.plan.settings.pruner == "wilcoxon":
            orders, scores = running.job.runs, said["problems"].values()
            place = sum(order.evaluations for order in orders[:run]) + math.ceil(step / (orders[run].every or step)) - 1
            values = {place * len(scores) + number: score for number, score in enumerate(scores)}
        reported = self.study.trials()[running.number].intermediate_values  # by a sweep that was killed right then
        for at, value in values.items():
            if at not in reported:
                running.trial.report(value, at)

    # ending -----------------------------------------------------------------------------------------------------

    def _end(self, running: Running, ended: Ended) -> None:
        self._listen(running)
        state, why = self._became(running, ended)
        trial = running.trial
        if state != "stopped":
            trial.set_user_attr("steps", running.position(running.run, running.step))
            trial.set_user_attr("of", running.steps)
            trial.set_user_attr("tokens", sum(running.tokens.values()))
            trial.set_user_attr("seconds", sum(running.seconds.values()))
            trial.set_user_attr("runs", [order.folder for order in running.job.runs])
        if state == "complete":
            per_run = [running.finals[run] for run in range(len(running.job.runs))]
            values = [fmean(one) for one in zip(*per_run)]
            if len(per_run) > 1:
                trial.set_user_attr("values_by_seed", per_run)
                trial.set_user_attr("spread", [spread(one) for one in zip(*per_run)])
            running.value = values[0]
            self.study.complete(trial, values)
        elif state == "pruned":
            self.study.prune(trial)
        elif state == "failed":
            self.study.fail(trial, why)
        self._card()
        self.tree.close(running, state, why)
        self.view.ended(running, state, why)
        if state == "failed":
            self._after_failure()

    def _became(self, running: Running, ended: Ended) -> tuple[str, str]:
        """complete, pruned, failed, or stopped (to be resumed); and why, where it is not obvious."""
        outcome = running.outcome
        if outcome is None or outcome["state"] == "stopped":
            return "stopped" if self._stopping else "failed", ended.killed or "its process was stopped from outside"
        state = str(outcome["state"])
        if state == "complete":
            for run, values in running.finals.items():
                for name, value in zip(running.job.metrics, values):
                    if not math.isfinite(value):
                        return "failed", f"{name} is {value} after run {run}"
        return state, str(outcome["error"] or "")

    def _after_failure(self) -> None:
        s = self.plan.settings
        if s.fail_fast:
            self._stop("sweep.fail_fast=true, and a trial has failed", now=True)
        elif s.max_failures is not None and self.study.failures() > s.max_failures:
            self.stopped = f"more than sweep.max_failures={s.max_failures} trials have failed"

    def _card(self) -> None:
        write_card(self.plan.folder, self.study.card() | {"question": self.plan.settings.question})

    # stopping ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        limit = self.plan.settings.time_limit_seconds
        for folder, running in self.running.items():
            if limit is not None and running.started is not None and time.monotonic() - running.started > limit:
                self.launcher.cancel(folder, f"time limit of {limit:g} s", now=True)
        if not self._interrupts and (self.plan.folder / STOP).exists():
            self._interrupts = 1
        if self._interrupts > self._heeded:
            self._heeded = self._interrupts
            self.view.say("stopping: trials may close their books; Ctrl-C again kills them")
            self._stop("stopped; the same command goes on from here", now=self._interrupts > 1)

    def _stop(self, why: str, *, now: bool) -> None:
        self.stopped, self._stopping = why, True
        for folder in self.running:
            self.launcher.cancel(folder, why, now=now)

    @property
    def interrupted(self) -> bool:
        return self._interrupts > 0

    def _interrupted(self) -> None:
        self._interrupts += 1


class NoTree:
    """A sweep without MLflow."""

    def orders(self, trial: optuna.Trial, params: Params, runs: Sequence[Order]) -> list[Order]:
        return list(runs)

    def close(self, running: Running, state: str, why: str) -> None:
        pass

    def finish(self, files: Sequence[Path], status: str) -> None:
        pass


@contextmanager
def _signals(heard: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM call a function while this lasts; only the main thread of a process hears them."""
    mine = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if mine else ()
    before = {number: signal.signal(number, lambda *_: heard()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def counts(study: Study) -> dict[str, int]:
    names = {
        "complete": TrialState.COMPLETE,
        "pruned": TrialState.PRUNED,
        "failed": TrialState.FAIL,
        "unfinished": TrialState.RUNNING,
    }
    return {name: study.count(state) for name, state in names.items()}
