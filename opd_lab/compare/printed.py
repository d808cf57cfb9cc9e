"""A comparison as text: two tables within 120 columns, and what a reader must know before believing them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from opd_lab.compare.table import Comparison

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

HEAD = (
    "method",
    "seeds",
    "before",
    "after [95 %]",
    "best - after",
    "KL",
    "student tokens",
    "teacher tokens",
    "seconds",
)


def row_cells(row: Any) -> list[str]:
    """A row of `Comparison.rows` as text, under `HEAD`."""
    after = f"{row.accuracy_after:.3f} [{row.accuracy_low:.3f}, {row.accuracy_high:.3f}]"
    spent = (f"{n:,.0f}" for n in (row.student_tokens, row.teacher_tokens, row.seconds))
    text = [f"{row.accuracy_before:.3f}", after, f"{row.best_gain:+.3f}", f"{row.kl_held_out_nats:.4f}", *spent]
    return [row.method, str(row.seeds), *("-" if "nan" in value else value for value in text)]


def caption(found: Comparison) -> str:
    one = found.rows[found.rows.speaks_of == "problems"].method.tolist()
    if len(one) == len(found.rows):
        speaks = "of other problems only: with one seed nothing is known of other seeds"
    elif one:
        speaks = f"of other problems and other seeds; with one seed ({', '.join(one)}) of other problems only"
    else:
        speaks = "of other problems and other seeds"
    return (
        "Accuracy on test problems before the first and after the last step; best: at the checkpoint that validation "
        f"chose. Exact KL(student || teacher) on held-out rollouts, nats. Intervals speak {speaks}."
    )


def gains_head(found: Comparison) -> tuple[str, ...]:
    return ("method", f"gain over {found.baseline} [95 %]", "p (Holm)", "", "beats it [95 %]", "speaks of")


def gains_cells(row: Any) -> list[str]:
    """A row of `Comparison.gains` as text, under `gains_head`."""
    text = (
        f"{row.gain:+.3f} [{row.gain_low:+.3f}, {row.gain_high:+.3f}]",
        f"{row.p_holm:.3f}" if not row.p_holm < 0.001 else "< 0.001",
        ("*" if row.speaks_of == "problems and seeds" else "(*)") if row.separated else "",
        f"{row.improvement:.3f} [{row.improvement_low:.3f}, {row.improvement_high:.3f}]",
    )
    return [row.method, *("-" if "nan" in value else value for value in text), row.speaks_of]


def gains_caption(found: Comparison) -> str:
    hidden = found.comparisons - len(found.gains)
    chosen = f", {hidden} of them settings that are not shown: the budget of choosing" if hidden else ""
    count = f"{found.comparisons} comparison{'s' if found.comparisons > 1 else ''}"
    one = found.gains.separated & (found.gains.speaks_of == "problems")
    these = " (*) = of these very runs, which another seed may undo." if one.any() else ""
    return (
        f"Paired by problem. * = p <= 0.05 after Holm over {count}{chosen}.{these} "
        "Beats it: how often a run does better on a problem, a tie counting half."
    )


def notes(found: Comparison) -> list[str]:
    """Budgets, differences, what would separate the methods, runs left out."""
    said = [*budget_lines(found), *power_lines(found)]
    differs = [
        f"differs: {key}: " + ", ".join(f"{value} ({label})" for label, value in by_method.items())
        for key, by_method in found.differences.items()
    ]
    if len(found.rows) > 1 and not differs:
        differs = ["Besides the method's own settings and the seed, nothing differs."]
    return said + differs + [f"left out, not finished: {name}" for name in found.left_out]


def budget_lines(found: Comparison) -> list[str]:
    """What was equal, and a warning for each quantity that was not."""
    equal = [str(one) for one in found.equalities if one.equal]
    unequal = [f"WARNING: unequal budget: {one}" for one in found.equalities if not one.equal]
    head = "Budget of every run: " if not unequal else "Equal for all: "
    return [head + ", ".join(equal)] * bool(equal) + unequal


def power_lines(found: Comparison) -> list[str]:
    """What would separate from the baseline each method that is not."""
    seeds = dict(zip(found.rows.method, found.rows.seeds))
    rows: list[Any] = list(found.gains.itertuples())
    return [
        f"not separated: {row.method}, {row.baseline}; if they differ by {abs(row.gain):.3f}, {_ways(row, seeds)} would"
        for row in rows
        if not row.separated
    ]


def _ways(row: Any, seeds: dict[str, int]) -> str:
    ways = []
    if math.isfinite(row.seeds_needed):
        more = max(row.seeds_needed - min(seeds[row.method], seeds[row.baseline]), 1)
        ways.append(f"about {more:.0f} more seeds of each")
    if math.isfinite(row.problems_needed):
        ways.append(f"about {row.problems_needed:,.0f} problems in place of {row.problems}")
    return " or ".join(ways) or "no number of seeds or problems within reason"


def render(found: Comparison, console: Console) -> None:
    """Both tables and the notes in a terminal."""
    _print(console, HEAD, [row_cells(row) for row in found.rows.itertuples()], caption(found))
    if len(found.gains):
        cells = [gains_cells(row) for row in found.gains.itertuples()]
        _print(console, gains_head(found), cells, gains_caption(found))
    for note in notes(found):
        console.print(note, highlight=False, markup=False)


def _print(console: Console, head: Sequence[str], rows: list[list[str]], says: str) -> None:
    from rich.table import Table

    shown = Table(caption=says, caption_justify="left")
    for place, name in enumerate(head):
        words = len(name) > 8 and "[" not in name  # such a heading takes two lines
        shown.add_column(name.replace(" ", "\n", 1) if words else name, justify="right" if place else "left")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
