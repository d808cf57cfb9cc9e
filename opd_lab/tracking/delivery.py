"""One tracker's calls, delivered at least once: now, by its own thread, or later from a file in the run folder."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opd_lab.types import Histogram, Report

if TYPE_CHECKING:
    from opd_lab.tracking.tracker import Tracker

log = logging.getLogger("opd_lab.tracking")

WAITING = 256  # calls that may wait for a remote tracker before the loop does

Call = tuple[Any, ...]  # a method's name and its arguments, plain values or a Report


def report_to_json(report: Report) -> dict[str, Any]:
    """A report as plain values; floats survive exactly."""
    histograms = {name: {"bins": h.bins, "counts": h.counts_K.tolist()} for name, h in report.histograms.items()}
    return {"step": report.step, "scalars": report.scalars, "histograms": histograms, "tables": report.tables}


def report_from_json(plain: dict[str, Any]) -> Report:
    histograms = {
        name: Histogram(torch.tensor(h["counts"], dtype=torch.int64), h["bins"])
        for name, h in plain["histograms"].items()
    }
    return Report(plain["step"], plain["scalars"], histograms, plain["tables"])


class Delivery:
    """Calls to one started tracker. A failed call goes to the spool, and so does every later one until a retry."""

    def __init__(self, tracker: Tracker, folder: Path, retry_seconds: float) -> None:
        self._tracker, self._retry_seconds = tracker, retry_seconds
        self._spool = folder / f"undelivered.{tracker.name}.jsonl"
        self._retry_at = 0.0
        self._warned = False
        self._queue: queue.Queue[Call | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._serve, name=f"tracking-{tracker.name}", daemon=True)
        if tracker.remote:
            self._thread.start()

    def put(self, call: Call) -> None:
        if self._tracker.remote:
            self._queue.put(call)
        else:
            self._deliver(call)

    def finish(self, status: str) -> None:
        if self._tracker.remote:
            self._queue.put(None)
            self._thread.join()
        self._retry_at = 0.0
        self._deliver(("finish", status))
        if self._spool.exists():
            log.error("%s did not take everything; the rest is in %s: run `opd-lab sync`", *self._names())

    def _serve(self) -> None:
        while (call := self._queue.get()) is not None:
            self._deliver(call)

    def _deliver(self, call: Call) -> None:
        try:
            if self._spool.exists():
                if time.monotonic() < self._retry_at:
                    return self._keep(call)
                drain(self._spool, self._tracker)
            perform(self._tracker, call)
        except Exception as error:
            if not self._warned:
                log.warning("%s failed, keeping its calls in %s and trying again later: %r", *self._names(), error)
            self._warned = True
            self._retry_at = time.monotonic() + self._retry_seconds
            self._keep(call)

    def _keep(self, call: Call) -> None:
        try:
            with self._spool.open("a") as file:
                file.write(_encode(call))
        except OSError as error:
            log.error("%s lost a call, %s cannot be written: %r", *self._names(), error)

    def _names(self) -> tuple[str, Path]:
        return self._tracker.name, self._spool


def perform(tracker: Tracker, call: Call) -> None:
    """Make one call, now."""
    method, *arguments = call
    if method == "artifact":
        arguments[0] = Path(arguments[0])
    getattr(tracker, method)(*arguments)


def drain(spool: Path, tracker: Tracker) -> None:
    """Deliver what waits in a spool file, oldest first; what was delivered leaves it, and an empty spool is removed."""
    lines = spool.read_text().splitlines(keepends=True)
    done = 0
    try:
        for line in lines:
            perform(tracker, _decode(line))
            done += 1
    finally:
        if done == len(lines):
            spool.unlink()
        elif done:
            rest = spool.with_suffix(".rest")
            rest.write_text("".join(lines[done:]))
            rest.replace(spool)


def keep(run: Path, tracker: str, calls: Sequence[Call]) -> None:
    """Leave calls in a run folder for `opd-lab sync`."""
    with (run / f"undelivered.{tracker}.jsonl").open("a") as file:
        file.writelines(map(_encode, calls))


def _encode(call: Call) -> str:
    return json.dumps([report_to_json(a) if isinstance(a, Report) else a for a in call]) + "\n"


def _decode(line: str) -> Call:
    return tuple(report_from_json(a) if isinstance(a, dict) else a for a in json.loads(line))
