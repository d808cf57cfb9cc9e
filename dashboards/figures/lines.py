"""Lines with intervals: how any scalar develops, in one style per method, several scalars beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from dashboards.runs import AXES, Curve, Selected, curves
from dashboards.style import Style, dress, empty, panels, panels_height, short
from opd_lab.compare.guard import same_axis

REACH = 0.5  # of what the seeds span, by which a band may reach beyond them before the axis cuts it
TINY = 1e-12  # what a logarithmic axis takes for 0
CUT = "The axis cuts bands that are far wider than what was measured; a double click shows all of them."
WIDE = 2  # decades from which a logarithmic axis has numbers at the powers of ten alone
MARKERS = 16  # points of a line that get a marker as well
BANDS = {  # what an interval speaks of -> how its band is read
    "problems and seeds": "over problems and seeds",
    "problems": "over problems where there is one seed, which says nothing of other seeds",
    "seeds": "over seeds",
}


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
    cut = _frame(figure, places, list(found.values()), log=log, alike=alike)
    every = max(line.every for lines in found.values() for line in lines)
    said = [note, read_band(line for lines in found.values() for line in lines), CUT if cut else ""]
    said.append(f"Every {every}th step is drawn." if every > 1 else "")
    figure.update_layout(legend={"groupclick": "togglegroup"})
    height = 400 if len(titles) == 1 else panels_height(titles)
    return dress(figure, question, alt=_alt(found, metrics, unit), note=" ".join(filter(None, said)), height=height)


def read_band(lines: Iterable[Curve]) -> str:
    """How line and band are read; without several seeds and without a band there is nothing to say."""
    points = [line.points for line in lines]
    there = {said for one in points for said in one["speaks_of"].unique()}
    words = " or ".join(BANDS[said] for said in BANDS if said in there)
    several = any(bool((one["seeds"] > 1).any()) for one in points)
    said = ["line: mean over seeds"] if several else []
    said += [f"band: 95 % interval {words}"] if words else []
    said += ["a method with one seed has none"] if several and "nothing" in there else []
    return f"{'; '.join(said).capitalize()}." if said else ""


def _line(line: Curve, style: Style, unit: str, *, legend: bool) -> list[go.Scatter]:
    # Single precision: seven digits, more than hover shows, in half the bytes.
    numbers = ("step", "x", "mean", "low", "high", "lowest", "highest", "seeds")
    points = {name: line.points[name].to_numpy(np.float32) for name in numbers}
    size_S = np.zeros(len(line.points), np.int8)
    size_S[:: max(len(line.points) // MARKERS, 1)] = 7
    traces = []
    there_S = ~np.isnan(points["low"])
    if there_S.any():
        x, low, high = (points[name][there_S] for name in ("x", "low", "high"))
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
    shown, spread = ["step"], ""
    if there_S.any():
        shown, spread = [*shown, "low", "high"], "<br>95 % [%{customdata[1]:.6g}, %{customdata[2]:.6g}]"
        spread += f" over {line.points['speaks_of'][there_S].iloc[-1]}"
    if points["seeds"].max() > 1:
        place = len(shown)
        shown += ["lowest", "highest", "seeds"]
        spread += f"<br>%{{customdata[{place + 2}]}} seeds from %{{customdata[{place}]:.6g}}"
        spread += f" to %{{customdata[{place + 1}]:.6g}}"
    traces.append(
        go.Scatter(
            x=points["x"],
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


def _frame(
    figure: go.Figure, places: Sequence[tuple[int, int]], panels: Sequence[list[Curve]], *, log: bool, alike: bool
) -> bool:
    """Keep the axes at what was measured: the t interval of two seeds is wide enough to press all lines flat. Whether
    a band is cut by that."""
    sets = [[line for lines in panels for line in lines]] * len(panels) if alike else panels
    cut = False
    for (row, column), lines in zip(places, sets):
        seen, bands = (
            np.concatenate([line.points[list(names)].to_numpy(float).ravel() for line in lines])
            for names in (("lowest", "highest"), ("low", "high"))
        )
        if log:
            seen, bands = (np.log10(np.maximum(values, TINY)) for values in (seen[seen > 0], bands))
        if not len(seen) or np.isnan(bands).all():
            continue
        least, most = seen.min(), seen.max()
        room = REACH * ((most - least) or 1.0)
        low, high = max(np.nanmin(bands), least - room), min(np.nanmax(bands), most + room)
        if low > np.nanmin(bands) or high < np.nanmax(bands):
            cut = True
            figure.update_yaxes(range=[min(low, least), max(high, most)], row=row, col=column)
    return cut


def _decades(lines: list[Curve]) -> float:
    """How many powers of ten the seeds span: over fewer than two, ticks at powers alone would leave an axis
    without a number."""
    drawn = np.concatenate([line.points[["lowest", "highest"]].to_numpy().ravel() for line in lines])
    above = drawn[drawn > 0]
    return float(np.log10(above.max() / above.min())) if len(above) else 0.0


def _alt(found: Mapping[str, list[Curve]], metrics: Mapping[str, str], unit: str) -> str:
    said = []
    for name, lines in found.items():
        ends = ", ".join(f"{line.label} {_end(line)}" for line in lines)
        said.append(f"{metrics[name] or name} at the end, {unit}: {ends}")
    return "Lines over training. " + "; ".join(said) + "."


def _end(line: Curve) -> str:
    last = line.points.iloc[-1]
    interval = "" if last["speaks_of"] == "nothing" else f" [{last['low']:.4g}, {last['high']:.4g}]"
    return f"{last['mean']:.4g}{interval}"
