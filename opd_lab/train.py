"""The loop. It reads like Algorithm 1 of any OPD paper, and knows no method by name.

prompts -> rollouts -> reward -> teacher -> batch -> weights -> gradient -> update -> report
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opd_lab import checkpoint
from opd_lab.chunk import Declared, teacher_must
from opd_lab.data.prompts import Example, PromptStream
from opd_lab.diagnostics import RECORD, RECORD_DUE, due
from opd_lab.diagnostics.alerts import GRADIENT, Alarm, AlarmError, diverged, rows
from opd_lab.diagnostics.summary import spent
from opd_lab.diagnostics.watch import Watch
from opd_lab.evaluate import Evaluation, evaluate
from opd_lab.methods.base import Prepared
from opd_lab.optimize import DivergedError, adamw, gradient_norms, learn, learning_rate
from opd_lab.parts import Parts, plain_behavior
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.settings import RunSettings
from opd_lab.step import View, whole_batch
from opd_lab.tracking.tracker import Tracker
from opd_lab.types import Batch, Behavior, Report, Rollouts, Signal, State


@dataclass(frozen=True, slots=True)
class Progress:
    """What a person watching wants to know."""

    step: int
    steps: int
    loss: float
    kl: float
    accuracy: float
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What an evaluation found after some steps; who launched the run may judge by it whether it is worth going on."""

    step: int
    scalars: Mapping[str, float]  # everything reported at this step
    problems: Mapping[str, float]  # validation problem -> share of correct rollouts
    seconds: float  # of all steps so far


class Pruned(Exception):  # noqa: N818 - not an error
    """Raised by `on_evaluation`: this run is not worth going on with. Its checkpoint is left."""


