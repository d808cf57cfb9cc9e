"""What a person sees while runs go on: one line per run, live in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column

from opd_lab.settings import RunSettings
from opd_lab.train import Progress

LINES = 5  # lines per run where there is no terminal


class Show:
    """Where a run reports to."""

    def __init__(self, name: str, steps: int, console: Console, bars: Bars | None) -> None:
        self._name, self._steps, self._console, self._bars = name, steps, console, bars
        self._row = bars.add_task(name, total=steps, said="loading") if bars else None

    def step(self, progress: Progress) -> None:
        said = describe(progress)
        if self._bars is not None and self._row is not None:
            self._bars.update(self._row, completed=progress.step, said=said)
        elif progress.step % max(1, self._steps // LINES) == 0 or progress.step == self._steps:
            line = f"{self._name}  step {progress.step}/{progress.steps}  {said}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        self._console.print(f"{self._name}: {text}", highlight=False, markup=False, soft_wrap=True)


def describe(p: Progress) -> str:
    """`loss 0.412 KL 0.398 acc 0.310 5,210 tok/s 12 s left`; KL in nats. Short, to fit beside a name in 80 columns."""
    parts = [
        f"loss {p.loss:.3f}" if math.isfinite(p.loss) else "",
        f"KL {p.kl:.3f}" if math.isfinite(p.kl) else "",
        f"acc {p.accuracy:.3f}" if math.isfinite(p.accuracy) else "",
        f"{p.tokens_per_second:,.0f} tok/s" if math.isfinite(p.tokens_per_second) else "",
        f"{p.seconds_left:.0f} s left" if 0 < p.step < p.steps else "",
    ]
    return " ".join(part for part in parts if part) or "starting"


def bars(console: Console) -> Bars:
    """A line per run: the name gives way first, the bar is there where there is room."""
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=28, ratio=1)),
        TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[said]}", table_column=Column(no_wrap=True)),
    ]
    if console.width >= 110:
        columns.insert(1, BarColumn(bar_width=20))
    return Bars(*columns, console=console, expand=True)


@contextmanager
def line(name: str, settings: RunSettings) -> Iterator[Show]:
    """The display of one run."""
    console = Console()
    if not console.is_terminal:
        yield Show(name, settings.steps, console, None)
        return
    with bars(console) as live:
        yield Show(f"{name} s{settings.seed}", settings.steps, console, live)
