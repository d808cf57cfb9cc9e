"""What does a method cost, and where does the time go?"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from dashboards.runs import Frame, Selected
from dashboards.style import COLOURS, dress, empty, short
from opd_lab.compare import budget

# Part of a step -> its metric; what is left of time/step_seconds is "other".
SECONDS = {
    "rollout": "time/rollout_seconds",
    "teacher": "time/teacher_seconds",
    "update": "time/update_seconds",
    "diagnostics": "time/diagnostics_seconds",
}
STEP, EVALUATION = "time/step_seconds", "time/evaluation_seconds"
HATCHES = ("", "/", "x", ".", "-", "+")  # parts are told apart without colours too
BAR = 30  # pixels per method


def seconds(selected: Selected) -> go.Figure:
    """Seconds of a whole run by what they went into; the mean over seeds."""
    question = "Where does the time go?"
    found = selected.metrics([*SECONDS.values(), STEP, EVALUATION])
    if not len(found):
        return empty(question, "No times were logged yet: they come with the first step.")
    total = found.groupby(["label", "folder", "name"])["value"].sum().groupby(["label", "name"]).mean().unstack()
    total = total.reindex(columns=[*SECONDS.values(), STEP, EVALUATION]).fillna(0.0)
    parts: Frame = pd.DataFrame({part: total[name] for part, name in SECONDS.items()})
    parts["other"] = (total[STEP] - parts.sum(axis=1)).clip(lower=0)
    parts["evaluation"] = total[EVALUATION]
    return _bars(
        selected, parts, question, "seconds per run", "Mean over seeds; the table's seconds are without evaluation."
    )


def tokens(selected: Selected) -> go.Figure:
    """Tokens of a whole run by who read or wrote them; the mean over seeds."""
    question = "How many tokens does each method ask of student and teacher?"
    found = selected.metrics(list(budget.metrics_of("student_tokens", "teacher_tokens")))
    if not len(found):
        return empty(question, "No tokens were counted yet: they come with the first step.")
    of_run = [{"label": label, **budget.tokens(mine)} for (label, _), mine in found.groupby(["label", "folder"])]
    parts: Frame = pd.DataFrame(of_run).groupby("label").mean()
    parts = parts.loc[:, parts.any()]
    note = "Mean over seeds; evaluations are not counted. The teacher's parts add up to the table's teacher tokens."
    return _bars(selected, parts, question, "tokens per run", note)


def _bars(selected: Selected, parts: Frame, question: str, unit: str, note: str) -> go.Figure:
    parts = parts.reindex([label for label in selected.labels if label in parts.index])
    figure = go.Figure()
    for place, part in enumerate(parts):
        figure.add_trace(
            go.Bar(
                y=[short(label) for label in parts.index],
                x=parts[part],
                name=str(part),
                orientation="h",
                customdata=list(parts.index),
                marker={
                    "color": COLOURS[place],
                    "pattern": {
                        "shape": HATCHES[place],
                        "fillmode": "overlay",
                        "fgcolor": "rgba(255,255,255,0.55)",
                        "size": 7,
                    },
                },
                hovertemplate=f"%{{customdata}}<br>{part}: %{{x:,.6~g}} {unit}<extra></extra>",
            )
        )
    figure.update_layout(barmode="stack", legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0})
    figure.update_layout(legend_traceorder="normal")
    figure.update_xaxes(title_text=unit)
    figure.update_yaxes(autorange="reversed")
    said = "; ".join(f"{label} {row.sum():,.4g}" for label, row in parts.iterrows())
    return dress(
        figure, question, alt=f"Stacked bars, {unit}: {said}.", note=note, height=140 + BAR * max(len(parts), 2)
    )
