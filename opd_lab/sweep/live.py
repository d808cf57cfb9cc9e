"""What a person sees of a sweep: a live table in a terminal, one line per event elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from opd_lab.sweep.space import describe
from opd_lab.sweep.study import Study
from opd_lab.sweep.trials import Running, counts

LOG_LINES = 12  # of a failed trial, shown at once


class Lines:
    """A `View`: one line per event."""

    def __init__(self, study: Study, console: Console) -> None:
        self.study, self.console = study, console

    def started(self, running: Running) -> None:
        again = f", attempt {running.job.attempt}" if running.job.attempt > 1 else ""
        self.say(f"trial {running.number} started on {running.where}{again}: {describe(running.params)}")

    def moved(self, running: Running) -> None:
        pass

    def ended(self, running: Running, state: str, why: str) -> None:
        at = f" {running.value:.4f}" if math.isfinite(running.value) else ""
        if state == "failed":
            self.say(f"trial {running.number} FAILED: {why.strip().splitlines()[-1]}  (log: {running.mail.log})")
            self._tail(running)
        elif state == "pruned":
            done = running.position(running.run, running.step)
            self.say(f"trial {running.number} pruned at step {done} of {running.steps}:{at}")
        elif state == "stopped":
            self.say(f"trial {running.number} stopped at step {running.step}, to be resumed")
        else:
            self.say(f"trial {running.number} finished:{at}   {tally(self.study)}")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _tail(self, running: Running) -> None:
        """The end of a trial's log: its traceback, or the last words of a killed process."""
        log = running.mail.log
        for line in log.read_text(errors="replace").splitlines()[-LOG_LINES:] if log.exists() else []:
            self.say(f"    {line}")


class LiveTable(Lines):
    """A `View`: a row per slot, the best so far and the failures, rewritten in place."""

    def __init__(self, study: Study, console: Console, metric: str) -> None:
        super().__init__(study, console)
        self._metric, self._rows, self._began = metric, dict[str, Running](), time.monotonic()
        self._at_start = study.count_ended()
        self._foot = tally(study)
        self.live = Live(self._picture(), console=console, refresh_per_second=4)

    def started(self, running: Running) -> None:
        self._rows[running.where] = running
        self.moved(running)

    def moved(self, running: Running) -> None:
        self.live.update(self._picture())

    def ended(self, running: Running, state: str, why: str) -> None:
        self._rows.pop(running.where, None)
        self._foot = tally(self.study)
        if state in ("failed", "stopped"):
            super().ended(running, state, why)
        self.live.update(self._picture())

    def _picture(self) -> Group:
        table = Table(expand=True)
        for name in ("slot", "trial", "step", self._metric, "left"):
            table.add_column(name, no_wrap=True)
        table.add_column("params", ratio=1, no_wrap=True, overflow="ellipsis")
        for name in sorted(self._rows):
            r = self._rows[name]
            value = f"{r.value:.4f}" if math.isfinite(r.value) else "-"
            left = f"{r.seconds_left:.0f} s" if math.isfinite(r.seconds_left) and r.step else "-"
            step = f"{r.position(r.run, r.step)}/{r.steps}"
            table.add_row(name, str(r.number), step, value, left, Text(describe(r.params)))
        return Group(table, Text(f"{self._foot}   {self._rest()}"))

    def _rest(self) -> str:
        """How long the trials that are left will take, at the pace of those that have ended."""
        done = self.study.count_ended() - self._at_start
        left = self.study.target - self.study.count_ended()
        if done < 1 or left < 1:
            return ""
        return f"about {duration((time.monotonic() - self._began) / done * left)} left"


def tally(study: Study) -> str:
    """`7/10 done, 2 pruned, 1 failed; best 0.8660 (trial 3: method=opd)`"""
    found = counts(study)
    parts = [f"{study.count_ended()}/{study.target} done"]
    parts += [f"{found[name]} {name}" for name in ("pruned", "failed") if found[name]]
    best = study.best()
    if best is not None and best.value is not None:
        parts[-1] += f"; best {best.value:.4f} (trial {best.number}: {describe(best.params)})"
    return ", ".join(parts)


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextmanager
def view(study: Study, metric: str) -> Iterator[Lines]:
    console = Console()
    if not console.is_terminal:
        yield Lines(study, console)
        return
    shown = LiveTable(study, console, metric)
    with shown.live:
        yield shown
