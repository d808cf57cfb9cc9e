"""A store may come and go: the loop never hears of it, and nothing is lost, for the run folder has everything."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lab.tracking import read
from opd_lab.tracking.delivery import Reports
from opd_lab.tracking.replay import sync
from opd_lab.tracking.run_folder import RunFolder
from opd_lab.tracking.tracker import FanOut
from opd_lab.types import Report
from tests.tracking.runs import Flaky, info, report


def until(true: Callable[[], bool]) -> None:
    """Wait for a tracker's thread."""
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def started(folder: Path, *trackers: Flaky, retry_seconds: float = 0.001) -> FanOut:
    fan = FanOut([RunFolder(), *trackers], retry_seconds, together_seconds=0.0)
    fan.start(info(folder))
    return fan


def test_a_tracker_that_cannot_start_stops_the_run_and_closes_the_others(tmp_path: Path) -> None:
    first, second = Flaky(), Flaky()
    second.up = False
    with pytest.raises(ConnectionError):
        started(tmp_path / "a", first, second)
    assert first.got == ["start", "FAILED"]
    assert read.status(tmp_path / "a")["status"] == "FAILED"


def test_what_a_store_misses_is_delivered_in_order_when_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Flaky()
    fan = started(tmp_path / "a", tracker)
    fan.log(report(0))
    until(lambda: tracker.got == ["start", 0])
    tracker.up = False
    (tmp_path / "x.txt").write_text("x")
    fan.log(report(1))
    fan.tag("best@1", "1")
    fan.artifact(tmp_path / "x.txt", "files")
    until(lambda: tracker.tries > 5)
    tracker.up = True
    fan.log(report(2))
    fan.finish("FINISHED")
    reports = [what for what in tracker.got if isinstance(what, int)]
    calls = [what for what in tracker.got if isinstance(what, tuple)]
    assert reports == [0, 1, 2]
    assert calls == [("best_at_1", "1"), (tmp_path / "x.txt", "files")]
    assert tracker.got[-1] == "FINISHED"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]  # once


def test_a_store_that_is_away_is_not_asked_at_every_step(tmp_path: Path) -> None:
    tracker = Flaky()
    fan = started(tmp_path / "a", tracker, retry_seconds=3600)
    tracker.up = False
    for step in range(50):
        fan.log(report(step))
        until(lambda: tracker.tries == 2)
    tracker.up = True
    fan.finish("FINISHED")
    assert tracker.got == ["start", *range(50), "FINISHED"]


def test_a_store_that_hangs_holds_nobody_up_and_fills_no_memory(tmp_path: Path) -> None:
    goes_on = threading.Event()

    class Hanging(Flaky):
        def log(self, report: Report) -> None:
            goes_on.wait()
            super().log(report)

    tracker = Hanging()
    fan = started(tmp_path / "a", tracker)
    for step in range(300):  # more than any queue that one would think of
        fan.log(Report(step, {"a": 1.0}))
    assert tracker.got == ["start"]
    assert len(read.metrics(tmp_path / "a")) == 300
    goes_on.set()
    fan.finish("FINISHED")
    assert tracker.got == ["start", *range(300), "FINISHED"]


