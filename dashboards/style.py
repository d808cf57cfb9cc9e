"""How every figure looks: one style per method, light and dark, a question as title, a text for who cannot see it.

A figure carries its words in `layout.meta`: `alt` (what it shows, in words), `note` (how to read it) and, where there
is nothing to draw, `empty` (what to do to get it). A surface prints the title, note and empty state as text.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

# Okabe and Ito's colours that stand out on white and on black: told apart with every common colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star")
STYLES = len(COLOURS) * len(DASHES) * len(SYMBOLS)
# Methods that are often compared have places of their own; every other name's place is a digest of it.
PLACES = ("opd", "scope", "fire_opd", "rock_tokens", "tropd", "kat", "omniopd", "trb", "oprd_bridge", "opd_sampled")
SCALE = "Viridis"  # of heat maps: its order survives grey printing
LABEL_LETTERS = 34  # of a method's name in legends and panel titles; hover has all of it
PANELS = 24  # small multiples drawn at most
COLUMNS = 3  # of small multiples

INK = {False: "#1F2328", True: "#E6E8EB"}
GRID = {False: "#D9DDE2", True: "#3A3F47"}


@dataclass(frozen=True)
class Style:
    colour: str
    dash: str
    symbol: str

    def band(self) -> str:
        red, green, blue = (int(self.colour[i : i + 2], 16) for i in (1, 3, 5))
        return f"rgba({red},{green},{blue},0.16)"


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """A style per method: a pure function of its name, but for two names of one comparison that fall on the same place,
    of which the later in the alphabet moves on to the next. Of more names than there are styles, some share one."""
    places: dict[str, int] = {}
    for label in sorted(set(labels), key=lambda label: (_family(label) not in PLACES, label)):
        place, taken = _place(label), set(places.values())
        while place in taken and len(taken) < STYLES:
            place = (place + 1) % STYLES
        places[label] = place
    return {label: _style(place) for label, place in places.items()}


def _family(label: str) -> str:
    return label.removesuffix("_lab")


def _place(label: str) -> int:
    if _family(label) in PLACES:
        return PLACES.index(_family(label))
    return int.from_bytes(hashlib.sha256(label.encode()).digest()[:4], "big") % STYLES


def _style(place: int) -> Style:
    turn, colour = divmod(place, len(COLOURS))
    return Style(COLOURS[colour], DASHES[turn % len(DASHES)], SYMBOLS[turn % len(SYMBOLS)])


def template(dark: bool) -> go.layout.Template:
    """Transparent, so that a page's own background shows; legible in grey."""
    ink, grid = INK[dark], GRID[dark]
    axis = {
        "gridcolor": grid,
        "linecolor": ink,
        "zerolinecolor": grid,
        "ticks": "outside",
        "tickcolor": grid,
        "automargin": True,
        "title": {"standoff": 8},
    }
    return go.layout.Template(
        layout={
            "font": {"color": ink, "size": 13, "family": "system-ui, sans-serif"},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": list(COLOURS),
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {"font": {"size": 13}, "namelength": -1},
            "legend": {"itemsizing": "constant", "font": {"size": 12}},
            "margin": {"l": 70, "r": 20, "t": 44, "b": 56},
        }
    )


LIGHT, DARK = template(False), template(True)


def dress(figure: go.Figure, question: str, *, alt: str, note: str = "", height: int = 400) -> go.Figure:
    """Give a figure its question, its words and its look."""
    figure.update_layout(title={"text": question, "font": {"size": 16}}, template=LIGHT, height=height)
    figure.update_layout(meta={"alt": alt, "note": note, "empty": ""})
    return figure


def empty(question: str, what_to_do: str) -> go.Figure:
    """Nothing to draw: say what to do instead of showing bare axes."""
    figure = dress(go.Figure(), question, alt=what_to_do, height=140)
    text = "<br>".join(textwrap.wrap(what_to_do, 100))
    figure.add_annotation(text=text, showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper")
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.layout.meta = {"alt": what_to_do, "note": "", "empty": what_to_do}
    return figure


def bare(figure: Any, look: go.layout.Template | None) -> go.Figure:
    """The figure for a page that prints the question itself, and perhaps lays the template itself."""
    # An empty text, not None: some front ends write "undefined" for a title that is not there.
    return figure.update_layout(title={"text": ""}, template=look, margin={"t": _top(figure)})


def _top(figure: Any) -> int:
    return 30 if figure.layout.annotations else 12


def words(figure: Any) -> dict[str, str]:
    """question, alt, note and empty."""
    return {"question": figure.layout.title.text, **figure.layout.meta}


def short(label: str) -> str:
    return label if len(label) <= LABEL_LETTERS else label[: LABEL_LETTERS - 1] + "…"


def panels(titles: Sequence[str], *, alike: bool = True) -> tuple[go.Figure, list[tuple[int, int]]]:
    """Small multiples on one horizontal axis, and on one vertical axis where they show like things: the figure, and
    the (row, column) of each panel."""
    from plotly.subplots import make_subplots

    columns = min(COLUMNS, len(titles))
    rows = -(-len(titles) // columns)
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=[short(title) for title in titles],
        shared_xaxes="all",  # pyright: ignore[reportArgumentType]
        shared_yaxes="all" if alike else False,  # pyright: ignore[reportArgumentType]
        horizontal_spacing=0.03 if alike else 0.06,
        vertical_spacing=min(0.12, 44 / (panel_height(rows) * rows)),
    )
    figure.update_annotations(font_size=13)
    return figure, [(place // columns + 1, place % columns + 1) for place in range(len(titles))]


def panel_height(rows: int) -> int:
    return 300 if rows == 1 else 220


def panels_height(titles: Sequence[str]) -> int:
    rows = -(-len(titles) // min(COLUMNS, len(titles)))
    return panel_height(rows) * rows + 90


def name_steps(figure: go.Figure, places: Sequence[tuple[int, int]]) -> None:
    """Under the lowest panel of each column, where the shared axis has its numbers."""
    for row, column in {column: (row, column) for row, column in places}.values():
        figure.update_xaxes(title_text="step", showticklabels=True, row=row, col=column)
