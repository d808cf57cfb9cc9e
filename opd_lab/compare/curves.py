"""A metric over what was spent, per method: the mean over seeds with its interval. Whoever draws curves asks here."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from opd_lab.compare import statistics
from opd_lab.compare.budget import along, metrics_of
from opd_lab.compare.groups import groups
from opd_lab.compare.guard import same_axis
from opd_lab.compare.scores import pass_at_k
from opd_lab.tracking import read

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = ("method", "step", "x", "mean", "low", "high", "lowest", "highest", "seeds", "speaks_of")
OF_PROBLEMS = re.compile(r"eval/(validation|test)/(avg|pass)_at_(\d+)$")  # means over what runs kept of each problem


class Door(Protocol):
    """Where runs are read: `tracking.read`, or what remembers what it has read."""

    def metrics(self, where: Path, /, names: Collection[str]) -> DataFrame: ...
    def evaluations(self, where: Path, /) -> DataFrame: ...


def curves(runs: read.Runs, metric: str, x: str = "steps") -> DataFrame:
    """One row per method and step at which the metric was logged, running and stopped runs included.

    Columns:
        method    the label of the group, as in `table`
        step      steps done
        x         what had been spent by then, the mean over seeds: steps | student_tokens | teacher_tokens | seconds
                  (of training steps) | flops; `budget.along` says how each is counted, `budget.UNITS` in which unit
        mean      over the seeds that have come this far
        low, high the 95 % interval of that mean; NaN where there is none
        lowest, highest   over these seeds
        seeds     how many they are
        speaks_of what the interval speaks of. Accuracy and pass@k have the one of `table`: "problems and seeds", or
                  with one seed "problems". Any other number has a t interval over "seeds", and with one seed "nothing".

    Raises:
        ValueError: an unknown x, or one the runs did not log; a metric nobody logged; losses with unlike conventions.
    """
    import pandas as pd

    same_axis(runs, metric)
    found = groups(runs)
    frames: list[Any] = [
        frame.assign(method=group.label) for group in found if len(frame := curve(group.folders, metric, x))
    ]
    if not frames:
        raise ValueError(f"{metric} was logged by none of the runs of {', '.join(group.label for group in found)}")
    return pd.concat(frames, ignore_index=True).reindex(columns=[*COLUMNS])


def curve(folders: Sequence[Path], metric: str, x: str = "steps", door: Door = read) -> DataFrame:
    """The rows of `curves` of one method, whose seeds are in these folders; empty where none logged the metric."""
    import pandas as pd

    seeds: dict[Path, Any] = {}
    for folder in folders:
        logged: Any = door.metrics(folder, names={metric} | metrics_of(x))
        mine = logged[logged["name"] == metric].dropna() if len(logged) else logged
        if len(mine):
            value = mine.drop_duplicates("step", keep="last").set_index("step")["value"].sort_index()
            seeds[folder] = value, along(x, logged, folder).reindex(value.index)
    if not seeds:
        return pd.DataFrame()
    step_N = np.unique(np.concatenate([value.index for value, _ in seeds.values()]))
    value_SN, x_SN = np.full((2, len(seeds), len(step_N)), np.nan)
    for s, (value, spent) in enumerate(seeds.values()):
        at_N = np.searchsorted(step_N, value.index)
        value_SN[s, at_N], x_SN[s, at_N] = value, spent
    found = statistics.over_seeds(value_SN)
    least, most = bounds(metric)
    low_N, high_N = (np.clip(end_N, least, most) for end_N in found.interval())
    out = {"step": step_N, "x": np.nanmean(x_SN, 0), "mean": found.value, "low": low_N, "high": high_N}
    out |= {"lowest": np.nanmin(value_SN, 0), "highest": np.nanmax(value_SN, 0), "seeds": (~np.isnan(value_SN)).sum(0)}
    out["speaks_of"] = np.where(np.isnan(low_N), "nothing", found.speaks_of)
    rows = pd.DataFrame(out)
    if kind := OF_PROBLEMS.match(metric):
        k = int(kind[3]) if kind[2] == "pass" else 1
        _over_problems(rows, kind[1], k, pd.concat([door.evaluations(folder) for folder in seeds]))
    return rows


def bounds(metric: str) -> tuple[float, float]:
    """Between what a number lies, by its name; an interval is cut there."""
    if "cosine" in metric:
        return -1.0, 1.0
    if metric.endswith("_fraction") or "_at_" in metric:
        return 0.0, 1.0
    return (0.0 if metric.startswith(("kl/", "probe/", "entropy/")) else -np.inf), np.inf


def _over_problems(rows: Any, split: str, k: int, evaluations: Any) -> None:
    """Put the interval of `table` in place, at each step at which all seeds that are there kept their problems."""
    import pandas as pd

    if "set" not in evaluations:
        return
    mine = evaluations[(evaluations["set"] == split) & evaluations["step"].isin(rows["step"])]
    (at_M, steps), (seed_M, seeds), (problem_M, problems) = (
        pd.factorize(mine[name].to_numpy()) for name in ("step", "folder", "problem")
    )
    shape = len(steps), len(seeds), len(problems)
    cell_M = np.ravel_multi_index((at_M, seed_M, problem_M), shape)
    total, count = (
        np.bincount(cell_M, weight_M, minlength=math.prod(shape)).reshape(shape)
        for weight_M in (pass_at_k(mine["n"].to_numpy(), mine["correct"].to_numpy(), k), None)
    )
    columns = ["mean", "low", "high", "speaks_of"]
    changed = {name: rows[name].to_numpy(copy=True) for name in columns}
    for step, total_SP, count_SP in zip(steps, total, count):
        here_S = count_SP.any(1)
        kept_P = count_SP[here_S].all(0)
        place = int(np.searchsorted(rows["step"], step))
        if here_S.sum() != rows["seeds"][place] or kept_P.sum() < 2:
            continue
        found = statistics.accuracy((total_SP / count_SP.clip(min=1))[here_S][:, kept_P])
        for name, value in zip(columns, (float(found.value), *found.within(0.0, 1.0), found.speaks_of)):
            changed[name][place] = value
    for name, values in changed.items():
        rows[name] = values
