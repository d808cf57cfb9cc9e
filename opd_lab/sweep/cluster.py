"""What the launchers on clusters share: the trials that run, and how they are asked to stop and made to."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_lab.sweep.contract import Ended
from opd_lab.sweep.keeper import STOP


@dataclass
class Trial:
    handle: Any  # the cluster's own
    why: str | None = None  # it was cancelled
    kill_at: float | None = None  # time.monotonic() at which asking ends


class ClusterLauncher(ABC):
    """A `Launcher`, but for what each cluster does in its own way."""

    def __init__(self, slots: int, threads: int, poll_seconds: float, grace_seconds: float) -> None:
        self.slots, self.threads, self.poll_seconds = slots, threads, poll_seconds
        self._grace_seconds = grace_seconds
        self._running: dict[Path, Trial] = {}

    @abstractmethod
    def start(self, folder: Path) -> tuple[Any, str]:
        """A handle of the trial, and where it runs, for people."""

    @abstractmethod
    def ended(self, folder: Path, handle: Any) -> Ended | None:
        """None while it runs or waits for its turn."""

    @abstractmethod
    def kill(self, handle: Any) -> None: ...

    def wait(self, handles: Sequence[Any], seconds: float) -> None:
        """Until one of them may have ended, but not longer."""
        time.sleep(seconds)

    def adopt(self, folder: Path) -> bool:
        return False

    def submit(self, folder: Path) -> str:
        (folder / STOP).unlink(missing_ok=True)
        handle, where = self.start(folder)
        self._running[folder] = Trial(handle)
        return where

    def wait_any(self, seconds: float) -> list[Ended]:
        now = time.monotonic()
        for folder, trial in self._running.items():
            if trial.kill_at is not None and now > trial.kill_at:
                self.cancel(folder, "", now=True)
        self.wait([trial.handle for trial in self._running.values()], seconds)
        found = []
        for folder, trial in list(self._running.items()):
            if (end := self.ended(folder, trial.handle)) is not None:
                found.append(Ended(folder, trial.why if end.killed and trial.why else end.killed))
                del self._running[folder]
        return found

    def cancel(self, folder: Path, why: str, *, now: bool) -> None:
        trial = self._running.get(folder)
        if trial is None:
            return
        trial.why = trial.why or why
        if now:
            self.kill(trial.handle)
        elif trial.kill_at is None:
            (folder / STOP).touch()
        if now or trial.kill_at is None:
            trial.kill_at = time.monotonic() + self._grace_seconds  # and again, should it not have been heard

    def close(self) -> None:
        for trial in self._running.values():
            self.kill(trial.handle)
        self._running.clear()


def environment(threads: int, gpus: float) -> dict[str, str]:
    """What a trial's process must see before it imports torch; which GPUs it has is set by the cluster."""
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} | hidden


def missing(package: str, extra: str) -> ValueError:
    return ValueError(f"launcher={extra} needs the package {package}; pip install 'opd_lab[{extra}]'")


def check(name: str, value: Any, low: float) -> None:
    """
    Raises:
        ValueError: a number that is too small.
    """
    if value is not None and value < low:
        raise ValueError(f"launcher.{name} must be >= {low:g}, got {value}")
