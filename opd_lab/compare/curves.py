"""A metric over what was spent, per method, with the spread of the seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opd_lab.compare.budget import along, metrics_of
from opd_lab.compare.groups import Group, groups
from opd_lab.compare.guard import same_axis
from opd_lab.compare.statistics import LEVEL
from opd_lab.tracking import read

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = ("method", "step", "x", "mean", "low", "high", "lowest", "highest", "seeds")


def curves(runs: read.Runs, metric: str, x: str = "steps") -> DataFrame:
    """One row per method and step at which the metric was logged, running and stopped runs included.

    Columns:
        method    the label of the group, as in `table`
        step      steps done
        x         what had been spent by then, the mean over seeds: steps | student_tokens | teacher_tokens | seconds
                  (of training steps) | flops; `budget.along` says how each is counted, `budget.UNITS` in which unit
        mean      over the seeds that have come this far
        low, high the 95 % t interval of that mean over seeds; NaN with one seed
        lowest, highest   over these seeds
        seeds     how many they are

    Raises:
        ValueError: an unknown x, or one the runs did not log; a metric nobody logged; losses with unlike conventions.
    """
    import pandas as pd

    same_axis(runs, metric)
    found = groups(runs, statuses=None)
    frames: list[Any] = [frame for group in found if len(frame := _curve(group, metric, x))]
    if not frames:
        raise ValueError(f"{metric} was logged by none of the runs of {', '.join(group.label for group in found)}")
    return pd.concat(frames, ignore_index=True).reindex(columns=[*COLUMNS])


def _curve(group: Group, metric: str, x: str) -> Any:
    import numpy as np
    import pandas as pd
    from scipy import stats

    seeds = []
    for folder in group.folders:
        logged: Any = read.metrics(folder, names={metric} | metrics_of(x))
        if len(logged) and len(value := logged[logged["name"] == metric].groupby("step").value.last()):
            seeds.append(pd.DataFrame({"value": value, "x": along(x, logged, folder).reindex(value.index)}))
    if not seeds:
        return pd.DataFrame()
    by_step = pd.concat(seeds).groupby(level="step")
    out: Any = by_step.value.agg(mean="mean", lowest="min", highest="max", seeds="size")
    half = by_step.value.std() / np.sqrt(out.seeds) * stats.t.ppf((1 + LEVEL) / 2, np.maximum(out.seeds - 1, 1))
    out = out.assign(method=group.label, x=by_step.x.mean(), low=out["mean"] - half, high=out["mean"] + half)
    return out.reset_index(names="step")
