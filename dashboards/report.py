"""A comparison as one HTML file that needs no network: figures, tables and plotly.js are inside. It can be mailed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from dashboards import style
from dashboards.figures import accuracy, alarms, cost, divergence, estimators, papers, rollouts, sweep, tokens
from dashboards.runs import Selected, select
from opd_lab.compare.guard import CONVENTIONS, conventions
from opd_lab.compare.printed import HEAD, caption, gains_caption, gains_cells, gains_head, notes, row_cells
from opd_lab.tracking import coloured, read

HERE = Path(__file__).parent
TOKEN_ROWS = 15  # per method
ANSWER = "method"


@dataclass(frozen=True)
class Section:
    title: str
    parts: list[str]


def write_report(folder: Path, runs: read.Runs, baseline: str | None = None) -> Path:
    """Write `report.html` into a folder: about the finished runs, and if there are none, about all of them."""
    found = select(runs, ("FINISHED",))
    path = folder / "report.html"
    path.write_text(page(found if found.groups else select(runs), found.groups == [], baseline))
    return path


def page(selected: Selected, unfinished: bool, baseline: str | None = None) -> str:
    sections = list(_sections(selected, unfinished, baseline))
    title = "Comparison of " + ", ".join(selected.labels)
    links = "".join(f'<li><a href="#s{i}">{escape(s.title)}</a></li>' for i, s in enumerate(sections))
    body = "".join(
        f'<section id="s{i}"><h2>{escape(s.title)}</h2>{"".join(s.parts)}</section>' for i, s in enumerate(sections)
    )
    templates = json.dumps([style.LIGHT.to_plotly_json(), style.DARK.to_plotly_json()])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(style.short(title))}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{(HERE / 'report.css').read_text()}{rollouts.STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><header><h1>{escape(title)}</h1></header>"
        f'<nav aria-label="Contents"><ol>{links}</ol></nav><main>{body}</main>'
        f"<script>const TEMPLATES = {templates};{(HERE / 'report.js').read_text()}</script></body></html>\n"
    )


def _sections(selected: Selected, unfinished: bool, baseline: str | None) -> Iterator[Section]:
    yield Section("Which method is better?", [*_answer(selected, unfinished, baseline)])
    yield Section(
        "What does it cost?",
        [
            *_figures(accuracy.accuracy(selected, x) for x in ("student_tokens", "teacher_tokens", "seconds", "flops")),
            *_figures([cost.seconds(selected), cost.tokens(selected)]),
        ],
    )
    yield Section(
        "How do student and teacher come together?",
        _figures(
            [
                divergence.kl(selected),
                divergence.quantiles(selected),
                divergence.probes(selected),
                divergence.histogram(selected),
                divergence.positions(selected),
                divergence.entropy(selected),
                divergence.overlap(selected),
            ]
        ),
    )
    yield Section("Which tokens carry the divergence?", [*_figures([tokens.shares(selected)]), _types(selected)])
    yield Section("What do they write?", _rollouts(selected, baseline))
    yield Section(
        "What is minimised?", [_losses(selected), *_figures([divergence.loss(selected), estimators.lens(selected)])]
    )
    yield Section("Did anything go wrong?", [*_figures([alarms.timeline(selected)]), _alarms(selected)])
    yield from _search(selected)
    if drawn := papers.every(selected):
        yield Section("The papers' own figures", _figures(drawn))


def _answer(selected: Selected, unfinished: bool, baseline: str | None) -> Iterator[str]:
    if unfinished:
        states = ((folder.name, read.status(folder)["status"]) for folder in selected.folders)
        said = ", ".join(f"{name} {status}" for name, status in states) or "no run"
        yield f'<p role="status">No run has finished: {escape(said)}. What they logged is below.</p>'
    else:
        found = selected.compared(baseline)
        yield _table(HEAD, [row_cells(row) for row in found.rows.itertuples()], "Accuracy and cost of every method")
        yield f'<p class="note">{escape(caption(found))}</p>'
        if len(found.gains):
            rows = [gains_cells(row) for row in found.gains.itertuples()]
            yield _table(gains_head(found), rows, f"Every method against {found.baseline}")
            yield f'<p class="note">{escape(gains_caption(found))}</p>'
        yield "".join(f"<p>{escape(note)}</p>" for note in notes(found))
        yield from _figures([accuracy.final(selected, baseline), accuracy.gains(selected, baseline)])
    yield from _figures([accuracy.accuracy(selected)])


def _search(selected: Selected) -> Iterator[Section]:
    """A sweep over hyperparameters, not over methods alone."""
    searched = sweep.searchable(selected)
    study = (sweep.study_with(selected) or sweep.study_of(selected)) if searched else None
    varied = {name for trial in study.trials for name in trial.params} if study is not None else set()
    if study is not None and varied - {"method"}:
        drawn = [sweep.response(selected, name) for name in searched if name in varied]
        yield Section("Which hyperparameters matter?", _figures([*drawn, *sweep.overview(study)]))


def _rollouts(selected: Selected, baseline: str | None) -> list[str]:
    """The baseline beside the most accurate other method, at the first and the last step that kept rollouts."""
    one, other = _two(selected, baseline)
    found = rollouts.pairs(selected, one, other)
    head = f"<h3>{escape(rollouts.QUESTION)}</h3>"
    if not found:
        return [head, f'<p role="status" class="empty">{escape(rollouts.MISSING)}</p>']
    shown = [rollouts.beside(*found[place]) for place in dict.fromkeys((0, len(found) - 1))]
    return [head, coloured.legend(), *shown]


def _two(selected: Selected, baseline: str | None) -> tuple[str, str]:
    try:
        found: Any = selected.compared(baseline)
    except ValueError:
        return selected.labels[0], selected.labels[-1]
    others = found.rows[found.rows["method"] != found.baseline]
    best = others.sort_values("accuracy_after", ascending=False)["method"]
    return found.baseline, best.iloc[0] if len(best) else found.baseline


def _losses(selected: Selected) -> str:
    rows = [[g.label, *(conventions(g.folders[0]).get(name, "-") for name in CONVENTIONS)] for g in selected.groups]
    head = (ANSWER, *(name.replace("_", " ") for name in CONVENTIONS))
    return _table(head, rows, "What each method's loss is", text=range(len(CONVENTIONS) + 1))


def _types(selected: Selected) -> str:
    found = tokens.types(selected)
    if not len(found):
        return ""
    found = found.groupby("method", sort=False).head(TOKEN_ROWS)
    columns = [tokens.COLUMNS[name] for name in found]
    rows = [[_formed(value, column.form) for column, value in zip(columns, row)] for row in found.to_numpy(object)]
    text = [place for place, column in enumerate(columns) if not column.form]
    head = [column.heading for column in columns]
    title = f"The {TOKEN_ROWS} token types with the most KL of every method"
    return f'{_table(head, rows, title, text=text, kind="wide")}<p class="note">{escape(tokens.READ)}</p>'


def _alarms(selected: Selected) -> str:
    found = alarms.rows(selected)
    if not len(found):
        return ""
    rows = [[_cell(name, value) for name, value in row.items()] for row in found.to_dict("records")]
    return _table(alarms.COLUMNS, rows, "Alarms", text=(0, 1, 3, 6))


def _formed(value: Any, form: str) -> str:
    return "-" if value is None or value != value else format(value, form)


def _cell(name: Any, value: Any) -> str:
    if isinstance(value, float):
        return f"{100 * value:.1f} %" if str(name).endswith("_fraction") else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(
    head: Iterable[str], rows: Sequence[Sequence[str]], title: str, text: Iterable[int] = (0,), kind: str = ""
) -> str:
    """A table that sorts by the heading that is pressed."""
    words = set(text)
    columns = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in head)
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{"t" if i in words else "n"}">{escape(cell)}</td>' for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll {kind}" tabindex="0" role="region" aria-label="{escape(title)}"><table>'
        f"<caption>{escape(title)}; press a heading to sort</caption><thead><tr>{columns}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _figures(figures: Iterable[go.Figure]) -> list[str]:
    """Each with its question as heading, its words for who cannot see it, and its data as JSON beside it."""
    return [_figure(figure) for figure in figures]


def _figure(figure: go.Figure) -> str:
    words = style.words(figure)
    head = f"<h3>{escape(words['question'])}</h3>"
    if words["empty"]:
        return f'{head}<p role="status" class="empty">{escape(words["empty"])}</p>'
    drawn: Any = style.bare(figure, None)  # the page's script lays the template, light or dark
    height = int(drawn.layout.height)
    data = str(drawn.to_json()).replace("</", "<\\/")
    note = f'<p class="note">{escape(words["note"])}</p>' if words["note"] else ""
    return (
        f'<figure>{head}<div class="plot" role="img" aria-label="{escape(words["alt"])}" style="height:{height}px">'
        f'<script type="application/json">{data}</script></div>{note}</figure>'
    )
