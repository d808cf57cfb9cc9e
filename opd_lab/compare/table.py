"""Run folders -> one row per method, pooled over seeds, and every method against a baseline.

Accuracy is the mean over test problems of the share of correct rollouts. Intervals, p-values and what would separate
two methods are those of `statistics`: they speak of other problems, and of other seeds where each method has two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opd_lab.compare import budget, statistics
from opd_lab.compare.budget import Equality, equalities, metrics_of
from opd_lab.compare.groups import Group, differing, finished, groups, settings_tried
from opd_lab.compare.scores import Scores, paired, scores
from opd_lab.tracking import read

if TYPE_CHECKING:
    from pandas import DataFrame

HELD_OUT_KL = "eval/test/reverse_kl_mean_nats"
BUDGET = ("steps", "rollout.prompts", "rollout.per_prompt", "rollout.max_tokens", "optim.updates_per_rollout")
NAN = float("nan")


@dataclass(frozen=True)
class Comparison:
    """What may be said of some methods.

    `rows`, one per method, in the order in which they started:
        method, seeds, problems (that all its seeds were tested on), speaks_of ("problems" | "problems and seeds"),
        accuracy_before, accuracy_after (last step), accuracy_low, accuracy_high (95 % of the latter),
        accuracy_best (checkpoint with the best validation accuracy), best_step (mean over seeds), best_gain
        (accuracy_best - accuracy_after), best_gain_low, best_gain_high,
        kl_held_out_nats, student_tokens, teacher_tokens, seconds, flops (means over seeds; `budget` says how counted),
        tried (settings of this method in its experiment, shown or not)
    A number that the runs do not have is NaN.

    `gains`, one per method other than the baseline, differences of accuracy after the last step:
        method, baseline, problems (that both were tested on), speaks_of, gain (method - baseline), gain_low, gain_high
        (95 %), p, p_holm (adjusted for every comparison made), separated (p_holm <= 0.05),
        improvement (probability that on some problem a run of the method does better than one of the baseline, a tie
        counting half), improvement_low, improvement_high,
        bootstrap_low, bootstrap_high (hierarchical bootstrap of the gain, a second opinion),
        seeds_needed (of each method), problems_needed: at which a difference as large as this one is separated four
        times in five; inf: at none within reason, NaN: cannot be known from one seed
    Empty with one method or without answers.
    """

    rows: DataFrame
    budget: dict[str, str]  # what every run was given, or how it differs
    differences: dict[str, dict[str, Any]]  # config key -> method -> value, besides method.* and seed
    left_out: list[str]  # runs that have not finished
    baseline: str  # the label of the method that the others are held against
    gains: DataFrame
    equalities: list[Equality]  # what was given and spent, equal or not
    comparisons: int  # that Holm's adjustment counts: settings tried, shown or not, less the baseline


def table(runs: read.Runs, baseline: str | None = None) -> Comparison:
    """The comparison of all finished runs. `baseline` is a label of a row; None: plain `opd`, or else the first row.

    Raises:
        ValueError: there is no finished run, or no such baseline.
    """
    return compare(groups(runs), baseline)


def compare(methods: Sequence[Group], baseline: str | None = None) -> Comparison:
    """As `table`, of methods that have their labels already."""
    import pandas as pd

    found = finished(methods)
    ended = {folder for group in found for folder in group.folders}
    left_out = sorted(f.name for group in methods for f in group.folders if f not in ended)
    if not found:
        raise ValueError(f"a comparison needs finished runs, got {', '.join(left_out)}, none of which has finished")
    held_against = _baseline([group.label for group in found], baseline)
    outer = [key for key in differing([g.params for g in found]) if not key.startswith("method.")]
    tested = {group.label: scores(group) for group in found}
    tried = settings_tried(found)
    comparisons = max(sum(tried.values()), len(found)) - 1
    rows = pd.DataFrame([_row(group, tested[group.label]) | _tried(group, tried) for group in found])
    return Comparison(
        rows=rows,
        budget={key: _one(g.params.get(key) for g in found) for key in BUDGET},
        differences={key: {g.label: g.params.get(key) for g in found} for key in outer},
        left_out=left_out,
        baseline=held_against,
        gains=_gains(tested, held_against, comparisons),
        equalities=equalities(found, rows),
        comparisons=comparisons,
    )


def _baseline(labels: list[str], wanted: str | None) -> str:
    if wanted is None:
        return next((label for label in labels if label.split()[0] == "opd"), labels[0])
    if wanted not in labels:
        raise ValueError(f"--baseline must be a row of the table, got {wanted}; the rows are {', '.join(labels)}")
    return wanted


def _row(group: Group, tested: Scores | None) -> dict[str, Any]:
    row: dict[str, Any] = {"method": group.label, "seeds": len(group.folders)}
    return row | _accuracy(tested) | _spent(group)


def _tried(group: Group, tried: dict[str, int]) -> dict[str, int]:
    return {"tried": tried[group.label.split()[0]]}


def _accuracy(tested: Scores | None) -> dict[str, Any]:
    """Before the first and after the last step, and at the checkpoint that validation chose, on the test problems."""
    after = ("accuracy_before", "accuracy_after", "accuracy_low", "accuracy_high")
    best = ("accuracy_best", "best_step", "best_gain", "best_gain_low", "best_gain_high")
    if tested is None:
        return {"problems": 0, "speaks_of": "nothing"} | dict.fromkeys(after + best, NAN)
    found = statistics.accuracy(tested.final_SP)
    row = {"problems": len(tested.problems), "speaks_of": found.speaks_of}
    row |= dict(zip(after, (float(tested.before_SP.mean()), float(found.value), *found.within(0.0, 1.0))))
    if tested.best_SP is None:
        return row | dict.fromkeys(best, NAN)
    gain = statistics.accuracy(tested.best_SP - tested.final_SP)  # one seed has both, so it is one table
    step = sum(tested.best_steps) / len(tested.best_steps)
    values = (float(tested.best_SP.mean()), step, float(gain.value), *gain.within(-1.0, 1.0))
    return row | dict(zip(best, values))


def _spent(group: Group) -> dict[str, float]:
    columns = ("student_tokens", "teacher_tokens", "seconds", "flops")
    metrics: Any = read.metrics(group.folders, names={HELD_OUT_KL} | metrics_of(*columns))
    row = {"kl_held_out_nats": NAN}
    of_run = dict(list(metrics.groupby("folder"))) if len(metrics) else {}
    last = [m[m["name"] == HELD_OUT_KL].sort_values("step").value.tolist()[-1:] for m in of_run.values()]
    if last and all(last):
        row["kl_held_out_nats"] = sum(value for [value] in last) / len(last)
    ends = [budget.spent(of_run[str(folder)], folder) for folder in group.folders if str(folder) in of_run]
    for column in columns:
        values = [end[column] for end in ends if column in end]
        row[column] = sum(values) / len(values) if values and len(values) == len(group.folders) else NAN
    return row


def _gains(tested: dict[str, Scores | None], baseline: str, comparisons: int) -> DataFrame:
    import pandas as pd

    against = tested[baseline]
    rows = [
        {"method": label, "baseline": baseline} | _gain(mine, against, (1 - statistics.LEVEL) / comparisons)
        for label, mine in tested.items()
        if label != baseline and mine is not None and against is not None
    ]
    if not rows:
        return pd.DataFrame()
    out = pd.DataFrame(rows)
    out["p_holm"] = statistics.holm(out["p"].to_numpy(), comparisons)
    out["separated"] = out["p_holm"] <= 1 - statistics.LEVEL
    return out


def _gain(mine: Scores, against: Scores, alpha: float) -> dict[str, Any]:
    shared, mine_P, against_P = paired(mine, against)
    if not shared:
        names = ("gain", "gain_low", "gain_high", "p", "improvement", "improvement_low", "improvement_high")
        names += ("bootstrap_low", "bootstrap_high", "seeds_needed", "problems_needed")
        return {"problems": 0, "speaks_of": "nothing"} | dict.fromkeys(names, NAN)
    a_SP, b_SP = mine.final_SP[:, mine_P], against.final_SP[:, against_P]
    gain, better = statistics.difference(a_SP, b_SP), statistics.improvement(a_SP, b_SP)
    enough = statistics.needed(a_SP, b_SP, alpha)
    row = {"problems": len(shared), "speaks_of": gain.speaks_of, "gain": float(gain.value)}
    row |= dict(zip(("gain_low", "gain_high"), gain.within(-1.0, 1.0))) | {"p": float(gain.p_value())}
    row |= {"improvement": float(better.value)}
    row |= dict(zip(("improvement_low", "improvement_high"), better.within(0.0, 1.0)))
    row |= dict(zip(("bootstrap_low", "bootstrap_high"), statistics.bootstrap(a_SP, b_SP)))
    return row | {"seeds_needed": enough.seeds, "problems_needed": enough.problems}


def _one(values: Iterable[Any]) -> str:
    different = list(dict.fromkeys(str(value) for value in values))
    return different[0] if len(different) == 1 else "DIFFERS: " + ", ".join(different)
