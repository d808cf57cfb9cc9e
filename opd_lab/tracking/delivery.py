"""A remote tracker follows the run folder: the journal on disk is its queue, so nothing waits in memory, the training
loop waits for nobody, and whatever a store has missed, for whichever reason, is still to be read."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opd_lab.tracking.run_folder import JOURNAL, lines_from, within
from opd_lab.types import Histogram, Report

if TYPE_CHECKING:
    from opd_lab.tracking.tracker import RunInfo, Tracker

Rows = dict[int, list[dict[str, Any]]]  # of a table, by step

log = logging.getLogger("opd_lab.tracking")


class Reports:
    """The reports in a run folder, each handed out once, in order; `new` may be asked again while the run goes on.
    `tables` are those that are wanted beside the histograms; None = all."""

    def __init__(self, folder: Path, tables: Collection[str] | None = None) -> None:
        self._folder, self._offset, self._tables = folder, 0, tables
        self._read: dict[str, tuple[Path, Rows]] = {}  # table -> the file read last

    def new(self) -> Iterator[Report]:
        """A report counts as handed out when the next one is asked for: where its delivery fails, it comes again."""
        lines = list(lines_from(self._folder / JOURNAL, self._offset))
        files = self._files() if lines else {}  # after the lines: a table is there before its line
        for line, end in lines:
            yield self._report(line, files)
            self._offset = end

    def _report(self, line: dict[str, Any], files: Mapping[str, list[Path]]) -> Report:
        step = line["step"]
        tables = {name: rows for name in files if (rows := self._rows(name, files[name], step))}
        histograms = {
            row["name"]: Histogram(torch.tensor(row["counts"], dtype=torch.int64), row["bins"])
            for row in tables.pop("histograms", [])
        }
        return Report(step, line["scalars"], histograms, tables, line["time"])

    def _files(self) -> dict[str, list[Path]]:
        merged = {path.stem: path for path in self._folder.glob("*.parquet") if path.stem not in ("metrics", "timing")}
        names = merged.keys() | {path.name for path in (self._folder / "segments").glob("*")}
        if self._tables is not None:
            names &= {"histograms", *self._tables}
        return {
            name: [merged[name]] if name in merged else sorted((self._folder / "segments" / name).glob("*.parquet"))
            for name in sorted(names)
        }

    def _rows(self, name: str, paths: Iterable[Path], step: int) -> list[dict[str, Any]]:
        there = [path for path in paths if path.parent == self._folder or within(step, path)]
        return [row for path in there for row in self._by_step(name, path).get(step, [])]

    def _by_step(self, name: str, path: Path) -> Rows:
        import pyarrow.parquet as pq

        if self._read.get(name, (None,))[0] != path:
            rows: Rows = {}
            for row in pq.ParquetFile(path).read().to_pylist():
                rows.setdefault(row["step"], []).append(row)
            self._read[name] = path, rows
        return self._read[name][1]


class Follower:
    """A thread that brings a tracker, which it starts, what the run folder has; what comes within `together_seconds` is
    delivered together, which costs less. One failure is a warning; then it tries again every `retry_seconds`, and a
    last time at the end."""

    def __init__(self, tracker: Tracker, run: RunInfo, retry_seconds: float, together_seconds: float) -> None:
        tracker.start(run)
        self._tracker, self._reports = tracker, Reports(run.folder, tracker.tables)
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
