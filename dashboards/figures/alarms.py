"""Did anything go wrong, and when?"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from dashboards.runs import Frame, Selected
from dashboards.style import dress, empty, short

MISSING = "No alarm was raised. Thresholds are in conf/diagnostics; runs that keep no table `alarms` cannot raise any."
COLUMNS = ("method", "run", "step", "alarm", "value", "threshold", "message")


def rows(selected: Selected) -> Frame:
    """Every alarm of every run."""
    found = selected.table("alarms")
    if not len(found):
        return pd.DataFrame(columns=list(COLUMNS))
    found = found.assign(method=found["label"], run=[folder.rsplit("/", 1)[-1] for folder in found["folder"]])
    return found[list(COLUMNS)].sort_values("step", ignore_index=True)


def timeline(selected: Selected) -> go.Figure:
    """A mark where an alarm began."""
    question = "Which alarms were raised, and when?"
    found = rows(selected)
    if not len(found):
        return empty(question, MISSING)
    figure = go.Figure()
    for label in list(dict.fromkeys(found["method"])):
        mine, style = found[found["method"] == label], selected.styles[label]
        figure.add_trace(
            go.Scatter(
                x=mine["step"],
                y=mine["alarm"],
                mode="markers",
                name=short(label),
                marker={"color": style.colour, "symbol": style.symbol, "size": 12},
                customdata=mine[["run", "message"]],
                hovertemplate="%{customdata[0]}<br>%{y} at step %{x}<br>%{customdata[1]}<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="step")
    said = "; ".join(f"{r.run}: {r.alarm} at step {r.step}" for r in found.itertuples())
    return dress(figure, question, alt=f"Alarms: {said}.", height=170 + 34 * found["alarm"].nunique())
