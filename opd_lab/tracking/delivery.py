"""A remote tracker follows the run folder: the journal on disk is its queue, so nothing waits in memory, the training
loop waits for nobody, and whatever a store has missed, for whichever reason, is still to be read."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opd_lab.tracking.run_folder import BEFORE, JOURNAL, lines_from
from opd_lab.types import Histogram, Report

if TYPE_CHECKING:
    from opd_lab.tracking.tracker import Tracker

log = logging.getLogger("opd_lab.tracking")


class Reports:
    """The reports in a run folder, each handed out once, in order; `new` may be asked again while the run goes on."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._offset = folder, 0
        self._merged: dict[Path, dict[int, list[dict[str, Any]]]] = {}  # file of many steps -> step -> rows

    def new(self) -> Iterator[Report]:
        """A report counts as handed out when the next one is asked for: where its delivery fails, it comes again."""
        for line, end in lines_from(self._folder / JOURNAL, self._offset):
            yield self._report(line)
            self._offset = end

    def _report(self, line: dict[str, Any]) -> Report:
        step = line["step"]
        tables = {name: rows for name in self._names() if (rows := self._rows(name, step))}
        histograms = {
            row["name"]: Histogram(torch.tensor(row["counts"], dtype=torch.int64), row["bins"])
            for row in tables.pop("histograms", [])
        }
        return Report(step, line["scalars"], histograms, tables, line["time"])

    def _names(self) -> list[str]:
        merged = {path.stem for path in self._folder.glob("*.parquet")} - {"metrics", "timing"}
        return sorted(merged | {path.name for path in (self._folder / "segments").glob("*")})

    def _rows(self, name: str, step: int) -> list[dict[str, Any]]:
        import pyarrow.parquet as pq

        segments = self._folder / "segments" / name
        if own := sorted(segments.glob(f"{step:08d}-?*.parquet")):
            return [row for path in own for row in pq.ParquetFile(path).read().to_pylist()]
        whole = self._folder / f"{name}.parquet"
        merged = whole if whole.exists() else segments / BEFORE
        if merged not in self._merged and merged.exists():
            by_step = self._merged.setdefault(merged, {})
            for row in pq.ParquetFile(merged).read().to_pylist():
                by_step.setdefault(row["step"], []).append(row)
        return self._merged.get(merged, {}).get(step, [])


class Follower:
    """A thread that brings a started tracker what the run folder has; what comes within `together_seconds` is delivered
    together, which costs less. One failure is a warning; then it tries again every `retry_seconds`, and a last time at
    the end."""

    def __init__(self, tracker: Tracker, folder: Path, retry_seconds: float, together_seconds: float) -> None:
        self._tracker, self._reports = tracker, Reports(folder)
        self._retry_seconds, self._together_seconds = retry_seconds, together_seconds
        self._calls: deque[tuple[str, tuple[Any, ...]]] = deque()  # tags and files, which the folder has as well
        self._warned = False
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._serve, name=f"tracking-{tracker.name}", daemon=True)
        self._thread.start()

    def call(self, method: str, *arguments: Any) -> None:
        self._calls.append((method, arguments))
        self._wake.set()

    def wake(self) -> None:
        """The run folder has more."""
        self._wake.set()

    def rest(self) -> None:
        """Let the thread end with what it is doing. What is left is for `finish`, or for a later `opd-lab sync`."""
        self._stop.set()
        self._wake.set()
        self._thread.join()

    def finish(self, status: str) -> None:
        """The last try; the run folder is complete by now."""
        self._calls.append(("finish", (status,)))
        if not self._delivered():
            log.error("%s did not take everything, the run folder has it: run `opd-lab sync`", self._tracker.name)

    def _serve(self) -> None:
        while not self._stop.is_set():
            self._wake.wait()
            self._wake.clear()
            if self._stop.is_set() or self._delivered():
                self._stop.wait(self._together_seconds)
            else:
                self._stop.wait(self._retry_seconds)
                self._wake.set()

    def _delivered(self) -> bool:
        try:
            for report in self._reports.new():
                self._tracker.log(report)
            self._tracker.flush()
            while self._calls:
                method, arguments = self._calls[0]
                getattr(self._tracker, method)(*arguments)
                self._calls.popleft()
        except Exception as error:
            if not self._warned:
                log.warning("%s failed; the run goes on, and it is tried again: %r", self._tracker.name, error)
            self._warned = True
            return False
        return True
