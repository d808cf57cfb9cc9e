"""How good do the students become, and at what price?"""

from __future__ import annotations

import re

import plotly.graph_objects as go

from dashboards.figures import lines
from dashboards.runs import AXES, Frame, Selected
from dashboards.style import dress, empty, short

VALIDATION = re.compile(r"eval/validation/(avg_at_\d+)$")
GREY = "#8A8F98"
LINE = 34  # pixels per method of the final figure


def accuracy(selected: Selected, x: str = "steps") -> go.Figure:
    """Validation accuracy during training against what was spent."""
    names = {n: match[1].replace("_", " ") for n in selected.names() if (match := VALIDATION.match(n))}
    question = f"How fast does accuracy rise with {AXES[x].split(',')[0]}?"
    return lines.draw(
        selected,
        question,
        names,
        unit="share of correct rollouts",
        missing="No validation accuracy was logged: it needs graded data and evaluate.every > 0.",
        x=x,
        note="Validation problems.",
    )


def final(selected: Selected, baseline: str | None = None) -> go.Figure:
    """Test accuracy after training with its interval, and the accuracy before."""
    question = "Which student is better after training?"
    try:
        rows: Frame = selected.compared(baseline).rows.dropna(subset="accuracy_after")
    except ValueError as refusal:
        return empty(question, f"Nothing to compare yet: {refusal}.")
    if not len(rows):
        return empty(question, "No test accuracy was logged: it needs graded data and evaluate.test_problems > 0.")
    rows = rows.sort_values("accuracy_after")
    figure = go.Figure()
    names = [short(label) for label in rows["method"]]
    figure.add_trace(
        go.Scatter(
            x=rows["accuracy_before"],
            y=names,
            mode="markers",
            name="before",
            marker={"symbol": "line-ns-open", "size": 12, "color": GREY},
            hovertemplate="%{y}, before: %{x:.4f}<extra></extra>",
        )
    )
    styles = [selected.styles[label] for label in rows["method"]]
    figure.add_trace(
        go.Scatter(
            x=rows["accuracy_after"],
            y=names,
            mode="markers",
            name="after, 95 % interval",
            marker={"color": [s.colour for s in styles], "symbol": [s.symbol for s in styles], "size": 10},
            error_x={
                "array": rows["accuracy_high"] - rows["accuracy_after"],
                "arrayminus": rows["accuracy_after"] - rows["accuracy_low"],
                "color": GREY,
                "thickness": 1.6,
            },
            customdata=rows[["method", "accuracy_low", "accuracy_high", "seeds"]],
            hovertemplate="%{customdata[0]}: %{x:.4f} [%{customdata[1]:.4f}, %{customdata[2]:.4f}], "
            "%{customdata[3]} seeds<extra></extra>",
        )
    )
    figure.add_trace(
        go.Scatter(
            x=rows["accuracy_best"],
            y=names,
            mode="markers",
            name="at the checkpoint that validation chose",
            marker={"symbol": "diamond-open", "size": 9, "color": GREY},
            customdata=rows[["best_step", "best_gain"]],
            hovertemplate="%{y}, best checkpoint: %{x:.4f}, step %{customdata[0]:.0f}, %{customdata[1]:+.4f} against "
            "the last<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="share of correct rollouts, test problems", rangemode="tozero")
    figure.update_layout(legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0})
    said = "; ".join(
        f"{r.method} {r.accuracy_after:.3f} [{r.accuracy_low:.3f}, {r.accuracy_high:.3f}]" for r in rows.itertuples()
    )
    return dress(
        figure,
        question,
        alt=f"Test accuracy after training with 95 % intervals: {said}.",
        height=130 + LINE * len(rows),
    )


def gains(selected: Selected, baseline: str | None = None) -> go.Figure:
    """Differences from a baseline, paired by problem, with intervals; filled where chance is ruled out."""
    question = "Is the difference larger than chance?"
    try:
        found = selected.compared(baseline)
    except ValueError as refusal:
        return empty(question, f"Nothing to compare yet: {refusal}.")
    rows: Frame = found.gains
    if not len(rows) or rows["gain"].isna().all():
        return empty(question, "It takes two methods with test problems in common: evaluate.test_problems > 0.")
    rows = rows.dropna(subset="gain").sort_values("gain")
    styles = [selected.styles[label] for label in rows["method"]]
    symbols = [s.symbol + ("" if sure else "-open") for s, sure in zip(styles, rows["separated"])]
    figure = go.Figure(
        go.Scatter(
            x=100 * rows["gain"],
            y=[short(label) for label in rows["method"]],
            mode="markers",
            marker={"color": [s.colour for s in styles], "symbol": symbols, "size": 10},
            error_x={
                "array": 100 * (rows["gain_high"] - rows["gain"]),
                "arrayminus": 100 * (rows["gain"] - rows["gain_low"]),
                "color": GREY,
                "thickness": 1.6,
            },
            customdata=rows[["method", "gain_low", "gain_high", "p_holm", "improvement"]],
            hovertemplate="%{customdata[0]}: %{x:+.2f} points [%{customdata[1]:+.4f}, %{customdata[2]:+.4f}]<br>"
            "p after Holm %{customdata[3]:.4g}; better on a problem %{customdata[4]:.3f}<extra></extra>",
            showlegend=False,
        )
    )
    figure.add_vline(x=0, line={"color": GREY, "dash": "dot"})
    figure.update_xaxes(title_text=f"accuracy over {found.baseline}, percentage points, 95 % interval")
    one_seed = bool((rows["speaks_of"] == "problems").any())
    warning = " Where a method has one seed, of these very runs: another seed may undo it." if one_seed else ""
    said = "; ".join(
        f"{r.method} {100 * r.gain:+.1f} [{100 * r.gain_low:+.1f}, {100 * r.gain_high:+.1f}]"
        f"{'' if r.separated else ', not separated'}"
        for r in rows.itertuples()
    )
    return dress(
        figure,
        question,
        alt=f"Accuracy over {found.baseline} after training, percentage points: {said}.",
        note=f"Paired by problem. Filled: p <= 0.05 after Holm over {found.comparisons} comparisons.{warning}",
        height=110 + LINE * max(len(rows), 2),
    )
