"""What should be heard before a run collapses, read off the numbers that every run reports anyway.

    gradient_not_finite   the objective or its gradient is no number (the trainer raises it: nothing was updated)
    gradient_explodes     its norm is many times that of the first steps, and the norm at which it is clipped
    length_inflation      rollouts, in training or at an evaluation, are much longer than at first
    length_collapse       ... much shorter
    repetition            4-grams come again in their rollout
    mass_outside_top16    the student says what is not among the teacher's 16 likeliest tokens
    entropy_collapse      the student is far surer than at first, and than the teacher is on the same tokens
    zero_weight           tokens have no weight: the step teaches nothing
    agreement_trap        accuracy has fallen from its best, while the held-out KL has not risen: the teacher agrees
    below_start           an evaluation below the initial student's
    accuracy_drop         validation accuracy is below its best so far, by more than chance does over so many problems

"At first" is the mean over the first steps, or the evaluation before the first step. What is looked at in every step
begins after so many steps in a row (`patience`) and ends after as many without; what evaluations say, and the mass,
which is measured with the tables, begins and ends at once. An alarm is raised where it begins. Rollouts that a stop
rule cut are as long as the method wants: there only the evaluations judge the length.

A drop is the mean over the validation problems of what each has lost since the best evaluation, which met the same
problems and uniforms; chance is the standard error of that mean. The best of many evaluations owes something to luck,
so it takes four of them: of students that have ceased to learn, few raise the alarm in 20 evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

from opd_lab.settings import AlarmSettings
from opd_lab.types import Report

GRADIENT, LENGTH, ENTROPY = "optim/gradient_norm", "rollout/length_mean_tokens", "entropy/student_mean_nats"
OUTSIDE_TOP16 = "overlap/outside_top16_fraction"
EVALUATED_LENGTH, EVALUATED_KL = "eval/validation/length_mean_tokens", "eval/validation/reverse_kl_mean_nats"


class AlarmError(ValueError):
    """An alarm that `diagnostics.on_alarm=stop` lets end the run."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """A row of the table `alarms`."""

    step: int
    alarm: str
    value: float
    threshold: float
    message: str

    def __str__(self) -> str:
        return f"alarm {self.alarm} at step {self.step}: {self.message}"


class _Reading(NamedTuple):
    """One condition, as it stands after a report."""

    alarm: str
    wrong: bool
    value: float
    threshold: float
    said: str  # what `value` is a number of
    evaluated: bool = False  # or as seldom: one reading is enough


class Alarms:
    """Fed with every report in order. `accuracy` is the name of the metric that evaluations report, `clip_norm` the
    gradient norm above which the run clips, 0 where it does not."""

    def __init__(self, settings: AlarmSettings, accuracy: str, clip_norm: float) -> None:
        self._settings, self._accuracy, self._clip_norm = settings, accuracy, clip_norm
        self._first: dict[str, list[float]] = {}  # of a metric: sum and number of the first values
        self._start: dict[str, float] = {}  # the evaluation before the first step
        self._best: list[float] = []  # accuracy of the best evaluation, and its KL
        self._peak: dict[str, float] = {}  # the best evaluation: validation problem -> share of correct rollouts
        self._on: dict[str, bool] = {}
        self._streak: dict[str, int] = {}  # reports in a row that speak against what `_on` says

    def check(self, report: Report) -> list[Alarm]:
        """The alarms that begin with this report."""
        begun = []
        for reading in self._readings(report):
            turning = reading.wrong != self._on.get(reading.alarm, False)
            streak = self._streak.get(reading.alarm, 0) + 1 if turning else 0
            turned = streak >= (1 if reading.evaluated else self._settings.patience)
            self._streak[reading.alarm] = 0 if turned else streak
            if turned:
                self._on[reading.alarm] = reading.wrong
                if reading.wrong:
                    said = f"{reading.said} {reading.value:.4g}, threshold {reading.threshold:.4g}"
                    name = reading.alarm.removesuffix("/evaluated")
                    begun.append(Alarm(report.step, name, reading.value, reading.threshold, said))
        return begun

    def _readings(self, report: Report) -> Iterator[_Reading]:
        yield from self._of_the_step(report.scalars)
        yield from self._of_the_evaluation(report.scalars)
        validation = [row for row in report.tables.get("evaluations", []) if row["set"] == "validation"]
        yield from self._of_the_problems({row["problem"]: row["correct"] / row["n"] for row in validation})

    def _of_the_step(self, seen: Mapping[str, float]) -> Iterator[_Reading]:
        s = self._settings
        if first := self._against_first(seen, GRADIENT):
            yield _above(
                "gradient_explodes", seen[GRADIENT], s.gradient_ratio * max(first, self._clip_norm), "gradient norm"
            )
        if "rollout/cut_fraction" not in seen and (first := self._against_first(seen, LENGTH)):
            yield _above("length_inflation", seen[LENGTH], s.inflation_ratio * first, "tokens per rollout")
            yield _below("length_collapse", seen[LENGTH], s.collapse_ratio * first, "tokens per rollout")
        if first := self._against_first(seen, ENTROPY):
            limit = s.entropy_ratio * min(first, seen.get("entropy/teacher_mean_nats", first))
            yield _below("entropy_collapse", seen[ENTROPY], limit, "student's entropy in nats")
        for alarm, metric, limit, said in (
            ("repetition", "rollout/repetition_fraction", s.repetition_fraction, "share of repeated 4-grams"),
            ("zero_weight", "weight/zero_fraction", s.zero_weight_fraction, "share of tokens without weight"),
        ):
            if metric in seen:
                yield _Reading(alarm, seen[metric] >= limit, seen[metric], limit, said)
        if OUTSIDE_TOP16 in seen:
            said, value = "student's mass outside the teacher's top 16", seen[OUTSIDE_TOP16]
            yield _Reading("mass_outside_top16", value >= s.outside_fraction, value, s.outside_fraction, said, True)

    def _of_the_evaluation(self, seen: Mapping[str, float]) -> Iterator[_Reading]:
        s = self._settings
        if EVALUATED_LENGTH in seen:
            first, now = self._start.setdefault(EVALUATED_LENGTH, seen[EVALUATED_LENGTH]), seen[EVALUATED_LENGTH]
            said = "tokens per validation rollout"
            yield _above("length_inflation/evaluated", now, s.inflation_ratio * first, said, evaluated=True)
            yield _below("length_collapse/evaluated", now, s.collapse_ratio * first, said, evaluated=True)
        if self._accuracy not in seen:
            return
        now, kl = seen[self._accuracy], seen.get(EVALUATED_KL)
        limit = self._start.setdefault(self._accuracy, now) - s.below_start_fraction
        yield _below("below_start", now, limit, "validation accuracy", evaluated=True)
        if kl is None:
            return
        best, kl_then = self._best or [now, kl]
        limit = best - s.trap_fraction
        said = f"with a held-out KL of {kl:.4g} nats ({kl_then:.4g} at the best) validation accuracy"
        yield _Reading("agreement_trap", now < limit and kl <= kl_then, now, limit, said, evaluated=True)
        if not self._best or now > best:
            self._best = [now, kl]

    def _of_the_problems(self, now: Mapping[str, float]) -> Iterator[_Reading]:
        lost = [best - now[problem] for problem, best in self._peak.items() if problem in now]
        if len(lost) > 1:
            error = stdev(lost) / math.sqrt(len(lost))
            best = fmean(self._peak[problem] for problem in self._peak if problem in now)
            value, chance = best - fmean(lost), self._settings.drop_errors * error
            limit = best - max(self._settings.drop_fraction, chance)
            said = f"after {best:.4g} at its best, over {len(lost)} problems, standard error of the drop {error:.2g}"
            yield _below("accuracy_drop", value, limit, f"{said}, validation accuracy", evaluated=True)
        if now and (not self._peak or fmean(now.values()) > fmean(self._peak.values())):
            self._peak = dict(now)

    def _against_first(self, seen: Mapping[str, float], metric: str) -> float | None:
        """The mean over the first steps, once they are over; until then this value is added to it."""
        if metric not in seen:
            return None
        total, count = self._first.setdefault(metric, [0.0, 0])
        if count < self._settings.first_steps:
            self._first[metric] = [total + seen[metric], count + 1]
            return None
        return total / count

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, f"_{name}") for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _STATE:
            if name in state:  # the checkpoint of a run from before an alarm knows nothing of it: that one starts anew
                setattr(self, f"_{name}", state[name])


_STATE = ("first", "start", "best", "peak", "on", "streak")


def _above(alarm: str, value: float, limit: float, said: str, *, evaluated: bool = False) -> _Reading:
    return _Reading(alarm, value > limit, value, limit, said, evaluated)


def _below(alarm: str, value: float, limit: float, said: str, *, evaluated: bool = False) -> _Reading:
    return _Reading(alarm, value < limit, value, limit, said, evaluated)


def diverged(step: int, error: Exception) -> Alarm:
    """What the trainer raises where a gradient is no number."""
    return Alarm(step, "gradient_not_finite", math.nan, math.inf, str(error))


def rows(alarms: Sequence[Alarm]) -> list[dict[str, Any]]:
    """As rows of a table."""
    return [asdict(alarm) for alarm in alarms]
