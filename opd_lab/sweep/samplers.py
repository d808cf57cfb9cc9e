"""Optuna's samplers and pruners by name, made so that a sweep which was killed draws what it would have drawn.

Optuna's samplers keep a random state that no storage holds. Here every draw comes from a sampler made anew from
(seed, trial number, key), so it is a pure function of those and of the trials before; a trial that was killed between
two of its keys goes on with the same ones.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna import pruners, samplers
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from opd_lab.sweep.settings import SweepSettings
from opd_lab.sweep.space import Params, Space

RETRY_OF = "retry_of"  # user attribute of a trial that repeats the params of a failed one


class Reseeded(samplers.BaseSampler):
    """A sampler without memory: `make(seed)` is called for every draw."""

    def __init__(self, make: Callable[[int], samplers.BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed

    def _of(self, trial: FrozenTrial, key: str) -> samplers.BaseSampler:
        digest = hashlib.sha256(f"{self._seed} {trial.number} {key}".encode()).digest()
        return self._make(int.from_bytes(digest[:4], "big"))

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._of(trial, "").infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(trial, "").sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._of(trial, param_name).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._of(trial, "").before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._of(trial, "").after_trial(study, trial, state, values)


class Grid(samplers.BaseSampler):
    """Every point once, in the order of the file. Optuna's own grid knows no conditional keys and draws its order."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._points = {tuple(space.overrides(point)): point for point in space.points()}

    def point(self, study: optuna.Study, number: int) -> Params:
        """The first point that no earlier trial has, retries left out."""
        before = [t for t in study.get_trials(deepcopy=False) if t.number < number and RETRY_OF not in t.user_attrs]
        taken = {tuple(self._space.overrides(t.params)) for t in before}
        return next(point for words, point in self._points.items() if words not in taken)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.point(study, trial.number)[param_name]


class _QMC(samplers.QMCSampler):
    """The point of a low-discrepancy sequence is the trial's number, instead of a counter that a kill can skip."""

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._number = trial.number
        return super().sample_relative(study, trial, search_space)

    def _find_sample_id(self, study: optuna.Study, search_space: dict[str, BaseDistribution]) -> int:
        return self._number


class _GP(samplers.GPSampler):
    """Of the trials that go on, those before this one count. Optuna notes what it drew before the trial has it: one
    that was killed in between would count itself, and be drawn away from itself."""

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._number = trial.number
        return super().sample_relative(study, trial, search_space)

    def _sample_relative_impl(
        self,
        study: optuna.Study,
        completed_trials: list[FrozenTrial],
        running_trials: list[FrozenTrial],
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        before = [trial for trial in running_trials if trial.number < self._number]
        return super()._sample_relative_impl(study, completed_trials, before, search_space)


class Halving(pruners.BasePruner):
    """Successive halving: one bracket, whose first rung is the first evaluation. Hyperband, if `steps` are given: as
    many brackets as fit, each with a first rung `factor` times as late as the one before.

    What it decides is what Optuna's own pruners decide, but from reported values alone. Optuna's note in the study that
    a rung was passed, before the verdict is kept: a trial judged again after a kill would pass. And Optuna's Hyperband
    shows a sampler the trials of one bracket only, among which a grid would look for the points it has had."""

    def __init__(self, every: int, factor: int, steps: int | None = None) -> None:
        """`every`: steps between evaluations; of `factor` trials at a rung one goes on; `steps`: of a whole trial."""
        self._every, self._factor, self._brackets = every, factor, 1
        while steps is not None and every * factor**self._brackets <= steps:
            self._brackets += 1

    def bracket(self, study: str, number: int) -> int:
        """Of a trial: earlier brackets have more trials, so that all cost about the same."""
        n = self._brackets
        room = [math.ceil(n * self._factor**left / (left + 1)) for left in reversed(range(n))]
        place = zlib.crc32(f"{study}_{number}".encode()) % sum(room)
        return next(bracket for bracket in range(n) if place < sum(room[: bracket + 1]))

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        mine = self.bracket(study.study_name, trial.number)
        *before, now = sorted(trial.intermediate_values)
        rung = self._every * self._factor**mine
        while rung * self._factor <= now:
            rung *= self._factor
        if not max(before, default=0) < rung <= now:
            return False
        rivals = (t for t in study.get_trials(deepcopy=False) if self.bracket(study.study_name, t.number) == mine)
        reached = sorted(value for t in rivals if (value := _value_at(t, rung)) is not None)
        keep = max(1, len(reached) // self._factor)
        value = trial.intermediate_values[now]
        if study.direction == optuna.study.StudyDirection.MAXIMIZE:
            return value < reached[-keep]
        return value > reached[keep - 1]


def _value_at(trial: FrozenTrial, step: int) -> float | None:
    """The first value reported at this step or later."""
    return next((value for at, value in sorted(trial.intermediate_values.items()) if at >= step), None)


def make_sampler(s: SweepSettings, space: Space) -> samplers.BaseSampler:
    if s.sampler in (None, "grid"):
        return Grid(space)
    first = s.startup_trials
    make: dict[str, Callable[[int], samplers.BaseSampler]] = {
        "random": lambda seed: samplers.RandomSampler(seed=seed),
        "tpe": lambda seed: samplers.TPESampler(seed=seed, n_startup_trials=first),
        "gp": lambda seed: _GP(seed=seed, n_startup_trials=first),
        "cmaes": lambda seed: samplers.CmaEsSampler(seed=seed, n_startup_trials=first, warn_independent_sampling=False),
        "nsgaii": lambda seed: samplers.NSGAIISampler(seed=seed, population_size=s.population),
        "qmc": lambda seed: _QMC(
            seed=s.seed,
            scramble=True,
            independent_sampler=samplers.RandomSampler(seed=seed),
            warn_independent_sampling=False,
        ),
    }
    return Reseeded(make[s.sampler], s.seed)


def make_pruner(s: SweepSettings, *, every: int, steps: int) -> pruners.BasePruner:
    """`every`: steps between evaluations; `steps`: of a whole trial, all seeds."""
    p = s.pruning
    median = pruners.MedianPruner(n_startup_trials=p.startup_trials, n_warmup_steps=p.warmup_steps)
    if s.pruner is None:
        return pruners.NopPruner()
    if s.pruner == "median":
        return median
    if s.pruner == "patient":
        return pruners.PatientPruner(median, patience=p.patience - 1)  # Optuna waits for one more than it says
    if s.pruner == "hyperband":
        return Halving(every, p.reduction_factor, steps)
    if s.pruner == "successive_halving":
        return Halving(every, p.reduction_factor)
    return pruners.WilcoxonPruner(p_threshold=p.p_threshold, n_startup_steps=p.startup_trials)
