"""The papers' own figures, where a run logs what they need.

Not here, because they need an analysis that a run does not make by itself: `opd-lab analyze` answers those of Rock
Tokens (figures 1 to 4), SCOPE (1b), TRB (4), KAT's phases and OPRD (8, 12) in the run folder.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dashboards import style
from dashboards.figures import lines
from dashboards.figures.paper_curves import CURVES, curve, rock_arms
from dashboards.runs import Frame, Selected, curves
from dashboards.style import SCALE, dress, empty, panels, short

ROLLOUTS = 100  # rows of a map
SHARE = 0.1  # of a run's steps that count as early, and as late
FIRST_STEPS = 25
SUPPORT = ("teacher/logp_mean_nats", "rollout/support_reward_auroc_fraction", "rollout/reward_mean_fraction")
PASS = re.compile(r"eval/test/pass_at_(\d+)$")


def kl_map(selected: Selected) -> go.Figure:
    """KAT: the KL of every token of sampled rollouts of the first method, early and late in training."""
    question = "Do rollouts end in long stretches on which student and teacher agree?"
    found = selected.table("rollouts")
    if not len(found) or "reverse_kl" not in found:
        return empty(question, "No sampled rollouts with a KL: run with diagnostics.sample_rollouts=100.")
    label = selected.present(found)[0]
    found = found[found["label"] == label]
    steps = found["step"]
    first, last = max(SHARE * steps.max(), steps.min()), (1 - SHARE) * steps.max()
    parts = {"early": found[steps <= first], "late": found[steps > last]}
    rows_most = max(map(len, parts.values()))
    figure, places = panels([f"{name}: {min(len(rows), ROLLOUTS)} rollouts" for name, rows in parts.items()])
    widest = max(len(row) for rows in parts.values() for row in rows["reverse_kl"][:ROLLOUTS])
    for (row, column), rows in zip(places, parts.values()):
        kl_RT = np.full((min(len(rows), ROLLOUTS), widest), np.nan, dtype=np.float32)
        for r, values in enumerate(sorted(rows["reverse_kl"][:ROLLOUTS], key=len)):
            kl_RT[r, : len(values)] = values
        with np.errstate(invalid="ignore", divide="ignore"):
            depth_RT = np.log10(kl_RT.clip(1e-4))
        figure.add_trace(
            go.Heatmap(
                z=depth_RT,
                customdata=kl_RT,
                coloraxis="coloraxis",
                hovertemplate="token %{x}: %{customdata:.6g} nats<extra></extra>",
            ),
            row,
            column,
        )
        figure.update_xaxes(title_text="response position, tokens", row=row, col=column)
    figure.update_yaxes(
        title_text="rollouts by length", tickformat="d", nticks=6, dtick=1 if rows_most <= 6 else None, col=1
    )
    ticks = range(-4, 2)
    bar = {"title": "nats", "tickvals": list(ticks), "ticktext": [f"{10.0**t:g}" for t in ticks]}
    figure.update_layout(coloraxis={"colorscale": SCALE, "cmin": -4, "cmax": 1, "colorbar": bar})
    note = f"KAT, arXiv 2606.09471, its heat map. {label}: the first and last tenth of its steps, a row per rollout."
    if rows_most < ROLLOUTS:
        note += f" So few rows show stripes: diagnostics.sample_rollouts={ROLLOUTS} keeps more."
    return dress(figure, question, alt=f"Two heat maps of token KL, early and late, for {label}.", note=note)


def support(selected: Selected) -> go.Figure:
    """TRB, figure 7: the first 25 steps of all seeds pooled, a point per method."""
    question = "Does the teacher's support still tell right from wrong rollouts?"
    found = selected.metrics(SUPPORT)
    found = found[found["step"] <= FIRST_STEPS] if len(found) else found
    missing = empty(question, "It needs graded data and a teacher that scores tokens.")
    if not len(found):
        return missing
    mean = found.pivot_table(index="label", columns="name", values="value", aggfunc="mean").reindex(columns=SUPPORT)
    mean = mean.dropna()
    if not len(mean):
        return missing
    own = [selected.styles[str(label)] for label in mean.index]
    figure = go.Figure(
        go.Scatter(
            x=mean[SUPPORT[0]],
            y=mean[SUPPORT[1]],
            mode="markers",
            marker={"size": 15, "color": mean[SUPPORT[2]], "coloraxis": "coloraxis", "symbol": [s.symbol for s in own]},
            hoverinfo="skip",
            showlegend=False,
        )
    )
    for (label, row), look in zip(mean.iterrows(), own):
        rim = {"size": 17, "symbol": f"{look.symbol}-open", "color": look.colour, "line": {"width": 3}}
        figure.add_trace(
            go.Scatter(
                x=[row[SUPPORT[0]]],
                y=[row[SUPPORT[1]]],
                mode="markers",
                name=short(str(label)),
                marker=rim,
                hovertemplate=f"{label}<br>log-prob %{{x:.6g}}, AUROC %{{y:.6g}}, correct {row[SUPPORT[2]]:.4g}"
                "<extra></extra>",
            )
        )
    bar = {"title": "share of<br>correct<br>rollouts"}
    above = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0}
    figure.update_layout(coloraxis={"colorscale": SCALE, "colorbar": bar}, legend=above)
    figure.update_xaxes(title_text="mean teacher log-prob of the tokens, nats")
    figure.update_yaxes(title_text="AUROC of support against correctness")
    said = "; ".join(f"{label}: {row[SUPPORT[1]]:.3f}" for label, row in mean.iterrows())
    note = "TRB, arXiv 2605.31159, figure 7: the first 25 steps of all seeds together."
    return dress(figure, question, alt=f"AUROC per method: {said}.", note=note, height=440)


def pass_at_k(selected: Selected) -> go.Figure:
    """SCOPE, figures 1a and 4: pass@k before and after training."""
    question = "Is only the first answer better, or every one of k?"
    names = {int(match[1]): name for name in selected.names() if (match := PASS.match(name))}
    tested = [(k, line) for k in sorted(names) for line in curves(selected, names[k])]
    if not tested:
        return empty(question, "No pass@k on test problems: it needs graded data and evaluate.test_samples > 1.")
    figure = go.Figure()
    first = {line.label: line.points["step"].iloc[0] for _, line in tested}
    for label in dict.fromkeys(line.label for _, line in tested):
        look = selected.styles[label]
        last: Frame = pd.DataFrame(
            [line.points.iloc[-1].to_dict() | {"k": k} for k, line in tested if line.label == label]
        )
        if last["step"].iloc[-1] == first[label]:
            continue  # not trained yet
        figure.add_trace(
            go.Scatter(
                x=last["k"],
                y=last["mean"],
                name=short(label),
                mode="lines+markers",
                line={"color": look.colour, "dash": look.dash, "width": 2},
                marker={"symbol": look.symbol, "size": 8},
                error_y={
                    "array": last["high"] - last["mean"],
                    "arrayminus": last["mean"] - last["low"],
                    "color": look.colour,
                    "thickness": 1,
                },
                customdata=last[["low", "high", "speaks_of"]],
                hovertemplate=f"{label}<br>pass@%{{x}} = %{{y:.4f}}<br>95 % [%{{customdata[0]:.4f}}, "
                "%{customdata[1]:.4f}] over %{customdata[2]}<extra></extra>",
            )
        )
    begun: Frame = pd.DataFrame([{"k": k, "value": line.points["mean"].iloc[0]} for k, line in tested])
    begun = begun.groupby("k").mean()
    figure.add_trace(
        go.Scatter(
            x=begun.index,
            y=begun["value"],
            name="before training",
            mode="lines",
            line={"color": "#8A8F98", "dash": "dot"},
            hovertemplate="before training<br>pass@%{x} = %{y:.4f}<extra></extra>",
        )
    )
    said = "; ".join(f"{trace.name}: {', '.join(f'{value:.3f}' for value in trace.y)}" for trace in figure.data)
    figure.update_xaxes(title_text="k", type="log", tickvals=sorted(names), ticktext=[str(k) for k in sorted(names)])
    figure.update_yaxes(title_text="pass@k, share of problems")
    note = "SCOPE, arXiv 2604.10688, figures 1a and 4; test problems. "
    note += lines.read_band(line for _, line in tested).replace("band:", "bars:")
    return dress(figure, question, alt=f"pass@k for k = {', '.join(map(str, sorted(names)))}. {said}.", note=note)


def every(selected: Selected) -> list[go.Figure]:
    """All of them for which the runs logged something."""
    drawn = [kl_map(selected), support(selected), pass_at_k(selected), rock_arms(selected)]
    drawn += [curve(selected, name) for name in CURVES]
    return [figure for figure in drawn if not style.words(figure)["empty"]]
