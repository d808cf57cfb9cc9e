"""Report -> wherever runs are kept. One protocol, and a fan-out that never gets in the way of the training loop.

Everything goes to the run folder first; a run whose folder cannot be written stops. Remote trackers follow the folder
in threads or processes of their own. One that cannot start stops the run, before the first token. One that fails later
warns once and is tried again, so a store may come and go while a run goes on.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Protocol

from opd_lab.tracking.apart import Apart
from opd_lab.tracking.delivery import Follower
from opd_lab.tracking.system import System
from opd_lab.types import Report

STATUSES = ("FINISHED", "FAILED", "KILLED")
LONGEST_KEY = 250  # characters


@lru_cache(maxsize=4096)  # asked for every scalar of every step
def key(name: str) -> str:
    """A name that every tracker takes: `pass@1` -> `pass_at_1`, `a[0]` -> `a_0_`."""
    name = re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))
    return "/".join(part for part in name.split("/") if part.strip("."))[:LONGEST_KEY]


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a run says of itself before its first token."""

    name: str
    experiment: str
    folder: Path  # the run folder
    params: Mapping[str, str | int | float | bool | None]  # the resolved config, flattened: `optim.lr`
    tags: Mapping[str, str]  # conventions (`convention.*`), data and model identity
    config_yaml: str
    dataset: Mapping[str, str] = field(default_factory=dict)  # name, source, and a digest per split
    parent: str | None = None  # the tracker's id of the run that launched this one
    step: int = 0  # the first step that this process logs: what the folder holds from there on is dropped


class Tracker(Protocol):
    """Where reports go. A `remote` one may be told of a report twice, if it failed in the middle of the first time; it
    says which `tables` it wants beside the histograms."""

    name: ClassVar[str]
    remote: ClassVar[bool]
    tables: ClassVar[Collection[str]]

    def start(self, run: RunInfo) -> None: ...
    def log(self, report: Report) -> None: ...
    def artifact(self, path: Path, folder: str = "") -> None: ...
    def tag(self, name: str, value: str) -> None: ...
    def flush(self) -> None: ...
    def finish(self, status: str) -> None: ...


class FanOut:
    """The run folder, and trackers that follow it, as one."""

    name: ClassVar[str] = "all"
    remote: ClassVar[bool] = False
    tables: ClassVar[Collection[str]] = ()

    def __init__(
        self,
        trackers: Sequence[Tracker],
        retry_seconds: float = 30.0,
        together_seconds: float = 2.0,
        follower: type[Follower | Apart] = Follower,
    ) -> None:
        self._local = [tracker for tracker in trackers if not tracker.remote]
        self._remote = [tracker for tracker in trackers if tracker.remote]
        self._pace, self._follower = (retry_seconds, together_seconds), follower
        self._followers: list[Follower | Apart] = []
        self._system: System | None = None  # until it starts
        self._wake_due = 0.0

    def start(self, run: RunInfo) -> None:
        run = replace(
            run,
            params={key(name): value for name, value in run.params.items()},
            tags={key(name): value for name, value in run.tags.items()},
        )
        self._system = System()
        for tracker in self._local:
            tracker.start(run)
        for tracker in self._remote:
            try:
                self._followers.append(self._follower(tracker, run, *self._pace))
            except Exception:
                self.finish("FAILED")
                raise

    def log(self, report: Report) -> None:
        """Numbers that are not finite are logged as NaN and counted. With histograms the machine is asked too."""
        scalars = {key(name): value for name, value in report.scalars.items()}
        if report.histograms and self._system:
            scalars |= self._system.sample()
        bad = [name for name, value in scalars.items() if not math.isfinite(value)]
        if bad:
            scalars |= {name: math.nan for name in bad} | {"tracking/nonfinite_count": float(len(bad))}
        for tracker in self._local:
            tracker.log(replace(report, scalars=scalars))
        if time.monotonic() >= self._wake_due:
            self._wake_due = time.monotonic() + self._pace[1]
            for follower in self._followers:
                follower.wake()

    def artifact(self, path: Path, folder: str = "") -> None:
        for tracker in self._local:
            tracker.artifact(path, folder)
        for follower in self._followers:
            follower.call("artifact", path, folder)

    def tag(self, name: str, value: str) -> None:
        for tracker in self._local:
            tracker.tag(key(name), value)
        for follower in self._followers:
            follower.call("tag", key(name), value)

    def flush(self) -> None:
        """What was logged so far is on the disk."""
        for tracker in self._local:
            tracker.flush()

    def finish(self, status: str) -> None:
        """Close the run folder first, so that the others find its files complete."""
        assert status in STATUSES, status
        for follower in self._followers:
            follower.rest()
        for tracker in self._local:
            tracker.finish(status)
        for follower in self._followers:
            follower.finish(status)
