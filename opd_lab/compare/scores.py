"""The evaluations of a method's runs as arrays: a row per seed, a column per test problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scipy.special import comb

from opd_lab.compare.groups import Group
from opd_lab.compare.statistics import Array
from opd_lab.tracking import read

if TYPE_CHECKING:
    from pandas import DataFrame

BEST_STEP = "eval/test_best/step"


@dataclass(frozen=True)
class Scores:
    """Shares of correct rollouts on the problems that every seed was tested on."""

    problems: list[str]
    before_SP: Array
    final_SP: Array
    best_SP: Array | None  # of the checkpoint with the best validation accuracy; None: some seed has not tested it
    best_steps: list[int]  # of each seed


def scores(group: Group) -> Scores | None:
    """None where the data have no answers."""
    found: Any = read.evaluations(group.folders)
    if found.empty or not (found["set"] == "test").any():
        return None
    test: Any = found[found["set"] == "test"]
    test = test.assign(accuracy=test["correct"] / test["n"])
    steps = test.groupby("folder").step
    final = _table(test[test.step == steps.transform("max")])
    before = _table(test[test.step == steps.transform("min")]).reindex(columns=final.columns)
    logged: Any = read.metrics(group.folders, names=[BEST_STEP])
    best, best_steps = None, []
    if len(logged) and logged.folder.nunique() == len(final):
        step_of = logged.groupby("folder").value.last().astype(int)
        best = _table(test[test.step == test.folder.map(step_of)]).reindex(columns=final.columns)
        best_steps = step_of.reindex(final.index).tolist()
    return Scores(
        problems=final.columns.tolist(),
        before_SP=before.to_numpy(),
        final_SP=final.to_numpy(),
        best_SP=None if best is None else best.to_numpy(),
        best_steps=best_steps,
    )


def _table(test: DataFrame) -> DataFrame:
    return test.pivot_table(index="folder", columns="problem", values="accuracy").dropna(axis="columns")


def pass_at_k(n_N: Any, c_N: Any, k: int) -> Any:
    """Per problem, the probability that k of n rollouts, c of them correct, hold a correct one; k = 1: the share."""
    return 1.0 - comb(n_N - c_N, k) / comb(n_N, k)


def paired(a: Scores, b: Scores) -> tuple[list[str], list[int], list[int]]:
    """The problems that both were tested on, and their columns in each."""
    shared = sorted(set(a.problems) & set(b.problems))
    return shared, [a.problems.index(name) for name in shared], [b.problems.index(name) for name in shared]
