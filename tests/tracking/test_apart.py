"""A tracker in a process of its own: what it is told arrives, and neither process hangs when the other is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import ClassVar

import pytest

from opd_lab.tracking import read
from opd_lab.tracking.apart import CAN_FORK, Apart
from opd_lab.tracking.run_folder import RunFolder
from opd_lab.tracking.tracker import FanOut, RunInfo
from opd_lab.types import Report
from tests.tracking.runs import info, report

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="a process with threads is forked on Linux only")


class Diary:
    """A remote tracker that writes a line for everything; it starts where its folder is."""

    name: ClassVar[str] = "diary"
    remote: ClassVar[bool] = True
    tables: ClassVar[Collection[str]] = ("rollouts",)

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, run: RunInfo) -> None:
        if not self.path.parent.exists():
            raise ValueError(f"tracking.uri must be there, got {self.path}")
        self.write(f"start {os.getpid()}")

    def log(self, report: Report) -> None:
        self.write(f"{report.step} {sorted(report.tables)} {sorted(report.histograms)}")

    def artifact(self, path: Path, folder: str = "") -> None:
        self.write(f"{folder}/{path.name}")

    def tag(self, name: str, value: str) -> None:
        if value == "away":
            raise ConnectionError("the store is away")
        self.write(f"{name}={value}")

    def flush(self) -> None: ...

    def finish(self, status: str) -> None:
        self.write(status)

    def write(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(line + "\n")

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []


def started(folder: Path, diary: Diary) -> FanOut:
    fan = FanOut([RunFolder(), diary], retry_seconds=0.001, together_seconds=0.0, follower=Apart)
    fan.start(info(folder))
    return fan


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_everything_arrives_in_another_process(tmp_path: Path) -> None:
    diary = Diary(tmp_path / "diary")
    fan = started(tmp_path / "a", diary)
    fan.log(report(0))
    until(lambda: len(diary.lines()) == 2)  # while the run goes on
    (tmp_path / "x.txt").write_text("x")
    fan.tag("best@1", "1")
    fan.artifact(tmp_path / "x.txt", "files")
    fan.log(report(1))
    fan.finish("FINISHED")
    first, *lines = diary.lines()
    assert first.startswith("start ") and first != f"start {os.getpid()}"
    reports = [f"{step} ['rollouts'] ['kl/reverse_nats']" for step in range(2)]
    assert sorted(lines) == sorted([*reports, "best_at_1=1", "files/x.txt", "FINISHED"])
    assert lines[-1] == "FINISHED" and not multiprocessing.active_children()


def test_what_cannot_start_stops_the_run_with_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^tracking\.uri must be there, got .*nowhere"):
        started(tmp_path / "a", Diary(tmp_path / "nowhere" / "diary"))
    assert read.status(tmp_path / "a")["status"] == "FAILED"
    assert not multiprocessing.active_children()


def test_its_warnings_are_the_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fan = started(tmp_path / "a", Diary(tmp_path / "diary"))
    fan.tag("store", "away")
    fan.finish("FINISHED")
    failed, last = [record.getMessage() for record in caplog.records]
    assert failed.startswith("diary failed; the run goes on, and it is tried again: ConnectionError(")
    assert last == "diary did not take everything, the run folder has it: run `opd-lab sync`"


def test_a_run_outlives_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    diary = Diary(tmp_path / "diary")
    fan = started(tmp_path / "a", diary)
    (child,) = multiprocessing.active_children()
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    for step in range(3):
        fan.log(report(step))
    fan.finish("FINISHED")
    assert read.status(tmp_path / "a")["status"] == "FINISHED"
    assert len(read.metrics(tmp_path / "a")["step"].unique()) == 3
    gone, last = [record.getMessage() for record in caplog.records]
    assert gone == "the process of diary has ended (exit code -9); the run goes on without it"
    assert "run `opd-lab sync`" in last


def test_it_does_not_outlive_the_run(tmp_path: Path) -> None:
    diary = Diary(tmp_path / "diary")
    context = multiprocessing.get_context("fork")
    run = context.Process(target=_start_and_wait, args=(tmp_path / "a", diary))
    run.start()
    until(lambda: len(diary.lines()) == 1)
    child = int(diary.lines()[0].split()[1])
    run.kill()
    run.join()
    until(lambda: not _alive(child))


def _start_and_wait(folder: Path, diary: Diary) -> None:
    started(folder, diary)
    signal.pause()


def _alive(pid: int) -> bool:
    """An orphan that has ended may wait for init to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