class Trainer:
    """Distils the student of `parts` for `settings.steps` steps, or what is left of them."""

    def __init__(
        self,
        settings: RunSettings,
        parts: Parts,
        tracker: Tracker,
        folder: Path,
        *,
        on_step: Callable[[Progress], None] = lambda progress: None,
        on_evaluation: Callable[[Evaluated], None] = lambda evaluated: None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.settings, self.parts, self.tracker, self.folder = settings, parts, tracker, folder
        self.on_step, self.on_evaluation, self.say = on_step, on_evaluation, say
        parts.student.module.requires_grad_(True)
        self.optimizer = adamw(parts.student, settings.optim)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.stream = PromptStream(parts.data.train, settings.seed)
        self.watch = Watch(
            settings,
            [e.ids for e in parts.data.validation],
            parts.student.vocabulary,
            lambda ids: str(parts.student.tokenizer.decode(ids)),
        )
        self.prepared = Prepared(parts.method.init_state(), {})
        self.state: State = self.prepared.state
        self.step = 0  # steps done
        self.totals: dict[str, float] = {"skipped_steps": 0, "seconds": 0.0}
        self.best: dict[str, Any] = {"step": None, "accuracy": -math.inf}
        self.accuracy = math.nan
        self.record, self.record_due = (
            frozenset(s for s in signals if teacher_must(frozenset({s})) <= parts.teacher.provides)
            for signals in (RECORD, RECORD_DUE)
        )
        self.clock: dict[str, float] = {}

    def begin_with(self, prepared: Prepared) -> None:
        """Take over what was fitted before the first step; the report of step 0 tells of it."""
        self.prepared, self.state = prepared, prepared.state

    # one step ---------------------------------------------------------------------------------------------------

    def collect(self) -> tuple[Batch, list[View]]:
        """Prompts -> rollouts -> rewards -> what teacher and student say of them."""
        s, p = self.settings, self.parts
        examples = [e for e in self.stream.take(s.rollout.prompts) for _ in range(s.rollout.per_prompt)]
        rows = torch.arange(len(examples))
        behavior = p.method.behavior(plain_behavior(s), self.step, self.state)
        assert behavior.asks <= p.method.asks().keys(), f"{sorted(behavior.asks)} are not in asks()"
        with self.timed("rollout"):
            rollouts = p.engine.sample(
                p.student,
                [e.ids for e in examples],
                behavior=behavior,
                group_B=rows // s.rollout.per_prompt,
                uid_B=rows + self.step * len(examples),
                generator=self.generator,
                teacher=p.teacher.lm if behavior.helped else None,
                solutions=p.solutions(examples) if "dataset" in behavior.asks else None,
            )
            rollouts = self.graded(rollouts, examples)
        with self.timed("teacher"):
            o = s.optim
            return whole_batch(
                p.method,
                rollouts,
                p.models,
                state=self.state,
                step=self.step,
                seed=s.seed,
                micro_batch=o.micro_batch,
                chunk=o.chunk_tokens,
                record=self.recorded(),
            )

    def graded(self, rollouts: Rollouts, examples: list[Example]) -> Rollouts:
        """The rollouts with their rewards, where the data have answers. One that a stop rule cut has none. Where steps
        can be graded, the place of the first wrong word comes along, -1 without one."""
        grade, first_slip = self.parts.data.grade, self.parts.data.first_slip
        if grade is None:
            return rollouts
        texts = self.parts.student.texts(rollouts)
        if first_slip is not None:
            places = [first_slip(e.messages[-1]["content"], text) for text, e in zip(texts, examples)]
            slip_B = torch.tensor([-1 if place is None else place for place in places], device=rollouts.uid_B.device)
            rollouts = replace(rollouts, extra={**rollouts.extra, "first_slip": slip_B})
        rewards = [grade(text, e.answer) if e.answer is not None else math.nan for text, e in zip(texts, examples)]
        reward_B = torch.tensor(rewards, device=rollouts.reward_B.device)
        return replace(rollouts, reward_B=reward_B.masked_fill(rollouts.cut_B, math.nan))

    def advance(self) -> Report:
        """One step of Algorithm 1, and its report, which is numbered by the steps done: the first is 1."""
        s, p, needs = self.settings, self.parts, self.parts.method.needs()
        self.clock = {}
        begin = time.perf_counter()
        batch, views = self.collect()
        norms: dict[str, float] = {}
        if _due(self.step + 1, s.diagnostics.gradient_every):
            with self.timed("gradient_norms"):
                norms = gradient_norms(p.method, batch, views, p.models.student, self.optimizer, s.optim)
        with self.timed("update"):
            learned = learn(
                p.method,
                batch,
                views,
                p.models.student,
                self.optimizer,
                s.optim,
                rate=learning_rate(s.optim, self.step, s.steps),
                record=self.recorded() | needs.update,
            )
        gradient, weights = learned.gradient, learned.weights
        self.totals["skipped_steps"] += learned.skipped
        self.step += 1
        signals = gradient.signals | {signal: batch[signal] for signal in needs.batch}
        told = Declared(signals, needs.batch | needs.update, f"needs().batch or .update of {type(p.method).__name__}")
        batch = replace(batch, signals=told, tallies=gradient.tallies, losses=gradient.losses, later=learned.later)
        seen = replace(batch, signals=signals, step=self.step)
        self.state = p.method.update(self.state, batch)
        with self.timed("diagnostics"):
            report = self.watch.observe(seen, weights, gradient.losses, p.method.metrics(seen, weights))
            report.tables |= p.method.tables(seen)
        tokens = int(batch.rollouts.generated_B.sum())
        cost = spent(batch, scored=any(view.teacher is not None for view in views))
        for name, count in cost.items():
            self.totals[name] = self.totals.get(name, 0) + count
        seconds = time.perf_counter() - begin
        self.totals["seconds"] += seconds
        report.scalars |= {f"loss/{term}_value": value for term, value in gradient.values.items()}
        report.scalars |= {
            "loss/total_value": gradient.objective,
            GRADIENT: learned.gradient_norm,
            "optim/clipped_fraction": learned.clipped,
            "optim/learning_rate": learning_rate(s.optim, batch.step, s.steps),
            "optim/skipped_steps": float(self.totals["skipped_steps"]),
            "time/step_seconds": seconds,
            "time/tokens_per_second": tokens / seconds,
        }
        report.scalars |= {f"gradient/{term}_norm": norm for term, norm in norms.items()}
        named = p.method.gradient_norms
        report.scalars |= {named[term]: norm for term, norm in norms.items() if term in named}
        report.scalars |= {f"time/{name}_seconds": value for name, value in self.clock.items()}
        report.scalars |= {f"cost/{name}": float(self.totals[name]) for name in cost}
        return report

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self.parts.student.device.type == "cuda":  # what was launched belongs to who launched it
            torch.cuda.synchronize(self.parts.student.device)
        self.clock[name] = self.clock.get(name, 0.0) + time.perf_counter() - begin

    # the run ----------------------------------------------------------------------------------------------------

    def run(self) -> Report:
        """All steps that are left, with evaluations and checkpoints; the last report holds the test scores."""
        s = self.settings
        if self.step == 0:
            self.watch.begin(self.parts.student)
            self.deliver(self.examined(Report(step=0, scalars=dict(self.prepared.metrics)), test=True))
        report = Report(step=self.step)
        while self.step < s.steps:
            try:
                report = self.advance()
            except DivergedError as error:
                self.publish(Report(self.step + 1), [diverged(self.step + 1, error)])
                raise
            last = self.step == s.steps
            examined = last or _due(self.step, s.evaluate.every)
            if examined:
                report = self.examined(report, test=last)
            raised = self.deliver(report)
            stop = bool(raised) and s.diagnostics.on_alarm == "stop" and not last
            best = s.checkpoint.keep_best and self.best["step"] == self.step
            saved = last or best or stop or _due(self.step, s.checkpoint.every)
            if saved:
                self.save()
            if stop:
                raise AlarmError(
                    f"{'; '.join(map(str, raised))}. The run stops here because diagnostics.on_alarm=stop, with a "
                    "checkpoint; the same command goes on from it"
                )
            if examined:
                self.tell(report, saved=saved)
        return report

    def tell(self, report: Report, *, saved: bool) -> None:
        """Tell of an evaluation; a run that is pruned there leaves a checkpoint."""
        counts = [row for row in report.tables["evaluations"] if row["set"] == "validation"]
        problems = {row["problem"]: row["correct"] / row["n"] for row in counts}
        try:
            self.on_evaluation(Evaluated(self.step, report.scalars, problems, self.totals["seconds"]))
        except Pruned:
            if not saved:
                self.save()
            raise

    def recorded(self) -> frozenset[Signal]:
        """What the diagnostics want to know of the tokens of the step at hand."""
        return self.record_due if due(self.step + 1, self.settings.diagnostics.every) else self.record

    def deliver(self, report: Report) -> list[Alarm]:
        """Publish a step's report; the alarms that begin with it."""
        raised = self.watch.alarms.check(report)
        self.publish(report, raised)
        return raised

    def publish(self, report: Report, raised: Sequence[Alarm]) -> None:
        """Log a report, show where the run is, and make every alarm heard."""
        if raised:
            report.tables["alarms"] = rows(raised)
        self.tracker.log(report)
        for alarm in raised:
            self.say(str(alarm))
            self.tracker.tag(f"alarm/{alarm.alarm}", f"step {alarm.step}: {alarm.message}")
        done = report.scalars
        self.on_step(
            Progress(
                step=self.step,
                steps=self.settings.steps,
                loss=done.get("loss/total_value", math.nan),
                kl=done.get("kl/reverse_mean_nats", math.nan),
                accuracy=self.accuracy,
                tokens_per_second=done.get("time/tokens_per_second", math.nan),
                seconds_left=self.totals["seconds"] / max(self.step, 1) * (self.settings.steps - self.step),
            )
        )

    def examined(self, report: Report, *, test: bool) -> Report:
        """The report with scores on validation problems, and on test problems before the first and after the last
        step. They belong to the student after `self.step` steps."""
        e = self.settings.evaluate
        begin = time.perf_counter()
        found = self.examine(self.parts.data.validation[: e.problems], e.samples)
        report.scalars |= found.scalars("eval/validation")
        report.tables.setdefault("evaluations", []).extend(_records(found, "validation", self.step))
        key = f"eval/validation/avg_at_{e.samples}"
        self.accuracy = report.scalars.get(key, math.nan)
        if self.step and self.accuracy > self.best["accuracy"]:
            self.best = {"step": self.step, "accuracy": self.accuracy}
        if test:
            found = self.examine(self.parts.data.test[: e.test_problems], e.test_samples)
            report.scalars |= found.scalars("eval/test")
            report.tables["evaluations"].extend(_records(found, "test", self.step))
            if e.test_best and self.step == self.settings.steps and self.best["step"] is not None:
                self.test_best(report, found)
        self.watch.examine(report, self.parts.student, self.parts.measuring)
        report.scalars["time/evaluation_seconds"] = time.perf_counter() - begin
        return report

    def test_best(self, report: Report, last: Evaluation) -> None:
        """The test scores of the checkpoint that validation chose; they are read by nobody but the comparison."""
        e, best, found = self.settings.evaluate, self.best["step"], last
        if best != self.step:
            try:
                loaded = checkpoint.at_step(self.folder / "checkpoints", best)
            except ValueError as gone:  # no reason to lose a run that has reached its end
                self.say(f"the best checkpoint is not tested: {gone}")
                return
            with checkpoint.lent(loaded, self.parts.student):
                found = self.examine(self.parts.data.test[: e.test_problems], e.test_samples)
            report.tables["evaluations"].extend(_records(found, "test", best))
        report.scalars |= found.scalars("eval/test_best") | {"eval/test_best/step": float(best)}

    def examine(self, examples: list[Example], samples: int) -> Evaluation:
        e, o, p = self.settings.evaluate, self.settings.optim, self.parts
        return evaluate(
            p.student,
            p.measuring,
            TorchEngine(e.max_tokens, self.settings.rollout.decode_rows),
            examples,
            p.data.grade,
            samples=samples,
            behavior=Behavior(e.temperature, e.top_p, suppressed=tuple(self.settings.rollout.suppressed)),
            seed=e.seed,
            chunk=o.chunk_tokens,
            micro_batch=o.micro_batch,
        )

    # memory -----------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """A complete checkpoint, or none."""
        c = self.settings.checkpoint
        self.tracker.flush()
        path = checkpoint.save(
            self.folder / "checkpoints",
            self.step,
            student=self.parts.student,
            optimizer=self.optimizer,
            method_state=self.state,
            generators={"rollout": self.generator},
            stream=self.stream.state_dict(),
            extra={
                "totals": self.totals,
                "best": self.best,
                "accuracy": self.accuracy,
                "watch": self.watch.state_dict(),
            },
        )
        best = self.best["step"] if c.keep_best else None
        checkpoint.prune(self.folder / "checkpoints", c.keep_last, best)
        return path

    def resume(self) -> None:
        """Go on from the newest complete checkpoint of the run folder, if there is one."""
        loaded = checkpoint.latest(self.folder / "checkpoints")
        if loaded is None:
            return
        for note in loaded.notes:
            self.say(note)
        found = checkpoint.restore(
            loaded, student=self.parts.student, optimizer=self.optimizer, generators={"rollout": self.generator}
        )
        self.step, self.state = found.step, found.method_state
        self.stream.load_state_dict(found.stream)
        self.watch.load_state_dict(found.extra["watch"])
        self.totals, self.best, self.accuracy = found.extra["totals"], found.extra["best"], found.extra["accuracy"]
        self.say(f"resumed after step {self.step} from {loaded.path}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _records(found: Evaluation, split: str, step: int) -> list[dict[str, Any]]:
    """Correct counts per problem: what intervals are made of."""
    return [
        {"step": step, "set": split, "problem": problem, "n": found.n, "correct": c}
        for problem, c in zip(found.ids, found.c)
    ]
