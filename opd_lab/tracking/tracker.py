"""Report -> wherever runs are kept. One protocol, and a fan-out that never gets in the way of the training loop.

A tracker that cannot start stops the run, before the first token. One that fails later warns once; what it could not
take waits in the run folder and is offered again, so a store may come and go while a run goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Protocol

from opd_lab.tracking.delivery import Call, Delivery
from opd_lab.types import Report

STATUSES = ("FINISHED", "FAILED", "KILLED")


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a run says of itself before its first token."""

    name: str
    experiment: str
    folder: Path  # the run folder
    params: Mapping[str, str | int | float | bool | None]  # the resolved config, flattened: `optim.lr`
    tags: Mapping[str, str]  # conventions (`convention.*`), data and model identity
    config_yaml: str
    dataset: Mapping[str, str] = field(default_factory=dict)  # name, source, digest
    parent: str | None = None  # the tracker's id of the run that launched this one
    step: int = 0  # the first step that this process logs: what the folder holds from there on is dropped


class Tracker(Protocol):
    """Where reports go. `remote` ones are served by a thread of their own."""

    name: ClassVar[str]
    remote: ClassVar[bool]

    def start(self, run: RunInfo) -> None: ...
    def log(self, report: Report) -> None: ...
    def artifact(self, path: Path, folder: str = "") -> None: ...
    def tag(self, name: str, value: str) -> None: ...
    def finish(self, status: str) -> None: ...


class FanOut:
    """Several trackers as one. After `start`, no method raises for a tracker's sake."""

    name: ClassVar[str] = "all"
    remote: ClassVar[bool] = False

    def __init__(self, trackers: Sequence[Tracker], retry_seconds: float = 30.0) -> None:
        self._trackers, self._retry_seconds = list(trackers), retry_seconds
        self._deliveries: list[Delivery] = []

    def start(self, run: RunInfo) -> None:
        for place, tracker in enumerate(self._trackers):
            try:
                tracker.start(run)
            except Exception:
                for started in self._trackers[:place]:
                    started.finish("FAILED")
                raise
        self._deliveries = [Delivery(tracker, run.folder, self._retry_seconds) for tracker in self._trackers]

    def log(self, report: Report) -> None:
        """Numbers that are not finite are logged as NaN and counted."""
        bad = [name for name, value in report.scalars.items() if not math.isfinite(value)]
        if bad:
            scalars = report.scalars | {name: math.nan for name in bad}
            report = replace(report, scalars=scalars | {"tracking/nonfinite_count": float(len(bad))})
        self._all(("log", report))

    def artifact(self, path: Path, folder: str = "") -> None:
        self._all(("artifact", str(path), folder))

    def tag(self, name: str, value: str) -> None:
        self._all(("tag", name, value))

    def finish(self, status: str) -> None:
        """Close every tracker in order; the run folder first, so that the others find its files complete."""
        assert status in STATUSES, status
        for delivery in self._deliveries:
            delivery.finish(status)

    def _all(self, call: Call) -> None:
        for delivery in self._deliveries:
            delivery.put(call)
