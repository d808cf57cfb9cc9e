"""What runs were given and what they spent, and whether that was equal.

Tokens of the teacher are those that it read or wrote: scored, read before a continuation (less what a longer prefix had
brought along), and the larger of decoded and written, since what it writes into a rollout it decodes too. What the
diagnostics alone asked of it is included.

FLOPs are estimated from token counts and parameter counts N, with 2 N per token forward and 6 N per token trained
(forward and backward), for U updates per rollout:

    flops = N_student ((2 + 6 U) generated tokens - 2 tokens of the data)  +  2 N_teacher tokens of the teacher

Generated are all tokens of the rollouts, whoever wrote them; those of the data's own solutions cost no sampling.
Prompts, evaluations, a reference model and the attention's quadratic part are not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opd_lab.compare.groups import Group
from opd_lab.tracking import read

if TYPE_CHECKING:
    from pandas import DataFrame

EQUAL_RATIO = 1.05  # what was spent counts as equal up to this largest / smallest; what was given must be the same
_TEACHER = tuple(f"cost/teacher_{name}_tokens" for name in ("scored", "prefix", "cached", "decoded", "generated"))
_NEEDS = {  # axis -> metrics that it is made of
    "steps": (),
    "student_tokens": ("cost/generated_tokens",),
    "teacher_tokens": _TEACHER,
    "seconds": ("time/step_seconds",),
    "flops": ("cost/generated_tokens", "cost/dataset_tokens", *_TEACHER),
}
AXES = tuple(_NEEDS)
UNITS = {"steps": "steps", "student_tokens": "tokens", "teacher_tokens": "tokens", "seconds": "s", "flops": "FLOP"}


def metrics_of(*axes: str) -> set[str]:
    """The metrics from which `along` makes these axes.

    Raises:
        ValueError: an unknown axis.
    """
    if unknown := [axis for axis in axes if axis not in _NEEDS]:
        raise ValueError(f"x must be one of {', '.join(AXES)}, got {unknown[0]}")
    return {name for axis in axes for name in _NEEDS[axis]}


def along(axis: str, metrics: DataFrame, folder: Path) -> Any:
    """What one run had spent after each step: a series by step, from its rows of `read.metrics`. 0 at step 0.

    Raises:
        ValueError: an axis whose metrics or parameter counts the run did not log.
    """
    if axis == "steps":
        steps: Any = metrics["step"].drop_duplicates()
        return steps.set_axis(steps).sort_index()
    once: Any = metrics.drop_duplicates(["step", "name"], keep="last")
    wide: Any = once.pivot(index="step", columns="name", values="value")
    first = _NEEDS[axis][0]
    if first not in wide:
        raise ValueError(f"x={axis} needs {first}, which {folder.name} did not log; take x=steps, or run it again")
    if axis == "seconds":
        return wide[first].fillna(0.0).cumsum()
    totals = wide.reindex(columns=_NEEDS["flops"]).ffill().fillna(0.0)  # not logged: not asked
    student_tokens = totals["cost/generated_tokens"]
    teacher_tokens = sum(_of_teacher(totals).values())
    if axis != "flops":
        return student_tokens if axis == "student_tokens" else teacher_tokens
    return _flops(student_tokens, teacher_tokens, totals["cost/dataset_tokens"], folder)


def _flops(student_tokens: Any, teacher_tokens: Any, dataset_tokens: Any, folder: Path) -> Any:
    said = read.status(folder)
    try:
        student, of_teacher = (int(said["tags"][f"{name}_parameters"]) for name in ("student", "teacher"))
    except KeyError as missing:
        raise ValueError(
            f"x=flops needs the tag {missing.args[0]}, which {folder.name} has not; take x=student_tokens, or run it "
            "again"
        ) from None
    updates = said["params"]["optim.updates_per_rollout"]
    passes = (2 + 6 * updates) * student_tokens - 2 * dataset_tokens
    return student * passes + 2 * of_teacher * teacher_tokens


def spent(metrics: DataFrame, folder: Path) -> dict[str, float]:
    """What one run had spent in the end: the last value of `along` on every axis that it logged."""
    found: dict[str, float] = {}
    last = _last(metrics)
    seconds: Any = metrics[metrics["name"] == "time/step_seconds"]
    if len(seconds):
        found["seconds"] = float(seconds.drop_duplicates("step", keep="last")["value"].sum())
    if "cost/generated_tokens" in last:
        found["student_tokens"] = last["cost/generated_tokens"]
        try:
            mine = {name: last.get(name, 0.0) for name in _NEEDS["flops"]}
            of_teacher = float(sum(_of_teacher(mine).values()))
            found["flops"] = float(
                _flops(mine["cost/generated_tokens"], of_teacher, mine["cost/dataset_tokens"], folder)
            )
        except ValueError:  # says which tag the run has not
            pass
    if _TEACHER[0] in last:
        found["teacher_tokens"] = float(sum(_of_teacher({name: last.get(name, 0.0) for name in _TEACHER}).values()))
    return found


def tokens(metrics: DataFrame) -> dict[str, float]:
    """What one run has counted so far, by who wrote or read it; the teacher's parts add up to its axis."""
    last = _last(metrics)
    last = {name: last.get(name, 0.0) for name in _NEEDS["flops"]}
    return {"student wrote": last["cost/generated_tokens"]} | {k: float(v) for k, v in _of_teacher(last).items()}


