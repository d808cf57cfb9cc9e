"""Which token types carry the divergence?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dashboards.runs import Frame, Selected
from dashboards.style import SCALE, dress, empty, short

MISSING = "No token types were counted: run with diagnostics.every > 0 and a teacher that gives its distribution."
LETTERS = 10  # of an example before its mark, where there is room for a few words only
TYPES = 24  # token types of the map
WEIGHTED = ("p_student_mean", "p_teacher_mean", "entropy_teacher_mean_nats")  # means over the tokens of a type


@dataclass(frozen=True)
class Column:
    """A column of the table: narrow enough that all of them stand beside each other in a usual window."""

    heading: str
    says: str
    pixels: int
    form: str = ""  # of its numbers, as in a format string


COLUMNS = {
    "method": Column("method", "method", 84),
    "token": Column("token", "token type", 62),
    "example": Column(
        "largest KL, in context", "the occurrence with the largest KL, marked in what stands around it", 148
    ),
    "quadrant": Column("quadrant", "easy, learned, rock or regressed; needs enough windows of training", 74),
    "count": Column("count", "occurrences in training", 58, ",d"),
    "kl_mean_nats": Column("mean KL", "mean KL(student || teacher), nats", 66, ".2f"),
    "kl_max_nats": Column("max KL", "largest KL of one occurrence, nats", 62, ".1f"),
    "kl_share_fraction": Column("of KL", "share of all KL", 56, ".1%"),
    "enrichment_ratio": Column("enriched", "share of all KL / share of all tokens", 72, ".1f"),
    "p_student_mean": Column("p stud.", "mean probability that the student gave it", 58, ".2f"),
    "p_teacher_mean": Column("p teach.", "mean probability that the teacher gave it", 66, ".2f"),
    "entropy_teacher_mean_nats": Column("H teach.", "mean entropy of the teacher at its place, nats", 66, ".2f"),
    "persistence_fraction": Column(
        "stays", "persistence: share of the last windows in which it was among the most KL", 56, ".0%"
    ),
}
READ = (
    "KL and entropy (H) in nats; p: mean probability of the token. Enriched: share of all KL / share of all tokens. "
    "Stays (persistence): share of the last windows of training in which the type was among those with the most KL."
)


def types(selected: Selected) -> Frame:
    """One row per method and token type after the last step, the seeds pooled: those of COLUMNS that say something.

    Shares of several seeds speak of all their tokens; a type that is missing in the table of one seed, where it was not
    among those with the most KL, counts there with nothing.
    """
    found = selected.table("high_loss_tokens")
    if not len(found):
        return pd.DataFrame(columns=list(COLUMNS))
    last = found[found["step"] == found.groupby("folder")["step"].transform("max")].copy()
    last["kl"] = last["kl_mean_nats"] * last["count"]
    first = last.groupby(["label", "folder"])[["kl", "kl_share_fraction", "count", "token_share_fraction"]].first()
    totals: Frame = pd.DataFrame(
        {
            "all_kl": first["kl"] / first["kl_share_fraction"],
            "all_tokens": first["count"] / first["token_share_fraction"],
        }
    )
    totals = totals.groupby("label").sum()
    last["persistence_fraction"] = last["persistence_windows"] / last["windows"].clip(lower=1)
    for name in WEIGHTED:
        last[name] = last[name] * last["count"]
    types = ["label", "id"]
    summed = last.groupby(types, sort=False)[["count", "kl", *WEIGHTED]].sum().join(totals, on="label")
    table = summed[list(WEIGHTED)].div(summed["count"], axis=0).assign(count=summed["count"])
    table["kl_mean_nats"] = summed["kl"] / summed["count"]
    table["kl_share_fraction"] = summed["kl"] / summed["all_kl"]
    table["enrichment_ratio"] = table["kl_share_fraction"] / (summed["count"] / summed["all_tokens"])
    table["persistence_fraction"] = last.groupby(types)["persistence_fraction"].mean()
    top = last.loc[last.groupby(types)["kl_max_nats"].idxmax()].set_index(types)
    table = table.join(top[["token", "kl_max_nats", "example", *(["quadrant"] if "quadrant" in top else [])]])
    table = table.reset_index().rename(columns={"label": "method"})
    table = table.sort_values("kl_share_fraction", ascending=False, ignore_index=True)
    return table[[name for name in COLUMNS if name in table and table[name].notna().any()]]


def near(example: str) -> str:
    """The end of what stands before the mark, the mark, and what follows."""
    before, mark, rest = example.partition("⟦")
    cut = len(before) > LETTERS and bool(mark)
    return ("…" + before[-LETTERS:] if cut else before) + mark + rest


def shares(selected: Selected) -> go.Figure:
    """Share of all KL per token type and method."""
    question = "Which token types carry the divergence, and for which method?"
    found = types(selected)
    if not len(found):
        return empty(question, MISSING)
    wide = found.pivot_table(index="token", columns="method", values="kl_share_fraction", aggfunc="sum")
    wide = wide.reindex(columns=[label for label in selected.labels if label in wide.columns])
    wide = wide.loc[wide.max(axis=1).sort_values(ascending=False).index[:TYPES]]
    persistence = found.pivot_table(index="token", columns="method", values="persistence_fraction", aggfunc="mean")
    persistence = persistence.reindex(index=wide.index, columns=wide.columns)
    figure = go.Figure(
        go.Heatmap(
            x=[repr(token)[1:-1] for token in wide.index],
            y=[short(label) for label in wide.columns],
            z=100 * wide.to_numpy().T,
            customdata=np.stack([persistence.to_numpy().T, np.tile(wide.columns.to_numpy()[:, None], len(wide))], -1),
            colorscale=SCALE,
            colorbar={"title": "% of<br>all KL"},
            hovertemplate="%{customdata[1]}<br>token %{x}: %{z:.3f} % of all KL<br>high in %{customdata[0]:.0%} of the "
            "last windows<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title_text="token type, by its largest share", type="category", tickangle=-45)
    leaders = ", ".join(f"{label}: {wide[label].idxmax()!r}" for label in wide.columns if wide[label].notna().any())
    return dress(
        figure,
        question,
        alt=f"Heat map of the share of all KL per token type and method. The largest: {leaders}.",
        note="KL of all tokens written in training, all seeds together; empty: not among the types with the most KL.",
        height=150 + 30 * len(wide.columns),
    )
