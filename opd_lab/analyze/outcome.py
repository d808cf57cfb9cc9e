"""What an analysis found: kept as files in the run folder, logged to the run's MLflow store, and printed.

<run>/analysis/<name>/<file>.parquet | .png | .yaml    tables, pictures, further files
<run>/analysis/<name>/<part>.txt                       question, answer and table, as printed
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from opd_lab.tracking import replay

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "analysis"
Frame = Any  # a pandas table, whose own annotations are unions that no type checker can follow
DPI = 110
WIDTH = 120  # columns of what is printed


@dataclass(frozen=True)
class Outcome:
    question: str
    answer: str  # a sentence or two, with the numbers
    shown: Frame  # the table that is printed
    tables: Mapping[str, Frame] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)  # path below the folder -> text

    def __str__(self) -> str:
        said = (textwrap.fill(line, WIDTH) for line in (self.question, self.answer))
        return f"\n{text(self.shown)}\n".join(said) + "\n"


def frame(rows: Any, **how: Any) -> Frame:
    return pd.DataFrame(rows, **how)


def stacked(frames: Sequence[Frame]) -> Frame:
    """One below the other."""
    return pd.concat(frames, ignore_index=True)


def keep(run: Path, name: str, part: str, found: Outcome) -> Path:
    """Write everything below `run/analysis/name`, and log it. The folder."""
    folder = run / FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    for stem, table in found.tables.items():
        table.to_parquet(folder / f"{stem}.parquet", index=False)
    for stem, figure in found.figures.items():
        figure.savefig(folder / f"{stem}.png", dpi=DPI)
    for path, content in {f"{part}.txt": str(found), **found.files}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    replay.attach(run, f"{FOLDER}/{name}")
    return folder


def stored(run: Path, name: str, stem: str, made_by: str) -> Frame:
    """A table that an earlier analysis of this run left.

    Raises:
        ValueError: there is none; says which command makes it.
    """
    path = run / FOLDER / name / f"{stem}.parquet"
    if not path.is_file():
        raise ValueError(f"{run} has no {FOLDER}/{name}/{stem}.parquet; run `opd-lab analyze {made_by} {run}` first")
    return pd.read_parquet(path)


def text(table: Frame) -> str:
    """A table that fits the width."""
    from rich.console import Console
    from rich.table import Table

    shown = Table()
    for name in table.columns:
        shown.add_column(str(name), justify="right" if pd.api.types.is_numeric_dtype(table[name]) else "left")
    for row in table.itertuples(index=False):
        shown.add_row(*map(_cell, row))
    console = Console(file=io.StringIO(), width=WIDTH, markup=False, emoji=False)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if pd.isna(value) else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, Integral) and not isinstance(value, bool) else str(value)
