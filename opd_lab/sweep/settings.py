"""The settings of a sweep, typed. `conf/sweep/` and `conf/launcher/` hold the defaults and their units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PruningSettings:
    startup_trials: int
    warmup_steps: int
    reduction_factor: int
    patience: int
    p_threshold: float


@dataclass(frozen=True, kw_only=True)
class ConfirmSettings:
    top: int | None
    seeds: int
    name: str | None


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    name: str | None
    question: str | None
    cost: str | None
    space: dict[str, Any]
    points: dict[str, Any] | None
    fixed: dict[str, Any]
    seeds: list[int] | None
    objective: dict[str, Any] | None
    condition: str
    sampler: str | None
    trials: int | None
    startup_trials: int
    population: int
    seed: int
    pruner: str | None
    pruning: PruningSettings
    storage: str | None
    time_limit_seconds: float | None
    retries: int
    max_failures: int | None
    fail_fast: bool
    extend: bool
    dry_run: bool
    confirm: ConfirmSettings


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    kind: str
    slots: int | str  # a number, or auto
    gpus: list[int] | str | None
    trials_per_gpu: int
    threads: int
    memory_limit_gib: float | None
    start_seconds: float
    poll_seconds: float
    grace_seconds: float


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    kind: str
    address: str | None
    slots: int | str  # a number, or auto
    cpus: int
    gpus: float
    memory_gib: float | None
    resources: dict[str, float]
    runtime_env: dict[str, Any]
    object_store_mib: int
    poll_seconds: float
    grace_seconds: float


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    kind: str
    cluster: str
    slots: int
    partition: str | None
    minutes: int
    timeouts: int
    signal_seconds: int
    cpus: int
    gpus: int
    mem_gb: float | None
    setup: list[str]
    additional: dict[str, Any]
    lost_seconds: float
    poll_seconds: float
    grace_seconds: float


SAMPLERS = ("grid", "random", "tpe", "gp", "cmaes", "nsgaii", "qmc")
PRUNERS = ("median", "hyperband", "successive_halving", "patient", "wilcoxon")


def check(s: SweepSettings) -> None:
    """Refuse what no sweep can have.

    Raises:
        ValueError: what, got, allowed.
    """
    for name, value, allowed in (
        ("sampler", s.sampler, (None, *SAMPLERS)),
        ("pruner", s.pruner, (None, *PRUNERS)),
        *(
            (f"objective.{metric}", direction, ("maximize", "minimize"))
            for metric, direction in (s.objective or {}).items()
        ),
    ):
        if value not in allowed:
            names = ", ".join("null" if one is None else one for one in allowed)
            raise ValueError(f"sweep.{name} must be one of {names}, got {value}")
    for name, value, low in (
        ("trials", s.trials, 1),
        ("startup_trials", s.startup_trials, 0),
        ("population", s.population, 2),
        ("retries", s.retries, 0),
        ("max_failures", s.max_failures, 0),
        ("time_limit_seconds", s.time_limit_seconds, 0),
        ("pruning.startup_trials", s.pruning.startup_trials, 0),
        ("pruning.warmup_steps", s.pruning.warmup_steps, 0),
        ("pruning.reduction_factor", s.pruning.reduction_factor, 2),
        ("pruning.patience", s.pruning.patience, 1),
        ("confirm.top", s.confirm.top, 1),
        ("confirm.seeds", s.confirm.seeds, 1),
    ):
        if value is not None and value < low:
            raise ValueError(f"sweep.{name} must be >= {low}, got {value}")
    if s.points is not None:
        _check_points(s)
    if s.seeds is not None and (not s.seeds or len(set(s.seeds)) < len(s.seeds)):
        raise ValueError(f"sweep.seeds must be null or a list of different seeds, got {s.seeds}")
    if s.pruner and s.objective and len(s.objective) > 1:
        raise ValueError(
            f"sweep.pruner must be null for several objectives, got {s.pruner} with {', '.join(s.objective)}: "
            "which of two trials is better in the middle is not defined; choose one objective"
        )


def _check_points(s: SweepSettings) -> None:
    points = s.points or {}
    sets = [values for values in points.values() if isinstance(values, dict)]
    if not points or len(sets) < len(points):
        raise ValueError(f"sweep.points must be {{name: {{key: value, ...}}, ...}}, at least one, got {s.points}")
    if s.space:
        raise ValueError(
            f"sweep.points and sweep.space exclude one another, got {', '.join(map(str, points))} "
            f"and {', '.join(s.space)}; a point is a set of single values"
        )
    if s.sampler not in (None, "grid"):
        raise ValueError(f"sweep.sampler must be null with sweep.points, which are all run, got {s.sampler}")
    if s.confirm.top:
        raise ValueError("sweep.confirm.top must be null with sweep.points, where nothing was searched for")
