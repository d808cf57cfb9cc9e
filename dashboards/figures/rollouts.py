"""The same prompt, two methods: what each wrote, every token coloured by its KL."""

from __future__ import annotations

from html import escape

from dashboards.runs import Frame, Selected
from opd_lab.tracking import coloured

MISSING = (
    "These two methods have no rollouts of one prompt: run both with diagnostics.sample_rollouts > 0, on the same data "
    "and with the same seed."
)
QUESTION = "What do two methods write for the same prompt, and where does the teacher disagree?"
STYLE = (
    coloured.STYLE + ".pair { display: grid; grid-template-columns: 1fr 1fr; gap: 2em } .pair h4 { margin: .5em 0 0 }"
)


def pairs(selected: Selected, one: str, other: str) -> list[tuple[Frame, Frame]]:
    """Rollouts of two methods for the same prompt, in the order of steps: those of one step with one uid, which under
    one seed is one prompt. The first seed that both have."""
    found = selected.table("rollouts")
    if not len(found):
        return []
    mine, theirs = (found[found["label"] == label] for label in (one, other))
    for a in mine["folder"].unique():
        for b in theirs["folder"].unique():
            left, right = (rows[rows["folder"] == f] for rows, f in ((mine, a), (theirs, b)))
            keys = ["step", "uid", "prompt"]
            both = left[keys].drop_duplicates().merge(right[keys].drop_duplicates())
            if len(both):
                at = [rows.set_index(keys, drop=False) for rows in (left, right)]
                return [
                    tuple(rows.loc[[key]].iloc[0] for rows in at) for key in both.itertuples(index=False, name=None)
                ]
    return []


def beside(one: Frame, other: Frame) -> str:
    """HTML of a pair; `STYLE` and `coloured.legend()` belong to it."""
    columns = "".join(f"<div><h4>{escape(row['label'])}</h4>{coloured.rollout(row)}</div>" for row in (one, other))
    return f'<div class="pair">{columns}</div>'
