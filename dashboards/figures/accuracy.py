"""How good do the students become, and at what price?"""

from __future__ import annotations

import re

import plotly.graph_objects as go

from dashboards.figures import lines
from dashboards.runs import AXES, Frame, Selected
from dashboards.style import dress, empty, short
from opd_lab.compare.table import table

VALIDATION = re.compile(r"eval/validation/(avg_at_\d+)$")
LINE = 34  # pixels per method of the final figure


def accuracy(selected: Selected, x: str = "steps") -> go.Figure:
    """Validation accuracy during training against what was spent."""
    names = {n: match[1].replace("_", " ") for n in selected.names() if (match := VALIDATION.match(n))}
    question = f"How accurate does the student become for its {AXES[x].title.split(',')[0]}?"
    return lines.draw(
        selected,
        question,
        names,
        unit="share of correct rollouts",
        missing="No validation accuracy was logged: it needs graded data and evaluate.every > 0.",
        x=x,
        note="Validation problems.",
    )


def final(selected: Selected) -> go.Figure:
    """Test accuracy after training with its interval, and the accuracy before."""
    question = "Which student is better after training, and is the difference larger than chance?"
    try:
        rows: Frame = table(selected.folders).rows.dropna(subset="accuracy_after")
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
            marker={"symbol": "line-ns-open", "size": 12, "color": "#8A8F98"},
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
                "color": "#8A8F98",
                "thickness": 1.6,
            },
            customdata=rows[["method", "accuracy_low", "accuracy_high", "seeds"]],
            hovertemplate="%{customdata[0]}: %{x:.4f} [%{customdata[1]:.4f}, %{customdata[2]:.4f}], "
            "%{customdata[3]} seeds<extra></extra>",
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
