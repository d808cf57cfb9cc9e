"""Trials as processes of this machine: one each, warm, in a session of its own.

CPU trials are forked from a server that has imported the heavy modules once; GPU trials start from nothing, because
which GPU a process sees must be settled before torch is imported. A trial whose sweep dies kills itself: otherwise it
would hold its run folder when the sweep is resumed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from opd_lab.sweep.contract import Ended, Mail
from opd_lab.sweep.settings import LocalSettings
from opd_lab.sweep.slots import Slot, slots

PRELOAD = ["opd_lab.sweep.warm"]
GIB = 1 << 30


@dataclass
class _Running:
    process: BaseProcess
    slot: Slot
    why: str | None = None  # it was cancelled
    kill_at: float | None = None  # time.monotonic() at which asking ends


class LocalLauncher:
    """A `Launcher`."""

    Settings = LocalSettings

    def __init__(self, settings: LocalSettings) -> None:
        self._settings = settings
        self.threads, self.poll_seconds = settings.threads, settings.poll_seconds
        self._free = slots(settings)
        self.slots = len(self._free)
        self._running: dict[Path, _Running] = {}
        self._weigh_at = 0.0
        self._forks = multiprocessing.get_context("forkserver")
        self._forks.set_forkserver_preload(PRELOAD)
        if not all(slot.gpu for slot in self._free):
            resource_tracker.ensure_running()  # else the next lines would start it, and it unblocks the signal
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is for the sweep alone to hear
            forkserver.ensure_running()  # it imports while the sweep is being prepared
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def adopt(self, folder: Path) -> bool:
        return False  # trials of this machine die with their sweep

    def submit(self, folder: Path) -> str:
        slot = self._free.pop(0)
        context = multiprocessing.get_context("spawn") if slot.gpu else self._forks
        process = context.Process(target=_child, args=(str(folder), dict(slot.environment)), daemon=False)
        with _environment(slot.environment if slot.gpu else {}):
            if slot.gpu:
                process.start()
            else:
                self._fork(process)
        Mail(folder).placed()
        self._running[folder] = _Running(process, slot)
        return slot.name

    def wait_any(self, seconds: float) -> list[Ended]:
        self._enforce()
        sentinels = [running.process.sentinel for running in self._running.values()]
        if not connection.wait(sentinels, seconds):
            return []
        ended = []
        for folder, running in list(self._running.items()):
            if running.process.is_alive():
                continue
            running.process.join()
            _kill(running.process)  # what it may have left behind
            code = running.process.exitcode or 0
            died = None if code == 0 else cause(code)
            ended.append(Ended(folder, running.why if died and running.why else died))
            running.process.close()
            del self._running[folder]
            self._free.append(running.slot)
        return ended

    def cancel(self, folder: Path, why: str, *, now: bool) -> None:
        running = self._running.get(folder)
        if running is None:
            return
        running.why = running.why or why
        if now:
            _kill(running.process)
        elif running.kill_at is None:
            running.kill_at = time.monotonic() + self._settings.grace_seconds
            running.process.terminate()

    def close(self) -> None:
        for running in self._running.values():
            _kill(running.process)
            running.process.join()
        self._running.clear()

    def _fork(self, process: BaseProcess) -> None:
        """Start a process from the fork server. Its first answer waits for its imports, and Python waits without limit.

        Raises:
            ValueError: it gave none.
        """
        failed: list[Exception] = []

        def start() -> None:
            try:
                process.start()
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=start, daemon=True)
        thread.start()
        thread.join(self._settings.start_seconds)
        late = thread.is_alive()
        if late:
            os.kill(vars(forkserver._forkserver)["_forkserver_pid"], signal.SIGKILL)
            thread.join()
        if late or failed:
            what = f"is not ready after launcher.start_seconds={self._settings.start_seconds:g}" if late else "has died"
            raise ValueError(
                f"what trials are forked from {what}: it imports {', '.join(PRELOAD)}; "
                f"`{sys.executable} -X importtime -m {PRELOAD[0]}` shows where it stays"
                + (", launcher.start_seconds=NUMBER gives a slow disk more time" if late else "")
            ) from next(iter(failed), None)

    def _enforce(self) -> None:
        """Kill what does not stop when asked, and what has grown too large."""
        now = time.monotonic()
        for folder, running in self._running.items():
            if running.kill_at is not None and now > running.kill_at:
                self.cancel(folder, "", now=True)
        limit = self._settings.memory_limit_gib
        if limit is None or now < self._weigh_at:
            return
        self._weigh_at = now + 1.0
        for folder, running in self._running.items():
            used = _resident_bytes(running.process.pid) / GIB
            if used > limit:
                self.cancel(folder, f"memory limit of {limit:g} GiB: it used {used:.2f} GiB", now=True)


def _child(folder: str, environment: Mapping[str, str]) -> None:
    """The first lines of a trial's process."""
    os.setsid()
    os.environ.update(environment)
    threading.Thread(target=_die_with_the_sweep, daemon=True).start()
    log = os.open(Mail(Path(folder)).log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from opd_lab.sweep.worker import main

    main(folder)


def _die_with_the_sweep() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _kill(process: BaseProcess) -> None:
    """A trial and everything it started."""
    try:
        assert process.pid
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        if process.is_alive():  # not a session of its own yet
            process.kill()


def cause(code: int) -> str:
    if code > 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _resident_bytes(pid: int | None) -> int:
    import psutil

    total = 0
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in family:
        try:
            total += _own_bytes(member)
        except psutil.NoSuchProcess:
            continue
    return total


def _own_bytes(process: Any) -> int:
    """What a trial's processes share, for one is the fork of another, is divided among them where the system tells."""
    used = process.memory_full_info() if sys.platform == "linux" else process.memory_info()
    return getattr(used, "pss", used.rss)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables of this process while another one is started from it."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
