"""Which token types carry the divergence?"""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dashboards.runs import Frame, Selected
from dashboards.style import SCALE, dress, empty, short

MISSING = "No token types were counted: run with diagnostics.every > 0 and a teacher that gives its distribution."
TYPES = 24  # token types of the map
WEIGHTED = ("p_student_mean", "p_teacher_mean", "entropy_teacher_mean_nats")  # means over the tokens of a type
WORDS = {  # column of the table -> its heading
    "method": "method",
    "token": "token",
    "example": "largest KL, in context",
    "quadrant": "quadrant",
    "count": "count",
    "kl_mean_nats": "mean KL",
    "kl_max_nats": "max KL",
    "kl_share_fraction": "share of KL",
    "enrichment_ratio": "enrichment",
    "p_student_mean": "p student",
    "p_teacher_mean": "p teacher",
    "entropy_teacher_mean_nats": "teacher's entropy",
    "persistence_fraction": "persistence",
}
READ = (
    "KL and entropy in nats. Enrichment: share of all KL / share of all tokens. Persistence: share of the last "
    "windows of training in which the type was among those with the most KL."
)


def types(selected: Selected) -> Frame:
    """One row per method and token type after the last step, the seeds pooled: the columns of WORDS that are there.

    Shares of several seeds speak of all their tokens; a type that is missing in the table of one seed, where it was not
    among those with the most KL, counts there with nothing.
    """
    found = selected.table("high_loss_tokens")
    if not len(found):
        return pd.DataFrame(columns=list(WORDS))
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
    return table[[name for name in WORDS if name in table]]


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
        note="KL of all tokens written in training, all seeds together; white: not among the types with the most KL.",
        height=150 + 30 * len(wide.columns),
    )
