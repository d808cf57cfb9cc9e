"""The loop. It reads like Algorithm 1 of any OPD paper, and knows no method by name.

prompts -> rollouts -> reward -> teacher -> batch -> weights -> gradient -> update -> report
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_lab import checkpoint
from opd_lab.data.prompts import Dataset, Example, PromptStream
from opd_lab.diagnostics import RECORD, observe
from opd_lab.diagnostics.high_loss import HighLoss
from opd_lab.diagnostics.histograms import count
from opd_lab.evaluate import Evaluation, evaluate
from opd_lab.methods.base import Method
from opd_lab.models import LM
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.settings import OptimSettings, RunSettings
from opd_lab.signals import teacher_must
from opd_lab.step import Gradient, Scorer, accumulate_gradient, whole_batch
from opd_lab.tracking.tracker import Tracker
from opd_lab.types import LOGP_OLD, Batch, Behavior, Facts, Report, Rollouts, State


@dataclass(frozen=True, slots=True)
class Parts:
    """What a run is made of."""

    student: LM
    teacher: Scorer
    engine: TorchEngine
    data: Dataset
    method: Method


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


class DivergedError(RuntimeError):
    """The objective or its gradient is no longer a number."""


def plain_behavior(settings: RunSettings) -> Behavior:
    r = settings.rollout
    return Behavior(r.temperature, r.top_p, r.top_k, tuple(r.suppressed))


def facts_of(settings: RunSettings, parts: Parts) -> Facts:
    return Facts(
        steps=settings.steps,
        behavior=plain_behavior(settings),
        max_tokens=settings.rollout.max_tokens,
        per_prompt=settings.rollout.per_prompt,
        updates_per_rollout=settings.optim.updates_per_rollout,
        vocabulary=parts.student.vocabulary,
        graded=parts.data.grade is not None,
        data=settings.data.name,
        teacher=parts.teacher.name,
        engine=parts.engine.name,
    )


def learning_rate(optim: OptimSettings, step: int, steps: int) -> float:
    """The rate of a step, a pure function, so that a resumed run needs no scheduler's memory."""
    warm = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    left = 1 - max(0, step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    fall = {"constant": 1.0, "linear": left, "cosine": (1 + math.cos(math.pi * (1 - left))) / 2}[optim.schedule]
    return optim.lr * warm * fall


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
        say: Callable[[str], None] = print,
    ) -> None:
        self.settings, self.parts, self.tracker, self.folder = settings, parts, tracker, folder
        self.on_step, self.say = on_step, say
        o = settings.optim
        parts.student.module.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            parts.student.module.parameters(), o.lr, (o.betas[0], o.betas[1]), o.eps, o.weight_decay
        )
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.stream = PromptStream(parts.data.train, settings.seed)
        self.high_loss = HighLoss(parts.student.vocabulary, settings.diagnostics)
        self.state: State = parts.method.init_state()
        self.step = 0  # steps done
        self.totals = {"generated_tokens": 0, "teacher_scored_tokens": 0, "skipped_steps": 0, "seconds": 0.0}
        self.best: dict[str, Any] = {"step": None, "accuracy": -math.inf}
        self.accuracy = math.nan
        self.record = frozenset(s for s in RECORD if teacher_must(frozenset({s})) <= parts.teacher.provides)
        self.clock: dict[str, float] = {}

    # one step ---------------------------------------------------------------------------------------------------

    def collect(self) -> tuple[Batch, list[Any]]:
        """Prompts -> rollouts -> rewards -> what teacher and student say of them."""
        s, p = self.settings, self.parts
        examples = [e for e in self.stream.take(s.rollout.prompts) for _ in range(s.rollout.per_prompt)]
        rows = torch.arange(len(examples))
        with self.timed("rollout"):
            rollouts = p.engine.sample(
                p.student,
                [e.ids for e in examples],
                behavior=p.method.behavior(plain_behavior(s), self.step, self.state),
                group_B=rows // s.rollout.per_prompt,
                uid_B=rows + self.step * len(examples),
                generator=self.generator,
            )
            rollouts = self.graded(rollouts, examples)
        with self.timed("teacher"):
            o = s.optim
            return whole_batch(
                p.method,
                rollouts,
                p.student.states,
                p.teacher,
                state=self.state,
                step=self.step,
                seed=s.seed,
                micro_batch=o.micro_batch,
                chunk=o.chunk_tokens,
            )

    def graded(self, rollouts: Rollouts, examples: list[Example]) -> Rollouts:
        """The rollouts with their rewards, where the data have answers."""
        grade = self.parts.data.grade
        if grade is None:
            return rollouts
        texts = self.decode_all(rollouts)
        rewards = [grade(text, e.answer) if e.answer is not None else math.nan for text, e in zip(texts, examples)]
        return replace(rollouts, reward_B=torch.tensor(rewards, device=rollouts.reward_B.device))

    def decode_all(self, rollouts: Rollouts) -> list[str]:
        ids = [row[mask].tolist() for row, mask in zip(rollouts.response_BT, rollouts.mask_BT)]
        return self.parts.student.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def learn(self, batch: Batch, views: list[Any]) -> tuple[Gradient, dict[str, Tensor], dict[str, float]]:
        """The updates on one batch. The gradient returned is the first update's: what the diagnostics look at."""
        s, p = self.settings, self.parts
        weights = p.method.weights(batch)
        first, scalars = None, {}
        for _ in range(s.optim.updates_per_rollout):
            self.optimizer.zero_grad(set_to_none=True)
            gradient = accumulate_gradient(
                p.method,
                batch,
                weights,
                p.student.states,
                views,
                micro_batch=s.optim.micro_batch,
                chunk=s.optim.chunk_tokens,
                record=self.record if first is None else frozenset(),
                old=None if first is None else {LOGP_OLD: first.signals[LOGP_OLD]},
            )
            norm = self.apply(gradient, batch)
            if first is None:
                first, scalars = gradient, {"optim/gradient_norm": norm}
        assert first is not None
        return first, weights, scalars

    def apply(self, gradient: Gradient, batch: Batch) -> float:
        """One optimizer step, or none where nothing has weight.

        Raises:
            DivergedError: the objective or the gradient is not finite; the message names the rollout.
        """
        s = self.settings
        parameters = [q for q in self.parts.student.module.parameters() if q.grad is not None]
        norm = float(torch.nn.utils.get_total_norm([q.grad for q in parameters if q.grad is not None]))
        if not (math.isfinite(norm) and math.isfinite(gradient.objective)):
            raise DivergedError(_where(gradient, batch, norm))
        if norm == 0.0:
            self.totals["skipped_steps"] += 1
            return norm
        if s.optim.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, s.optim.clip_norm, torch.tensor(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(s.optim, self.step, s.steps)
        self.optimizer.step()
        return norm

    def advance(self) -> Report:
        """One step of Algorithm 1, and its report."""
        self.clock = {}
        begin = time.perf_counter()
        batch, views = self.collect()
        with self.timed("update"):
            gradient, weights, scalars = self.learn(batch, views)
        seen = replace(batch, signals=dict(gradient.signals) | {k: batch[k] for k in self.parts.method.needs().batch})
        self.state = self.parts.method.update(self.state, batch)
        with self.timed("diagnostics"):
            report = observe(
                seen, weights, self.high_loss, self.settings.diagnostics, decode=self.parts.student.tokenizer.decode
            )
            add_own(report, self.parts.method.metrics(seen, weights))
        tokens = int(batch.rollouts.length_B.sum())
        self.totals["generated_tokens"] += tokens
        self.totals["teacher_scored_tokens"] += tokens if views and len(views[0]) else 0
        seconds = time.perf_counter() - begin
        self.totals["seconds"] += seconds
        report.scalars |= scalars | {f"loss/{term}_value": value for term, value in gradient.values.items()}
        report.scalars |= {
            "loss/total_value": gradient.objective,
            "optim/learning_rate": learning_rate(self.settings.optim, self.step, self.settings.steps),
            "optim/skipped_steps": float(self.totals["skipped_steps"]),
            "cost/generated_tokens": float(self.totals["generated_tokens"]),
            "cost/teacher_scored_tokens": float(self.totals["teacher_scored_tokens"]),
            "time/step_seconds": seconds,
            "time/tokens_per_second": tokens / seconds,
        }
        report.scalars |= {f"time/{name}_seconds": value for name, value in self.clock.items()}
        self.step += 1
        return report

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.clock[name] = self.clock.get(name, 0.0) + time.perf_counter() - begin

    # the run ----------------------------------------------------------------------------------------------------

    def run(self) -> Report:
        """All steps that are left, with evaluations and checkpoints; the last report holds the test scores."""
        s = self.settings
        if self.step == 0:
            self.deliver(self.examined(Report(step=0), test=True))
        report = Report(step=self.step)
        while self.step < s.steps:
            report = self.advance()
            last = self.step == s.steps
            if last or (s.evaluate.every and self.step % s.evaluate.every == 0):
                report = self.examined(report, test=last)
            self.deliver(report)
            if last or (s.checkpoint.every and self.step % s.checkpoint.every == 0):
                self.save()
        return report

    def deliver(self, report: Report) -> None:
        self.tracker.log(report)
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
        report.scalars |= found.scalars("validation")
        report.tables.setdefault("evaluations", []).extend(found.records("validation", self.step))
        key = f"eval/validation/avg_at_{e.samples}"
        self.accuracy = report.scalars.get(key, math.nan)
        if self.accuracy > self.best["accuracy"]:
            self.best = {"step": self.step, "accuracy": self.accuracy}
        if test:
            found = self.examine(self.parts.data.test[: e.test_problems], e.test_samples)
            report.scalars |= found.scalars("test")
            report.tables["evaluations"].extend(found.records("test", self.step))
        report.scalars["time/evaluation_seconds"] = time.perf_counter() - begin
        return report

    def examine(self, examples: list[Example], samples: int) -> Evaluation:
        e, o, p = self.settings.evaluate, self.settings.optim, self.parts
        return evaluate(
            p.student,
            p.teacher if "full" in p.teacher.provides else None,
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
                "high_loss": self.high_loss.state_dict(),
            },
        )
        best = self.best["step"] if c.keep_best else None
        checkpoint.prune(self.folder / "checkpoints", c.keep_last, best)
        return path

    def resume(self) -> None:
        """Go on from the newest complete checkpoint of the run folder, if there is one."""
        loaded, notes = checkpoint.latest(self.folder / "checkpoints")
        for note in notes:
            self.say(note)
        if loaded is None:
            return
        extra = checkpoint.restore(
            loaded,
            student=self.parts.student,
            optimizer=self.optimizer,
            generators={"rollout": self.generator},
        )
        self.step, self.state = loaded.step, loaded.method_state
        self.stream.load_state_dict(loaded.stream)
        self.high_loss.load_state_dict(extra["high_loss"])
        self.totals, self.best, self.accuracy = extra["totals"], extra["best"], extra["accuracy"]
        self.say(f"resumed after step {self.step} from {loaded.path}")


def add_own(report: Report, own: Mapping[str, float | Tensor]) -> None:
    """The method's own metrics: numbers are scalars, 1-D tensors become histograms."""
    for name, value in own.items():
        if isinstance(value, Tensor) and value.dim() == 1:
            report.histograms[name] = count(value, "value")
        else:
            report.scalars[name] = float(value)


def _where(gradient: Gradient, batch: Batch, norm: float) -> str:
    """Which rollout made the gradient something else than a number."""
    bad_B = torch.zeros(len(batch.rollouts), dtype=torch.bool)
    for loss_BT in gradient.losses.values():
        bad_B |= loss_BT.isinf().any(1).cpu()
    uids = batch.rollouts.uid_B[bad_B.to(batch.rollouts.uid_B.device)].tolist()
    return (
        f"step {batch.step}: objective {gradient.objective}, gradient norm {norm}: not finite"
        f"{f'; rollouts {uids[:5]} have an infinite loss' if uids else ''}; nothing was updated, the run stops. "
        f"Try a lower optim.lr, or look at the rollouts above in the run folder."
    )
