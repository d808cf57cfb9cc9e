"""What do the estimators say of the exact KL of the same tokens?"""

from __future__ import annotations

import plotly.graph_objects as go

from dashboards.runs import Selected
from dashboards.style import dress, empty, panels, panels_height, short

PANELS = {
    "bias_nats": "bias, nats",
    "std_nats": "standard deviation, nats",
    "sign_error_fraction": "tokens with the wrong sign",
}


def lens(selected: Selected) -> go.Figure:
    """Bias, spread and sign errors of every estimator at the last evaluation; the mean over seeds."""
    question = "How far are the estimators from the exact KL of the same tokens?"
    found = selected.table("estimators")
    found = found[found["estimator"] != "exact"] if len(found) else found
    if not len(found):
        return empty(
            question,
            "No estimators were compared: run with diagnostics.estimator_rollouts > 0, evaluate.every > 0 and a "
            "teacher that gives its distribution.",
        )
    last = found[found["step"] == found.groupby("folder")["step"].transform("max")]
    figure, places = panels(list(PANELS.values()), alike=False)
    order = list(dict.fromkeys(last["estimator"]))
    for (row, column), name in zip(places, PANELS):
        for label in selected.present(last):
            mine = last[last["label"] == label].groupby("estimator", sort=False)[[name, "tokens"]].mean().reindex(order)
            style = selected.styles[label]
            figure.add_trace(
                go.Scatter(
                    x=mine[name],
                    y=order,
                    mode="markers",
                    name=short(label),
                    legendgroup=label,
                    showlegend=column == 1,
                    marker={"color": style.colour, "symbol": style.symbol, "size": 9},
                    customdata=mine["tokens"],
                    hovertemplate=f"{label}<br>%{{y}}: %{{x:.6g}}, {PANELS[name]}<br>%{{customdata:,}} tokens"
                    "<extra></extra>",
                ),
                row,
                column,
            )
        figure.update_xaxes(title_text=PANELS[name], row=row, col=column, matches=None)
        figure.update_yaxes(autorange="reversed", showticklabels=column == 1, row=row, col=column)
    worst = last.loc[last["bias_nats"].abs().idxmax()]
    return dress(
        figure,
        question,
        alt=f"Dots per estimator and method. Largest bias: {worst['estimator']}, {worst['bias_nats']:.4g} nats.",
        note="A sample of tokens of the last evaluation, mean over seeds.",
        height=max(panels_height(list(PANELS)), 140 + 28 * len(order)),
    )