def test_what_is_left_at_the_end_is_delivered_by_sync(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Flaky()
    fan = started(tmp_path / "a", tracker)
    tracker.up = False
    fan.log(report(0))
    fan.finish("FAILED")
    assert tracker.got == ["start"]
    assert "run `opd-lab sync`" in caplog.text
    later = Flaky()
    sync(tmp_path / "a", later)
    assert later.got == ["start", 0, "FAILED"]


def test_a_run_that_was_killed_is_delivered_and_can_still_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    RunFolder().start(info(folder))
    first = RunFolder()
    first.start(info(folder))
    for step in range(4):
        first.log(report(step))
    later = Flaky()
    sync(folder, later)
    assert later.got == ["start", 0, 1, 2, 3, "KILLED"]
    second = RunFolder()
    second.start(info(folder, step=2))
    assert sorted(set(read.metrics(folder)["step"])) == [0, 1]
    assert read.status(folder)["status"] == "RUNNING"


def test_a_store_that_fails_in_the_middle_of_a_report_gets_it_again(tmp_path: Path) -> None:
    class Short(Flaky):
        def take(self, what: Any) -> None:
            if self.tries == 3:
                self.tries += 1
                raise ConnectionError("fell over")
            super().take(what)

    tracker = Short()
    fan = started(tmp_path / "a", tracker)
    for step in range(4):
        fan.log(report(step))
    until(lambda: tracker.tries > 3)  # the last try, in `finish`, has no other after it
    fan.finish("FINISHED")
    assert tracker.got == ["start", 0, 1, 2, 3, "FINISHED"]


def test_a_report_with_pictures_tells_of_the_machine_and_two_runs_still_have_the_same_metrics(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fan = started(tmp_path / name)
        fan.log(report(1))
        fan.log(Report(2, {"a": 1.0}))
        fan.finish("FINISHED")
    told = read.metrics(tmp_path / "a")
    told = told[told["name"].str.startswith("system/")]
    assert set(told["step"]) == {1}
    value = dict(zip(told["name"], told["value"]))
    assert 0 <= value["system/cpu_utilization_percentage"] <= 100
    assert 1 < value["system/process_memory_usage_megabytes"] < value["system/system_memory_usage_megabytes"]
    assert (tmp_path / "a" / "metrics.parquet").read_bytes() == (tmp_path / "b" / "metrics.parquet").read_bytes()


def test_nobody_listens() -> None:
    FanOut([]).log(report(0))


def test_numbers_that_are_not_finite_become_nan_and_are_counted(tmp_path: Path) -> None:
    fan = started(tmp_path / "a")
    fan.log(Report(0, {"a": 1.0, "b": math.inf, "c": math.nan}))
    fan.log(Report(1, {"a": 1.0}))
    first, second = Reports(tmp_path / "a").new()
    assert first.scalars["tracking/nonfinite_count"] == 2
    assert math.isnan(first.scalars["b"]) and math.isnan(first.scalars["c"])
    assert second.scalars == {"a": 1.0}


@pytest.mark.parametrize("finished", [False, True])
def test_a_report_survives_its_way_through_the_run_folder_exactly(tmp_path: Path, finished: bool) -> None:
    before = [report(step) for step in range(3)]
    fan = started(tmp_path / "a")
    reports = Reports(tmp_path / "a")
    begin = time.time()
    for one in before:
        fan.log(one)
    if finished:
        fan.finish("FINISHED")
    after = list(reports.new())
    assert [one.step for one in after] == [0, 1, 2]
    for one, again in zip(before, after):
        assert again.scalars.pop("eval/pass_at_1") == one.scalars.pop("eval/pass_at_1")
        assert {n: v for n, v in again.scalars.items() if not n.startswith("system/")} == one.scalars
        assert torch.equal(again.histograms["kl/reverse_nats"].counts_K, one.histograms["kl/reverse_nats"].counts_K)
        assert again.histograms["kl/reverse_nats"].bins == "kl_nats"
        assert again.tables["high_loss_tokens"] == one.tables["high_loss_tokens"]
        assert begin - 1 <= again.time <= time.time() + 1
    assert list(reports.new()) == []


def test_a_step_that_is_done_again_keeps_what_the_clock_said_first(tmp_path: Path) -> None:
    """A store has been told; it cannot be told otherwise."""
    folder = tmp_path / "a"

    def attempt(steps: range) -> None:
        tracker = RunFolder()
        tracker.start(info(folder, step=steps.start))
        for step in steps:
            tracker.log(report(step))

    attempt(range(6))
    first = {one.step: (one.time, one.scalars) for one in Reports(folder).new()}
    time.sleep(0.002)
    attempt(range(3, 4))  # killed again before it was back where it had been
    attempt(range(2, 6))
    assert {one.step: (one.time, one.scalars) for one in Reports(folder).new()} == first


def test_what_was_logged_before_a_checkpoint_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    fan, flushed = started(tmp_path / "a"), set()
    fan.log(report(0))
    real = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path / "a"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    fan.flush()
    (segment,) = (path.relative_to(tmp_path / "a") for path in (tmp_path / "a/segments/histograms").iterdir())
    assert {Path("journal.jsonl"), Path("."), segment, segment.parent} <= flushed
