"""Lines with seed bands: how any scalar develops, in one style per method, several scalars beside each other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from dashboards.runs import AXES, Curve, Selected, curves
from dashboards.style import Style, dress, empty, panels, panels_height, short
from opd_lab.compare.guard import same_axis

WIDE = 2  # decades from which a logarithmic axis has numbers at the powers of ten alone
MARKERS = 16  # points of a line that get a marker as well
BAND = "Line: mean over seeds; band: from the lowest to the highest seed."


def draw(
    selected: Selected,
    question: str,
    metrics: Mapping[str, str],
    *,
    unit: str,
    missing: str,
    x: str = "steps",
    log: bool = False,
    note: str = "",
    alike: bool = False,
) -> go.Figure:
    """One panel per metric (name -> its title), one line per method; `missing` says how to get what is not
    there; `alike`: the panels share their vertical axis."""
    try:
        for name in metrics:
            same_axis(selected.folders, name)
        found = {name: drawn for name in metrics if (drawn := curves(selected, name, x))}
    except ValueError as refusal:
        return empty(question, f"Not drawn: {refusal}.")
    if not found:
        return empty(question, missing)
    titles = [metrics[name] for name in found]
    figure, places = panels(titles if len(titles) > 1 else [""], alike=alike)
    shown: set[str] = set()
    traces: list[go.Scatter] = []
    at: list[tuple[int, int]] = []
    for (row, column), lines in zip(places, found.values()):
        for line in lines:
            traces += (made := _line(line, selected.styles[line.label], unit, legend=line.label not in shown))
            at += [(row, column)] * len(made)
            shown.add(line.label)
        figure.update_xaxes(title_text=AXES[x], row=row, col=column)
        if log:
            dtick = 1 if _decades(lines) >= WIDE else None
            figure.update_yaxes(type="log", exponentformat="power", dtick=dtick, row=row, col=column)
        if column == 1:
            figure.update_yaxes(title_text=unit, row=row, col=column)
    figure.add_traces(traces, [row for row, _ in at], [column for _, column in at])
    every = max(line.every for lines in found.values() for line in lines)
    said = [note, BAND if any(line.seeds > 1 for lines in found.values() for line in lines) else ""]
    said.append(f"Every {every}th step is drawn." if every > 1 else "")
    figure.update_layout(legend={"groupclick": "togglegroup"})
    height = 400 if len(titles) == 1 else panels_height(titles)
    return dress(figure, question, alt=_alt(found, metrics, unit), note=" ".join(filter(None, said)), height=height)


def _line(line: Curve, style: Style, unit: str, *, legend: bool) -> list[go.Scatter]:
    # Single precision: seven digits, more than hover shows, in half the bytes.
    points = {name: line.points[name].to_numpy(np.float32) for name in line.points}
    x, low, high = points["x"], points["low"], points["high"]
    size_S = np.zeros(len(x), np.int8)
    size_S[:: max(len(x) // MARKERS, 1)] = 7
    traces = []
    if line.seeds > 1:
        traces.append(
            go.Scatter(
                x=np.concatenate([x, x[::-1]]),
                y=np.concatenate([high, low[::-1]]),
                mode="lines",  # of a short line, Plotly would mark the points in colours of its own
                fill="toself",
                fillcolor=style.band(),
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
                legendgroup=line.label,
            )
        )
    shown = ["step", "low", "high", "seeds"] if line.seeds > 1 else ["step"]
    spread = "<br>%{customdata[1]:.6g} to %{customdata[2]:.6g} over %{customdata[3]} runs" if line.seeds > 1 else ""
    traces.append(
        go.Scatter(
            x=x,
            y=points["mean"],
            customdata=np.stack([points[name] for name in shown], 1),
            name=short(line.label),
            legendgroup=line.label,
            showlegend=legend,
            mode="lines+markers",
            line={"color": style.colour, "dash": style.dash, "width": 2},
            marker={"symbol": style.symbol, "size": size_S, "color": style.colour, "opacity": 1, "line": {"width": 0}},
            hovertemplate=f"{line.label}<br>step %{{customdata[0]}}, x = %{{x:,.6~g}}<br>%{{y:.6g}} {unit}{spread}"
            "<extra></extra>",
        )
    )
    return traces


def _decades(lines: list[Curve]) -> float:
    """How many powers of ten lines and bands span: over fewer than two, ticks at powers alone would leave an axis
    without a number."""
    drawn = np.concatenate([line.points[["low", "high"]].to_numpy().ravel() for line in lines])
    above = drawn[drawn > 0]
    return float(np.log10(above.max() / above.min())) if len(above) else 0.0


def _alt(found: Mapping[str, list[Curve]], metrics: Mapping[str, str], unit: str) -> str:
    said = []
    for name, lines in found.items():
        ends = ", ".join(f"{line.label} {line.points['mean'].iloc[-1]:.4g}" for line in lines)
        said.append(f"{metrics[name] or name} at the end, {unit}: {ends}")
    return "Lines over training. " + "; ".join(said) + "."
