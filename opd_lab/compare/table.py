"""Run folders -> one row per method, pooled over seeds, with what must be equal for the rows to be comparable.

Accuracy is the mean over test problems of the share of correct rollouts; its 95 % interval comes from a bootstrap over
the problems, drawn together for all seeds, which share them: it says how far other problems would move the number.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_lab.tracking import read

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console

HELD_OUT_KL = "eval/test/reverse_kl_mean_nats"
BUDGET = ("steps", "rollout.prompts", "rollout.per_prompt", "rollout.max_tokens", "optim.updates_per_rollout")
RESAMPLES = 2000


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed only."""

    label: str
    folders: list[Path]
    params: dict[str, Any]  # without the seed


@dataclass(frozen=True)
class Comparison:
    rows: DataFrame  # one per method
    budget: dict[str, str]  # what every run was given, or how it differs
    differences: dict[str, dict[str, Any]]  # config key -> method -> value, besides method.* and seed
    left_out: list[str]  # runs that have not finished


def groups(runs: read.Runs, statuses: Collection[str] = ("FINISHED",)) -> list[Group]:
    """The runs of these statuses by method, in the order in which they started. Variants of a method are told apart by
    their own settings."""
    finished = [f for f in read.folders(runs) if read.status(f)["status"] in statuses]
    pooled: dict[str, list[Path]] = {}
    for folder in sorted(finished, key=lambda f: read.status(f)["started"]):
        pooled.setdefault(json.dumps(_params(folder), sort_keys=True), []).append(folder)
    names = [_method(folders[0]) for folders in pooled.values()]
    out = []
    for name, (text, folders) in zip(names, pooled.items()):
        alike = [json.loads(other) for other, n in zip(pooled, names) if n == name]
        apart = [f"{key.removeprefix('method.')}={json.loads(text).get(key)}" for key in _differing(alike)]
        out.append(Group(" ".join([name, *apart]), folders, json.loads(text)))
    return out


def table(runs: read.Runs) -> Comparison:
    """The comparison of all finished runs.

    Raises:
        ValueError: there is no finished run.
    """
    import pandas as pd

    found = groups(runs)
    left_out = [f.name for f in read.folders(runs) if read.status(f)["status"] != "FINISHED"]
    if not found:
        raise ValueError(f"a comparison needs finished runs, got {', '.join(left_out)}, none of which has finished")
    outer = [key for key in _differing([g.params for g in found]) if not key.startswith("method.")]
    return Comparison(
        rows=pd.DataFrame([_row(group) for group in found]),
        budget={key: _one(g.params.get(key) for g in found) for key in BUDGET},
        differences={key: {g.label: g.params.get(key) for g in found} for key in outer},
        left_out=left_out,
    )


def interval(accuracy_P: Sequence[float]) -> tuple[float, float]:
    """The central 95 % of the mean when problems are drawn anew."""
    import numpy as np

    values_P = np.asarray(accuracy_P)
    drawn_RP = np.random.default_rng(0).integers(len(values_P), size=(RESAMPLES, len(values_P)))
    low, high = np.quantile(values_P[drawn_RP].mean(1), [0.025, 0.975])
    return float(low), float(high)


def _row(group: Group) -> dict[str, Any]:
    row: dict[str, Any] = {"method": group.label, "seeds": len(group.folders)}
    row |= _accuracy(group)
    metrics = read.metrics(group.folders)
    by_name = dict(tuple(metrics.groupby("name"))) if len(metrics) else {}
    for column, name in (
        ("kl_held_out_nats", HELD_OUT_KL),
        ("student_tokens", "cost/generated_tokens"),
        ("teacher_tokens", "cost/teacher_scored_tokens"),
    ):
        mine = by_name.get(name)
        row[column] = float("nan") if mine is None else mine.sort_values("step").groupby("folder").value.last().mean()
    spent = by_name.get("time/step_seconds")
    row["seconds"] = float("nan") if spent is None else spent.groupby("folder").value.sum().mean()
    return row


def _accuracy(group: Group) -> dict[str, float]:
    """Before the first and after the last step, on the test problems."""
    found = read.evaluations(group.folders)
    names = ("accuracy_before", "accuracy_after", "accuracy_low", "accuracy_high")
    if not len(found) or "test" not in set(found["set"]):
        return dict.fromkeys(names, float("nan"))
    test = found[found["set"] == "test"]
    test = test.assign(accuracy=test["correct"] / test["n"])
    at = test.groupby("folder").step
    before = test[test.step == at.transform("min")].groupby("problem").accuracy.mean()
    after = test[test.step == at.transform("max")].groupby("problem").accuracy.mean()
    return dict(zip(names, (before.mean(), after.mean(), *interval(after.to_list()))))


def _params(folder: Path) -> dict[str, Any]:
    params = read.status(folder)["params"]
    return {k: v for k, v in params.items() if k != "seed" and not k.startswith("tracking.")}


def _method(folder: Path) -> str:
    said = read.status(folder)
    return said["tags"].get("method", said["name"])


def _differing(params: list[dict[str, Any]]) -> list[str]:
    keys = sorted({key for one in params for key in one})
    return [key for key in keys if len({json.dumps(one.get(key)) for one in params}) > 1]


def _one(values: Iterable[Any]) -> str:
    different = list(dict.fromkeys(str(value) for value in values))
    return different[0] if len(different) == 1 else "DIFFERS: " + ", ".join(different)


def cells(row: Any) -> list[str]:
    """A row as text, under `HEAD`."""
    after = f"{row.accuracy_after:.3f} [{row.accuracy_low:.3f}, {row.accuracy_high:.3f}]"
    numbers = (f"{n:,.0f}" for n in (row.student_tokens, row.teacher_tokens, row.seconds))
    text = [row.method, str(row.seeds), f"{row.accuracy_before:.3f}", after, f"{row.kl_held_out_nats:.4f}", *numbers]
    return ["-" if value.startswith("nan") else value for value in text]


HEAD = ("method", "seeds", "before", "after [95 %]", "KL", "student tokens", "teacher tokens", "seconds")
CAPTION = (
    "Accuracy on test problems before and after; exact KL(student || teacher) on held-out rollouts after, in nats."
)


def budget_line(found: Comparison) -> str:
    return "Budget of every run: " + ", ".join(f"{key} {value}" for key, value in found.budget.items())


def notes(found: Comparison) -> list[str]:
    """What a reader must know before believing the table."""
    said = [
        f"differs: {key}: " + ", ".join(f"{value} ({label})" for label, value in by_method.items())
        for key, by_method in found.differences.items()
    ]
    if len(found.rows) > 1 and not said:
        said = ["Besides the method's own settings and the seed, nothing differs."]
    return said + [f"left out, not finished: {name}" for name in found.left_out]


def render(found: Comparison, console: Console) -> None:
    """The table in a terminal."""
    from rich.table import Table

    console.print(budget_line(found), highlight=False)
    shown = Table(caption=CAPTION, caption_justify="left")
    for place, name in enumerate(HEAD):
        shown.add_column(name, justify="right" if place else "left")
    for row in found.rows.itertuples():
        shown.add_row(*cells(row))
    console.print(shown)
    for note in notes(found):
        console.print(note, highlight=False)