def _last(metrics: DataFrame) -> dict[str, float]:
    """metric -> its last number."""
    found: Any = metrics.dropna(subset="value").sort_values("step", kind="stable").drop_duplicates("name", keep="last")
    return {str(name): float(value) for name, value in zip(found["name"], found["value"])}


def _of_teacher(totals: Any) -> dict[str, Any]:
    scored, prefix, cached, decoded, written = (totals[name] for name in _TEACHER)
    return {
        "teacher scored": scored,
        "teacher read before it went on": prefix - cached,
        "teacher wrote or read along": np.maximum(decoded, written),
    }


@dataclass(frozen=True)
class Equality:
    """One quantity over all methods."""

    quantity: str
    kind: str  # given | spent
    least: float
    least_method: str
    most: float
    most_method: str

    @property
    def ratio(self) -> float:
        return self.most / self.least if self.least else (float("inf") if self.most else 1.0)

    @property
    def equal(self) -> bool:
        return self.ratio <= (EQUAL_RATIO if self.kind == "spent" else 1.0)

    def __str__(self) -> str:
        if self.equal:
            middle = self.least if self.kind == "given" else (self.least + self.most) / 2
            return f"{self.quantity} {'' if self.kind == 'given' else 'about '}{middle:,.0f}"
        return (
            f"{self.quantity} {self.kind}: {self.least:,.0f} ({self.least_method}) to {self.most:,.0f} "
            f"({self.most_method}), ratio {self.ratio:.2f}"
        )


_GIVEN: dict[str, Callable[[dict[str, Any]], float]] = {
    "steps": lambda p: p["steps"],
    "prompts": lambda p: p["steps"] * p["rollout.prompts"],
    "rollouts": lambda p: p["steps"] * p["rollout.prompts"] * p["rollout.per_prompt"],
    "response limit": lambda p: p["rollout.max_tokens"],
    "updates": lambda p: p["steps"] * p["optim.updates_per_rollout"],
}
_SPENT = {"student tokens": "student_tokens", "teacher tokens": "teacher_tokens", "seconds": "seconds"}


def equalities(found: list[Group], rows: DataFrame) -> list[Equality]:
    """What the methods were given, from their params, and what they spent, from the table's rows; a quantity that some
    method does not state is left out."""
    labels = [group.label for group in found]
    values = {(name, "given"): [_stated(given, group.params) for group in found] for name, given in _GIVEN.items()}
    values |= {(name, "spent"): rows[column].tolist() for name, column in _SPENT.items()}
    out = []
    for (name, kind), by_method in values.items():
        if any(value != value for value in by_method):
            continue
        least, most = (pick(range(len(labels)), key=by_method.__getitem__) for pick in (min, max))
        out.append(Equality(name, kind, by_method[least], labels[least], by_method[most], labels[most]))
    return out


def _stated(given: Callable[[dict[str, Any]], float], params: dict[str, Any]) -> float:
    try:
        return float(given(params))
    except KeyError:
        return float("nan")
