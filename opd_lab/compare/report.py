"""A comparison as one HTML file that needs no network: pictures are inside it, and it can be mailed."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_lab.compare.guard import CONVENTIONS, conventions, same_axis
from opd_lab.compare.table import CAPTION, HEAD, Group, budget_line, cells, groups, notes, table
from opd_lab.tracking import read
from opd_lab.tracking.figures import heat_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

HIGH_LOSS_ROWS = 15
QUANTILES = {"kl/reverse_p50_nats": ":", "kl/reverse_p90_nats": "--", "kl/reverse_p99_nats": "-"}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { border: 1px solid #ccc; padding: .25em .6em }
th { background: #f4f4f4; text-align: left } td.n { text-align: right; font-variant-numeric: tabular-nums }
td.code { font-family: ui-monospace, monospace; white-space: pre-wrap }
.row { display: flex; flex-wrap: wrap; gap: 1em }
"""


def write_report(folder: Path, runs: read.Runs) -> Path:
    """Write `report.html` into a folder.

    Raises:
        ValueError: there is no finished run.
    """
    found, pooled = table(runs), groups(runs)
    parts = [
        "<h1>Comparison</h1>",
        f"<p>{escape(budget_line(found))}</p>",
        _table(HEAD, [cells(row) for row in found.rows.itertuples()]),
        *(f"<p>{escape(note)}</p>" for note in notes(found)),
        f"<p>{CAPTION} Interval: bootstrap over the problems.</p>",
        "<h2>Accuracy during training</h2>",
        "<p>Validation problems; mean over seeds, the band reaches from the lowest to the highest.</p>",
        _curves(pooled, lambda name: name.startswith("eval/validation/avg_at_"), "validation accuracy"),
        "<h2>KL(student || teacher) of the sampled tokens</h2>",
        "<p>Mean over all generated tokens of a step.</p>",
        _curves(pooled, lambda name: name == "kl/reverse_mean_nats", "nats", scale="log"),
        "<p>Quantiles over tokens: dotted 50 %, dashed 90 %, solid 99 %.</p>",
        _curves(pooled, lambda name: name in QUANTILES, "nats", scale="log"),
        "<p>Histograms over training; the bins and colours are the same for every method.</p>",
        _heat_maps(pooled, "kl/reverse_nats"),
        "<h2>The loss</h2>",
        _loss(pooled),
        "<h2>Token types that carry the divergence</h2>",
        *(_high_loss(group) for group in pooled),
    ]
    path = folder / "report.html"
    title = escape(", ".join(group.label for group in pooled))
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    return path


def _table(head: Iterable[str], rows: Iterable[Sequence[str]], code: Sequence[int] = ()) -> str:
    kinds = {place: ' class="code"' for place in code} | {0: ' class="code"'}
    body = "".join(
        "<tr>" + "".join(f"<td{kinds.get(i, ' class=n')}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>{body}</table>"


def _curves(pooled: list[Group], wanted: Any, unit: str, scale: str = "linear") -> str:
    """One line per method and metric: the mean over seeds, and the range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes: Axes = figure.subplots()
    for place, group in enumerate(pooled):
        metrics = read.metrics(group.folders)
        for number, name in enumerate(sorted(filter(wanted, metrics["name"].unique()))):
            label = group.label if number == 0 else None
            _line(axes, metrics.query("name == @name"), f"C{place}", label, QUANTILES.get(name, "-"))
    if not axes.lines:
        return "<p>Not logged.</p>"
    axes.set(xlabel="step", ylabel=unit, yscale=scale)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return _svg(figure)


def _line(axes: Axes, metrics: DataFrame, colour: str, label: str | None, style: str) -> None:
    by_step = metrics.groupby("step").value
    mean, low, high = by_step.mean(), by_step.min(), by_step.max()
    axes.plot(mean.index, mean, style, color=colour, label=label, linewidth=1.4)
    axes.fill_between(mean.index, low, high, color=colour, alpha=0.15, linewidth=0)


def _svg(figure: Any) -> str:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "opd_lab"}):  # the same picture gives the same file
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _heat_maps(pooled: list[Group], name: str) -> str:
    pictures = []
    for group in pooled:
        found = read.histograms(group.folders)
        records = [row for row in found.to_dict("records") if row["name"] == name]
        if not records:
            continue
        by_step: dict[int, list[int]] = {}
        for row in sorted(records, key=lambda row: row["step"]):
            before = by_step.get(row["step"], [0] * len(row["counts"]))
            by_step[row["step"]] = [a + b for a, b in zip(before, row["counts"])]
        picture = heat_map(f"{group.label}  {name}", records[0]["bins"], list(by_step), list(by_step.values()))
        buffer = io.BytesIO()
        picture.save(buffer, "png")
        data = base64.b64encode(buffer.getvalue()).decode()
        pictures.append(f'<img alt="{escape(group.label)} {name}" src="data:image/png;base64,{data}">')
    return f'<div class="row">{"".join(pictures)}</div>' if pictures else "<p>Not logged.</p>"


def _loss(pooled: list[Group]) -> str:
    """The losses on one axis, if they are one quantity; what they are, in any case."""
    rows = [[g.label, *(conventions(g.folders[0]).get(name, "-") for name in CONVENTIONS)] for g in pooled]
    said = _table(("method", *CONVENTIONS), rows, code=range(1, len(CONVENTIONS) + 1))
    try:
        same_axis([folder for group in pooled for folder in group.folders], "loss/total_value")
    except ValueError as refusal:
        return said + f"<p>Not drawn: {escape(str(refusal))}.</p>"
    return said + _curves(pooled, lambda name: name == "loss/total_value", "loss")


def _high_loss(group: Group) -> str:
    """The last table of the first seed."""
    found = read.tokens(group.folders[:1])
    title = f"<h3>{escape(group.label)}</h3>"
    if not len(found):
        return title + "<p>Not logged.</p>"
    last = [row for row in found.to_dict("records") if row["step"] == found["step"].max()][:HIGH_LOSS_ROWS]
    rows = [
        [
            repr(row["token"]),
            f"{row['count']:,}",
            f"{row['kl_mean_nats']:.3f} ± {row['kl_std_nats']:.3f}",
            f"{row['kl_max_nats']:.2f}",
            f"{100 * row['kl_share_fraction']:.1f} %",
            f"{row['enrichment_ratio']:.2f}",
            f"{row['p_student_mean']:.2f}",
            f"{row['p_teacher_mean']:.2f}",
            f"{row['persistence_windows']} of {row['windows']}",
            row["example"],
        ]
        for row in last
    ]
    head = (
        "token",
        "count",
        "KL, nats",
        "max",
        "share of KL",
        "enrichment",
        "p student",
        "p teacher",
        "high in windows",
    )
    return title + _table((*head, "largest KL, in context"), rows, code=(9,))
