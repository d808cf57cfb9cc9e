"""What can be told of the points of a sweep: each against the first, on test problems, in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial

from opd_lab.compare.groups import groups
from opd_lab.compare.printed import gains_cells
from opd_lab.sweep.points import KEY, Points

if TYPE_CHECKING:
    from opd_lab.compare.table import Comparison


def rows(done: Sequence[FrozenTrial], runs: Sequence[Path]) -> dict[str, str]:
    """Label of a point -> the row of the comparison that its runs are in."""
    row = {folder: group.label for group in groups(runs) for folder in group.folders}
    return {trial.params[KEY]: row[Path(trial.user_attrs["runs"][0])] for trial in done}


def lines(points: Points, found: Comparison, row: Mapping[str, str]) -> list[str]:
    """One for each point but the first, or what keeps it from being told."""
    name = {label: point.name for label, point in points.by_label.items()}
    missing = [f"{name[label]} did not finish: nothing can be told of it" for label in name if label not in row]
    if points.first not in row:
        return missing
    compared: list[Any] = list(found.gains.itertuples())
    gains = {gain.method: gain for gain in compared if gain.problems}
    told = []
    for label in list(points.by_label)[1:]:
        if label in row and row[label] in gains:
            told.append(_line(name[label], name[points.first], gains[row[label]], found.comparisons))
        elif label in row:
            told.append(f"{name[label]} cannot be told from {name[points.first]}: the test problems have no answers")
    return told + missing


def _line(name: str, first: str, gain: Any, comparisons: int) -> str:
    """`best is better than defaults: accuracy +0.041 [+0.012, +0.070] on 200 test problems, p = 0.006 ...`"""
    _, change, p, star, _, speaks = gains_cells(gain)
    said = f"is {'better' if gain.gain > 0 else 'worse'} than" if star else "cannot be told from"
    count = f"Holm over {comparisons} comparison{'s' if comparisons > 1 else ''}"
    p = p if p.startswith("<") else f"= {p}"
    return (
        f"{name} {said} {first}: accuracy {change} on {gain.problems} test problems, p {p} ({count}); "
        f"this speaks of {'other ' + speaks.replace(' and ', ' and other ')}"
    )
