"""A store may come and go: the loop never hears of it, and nothing is lost."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lab.tracking.delivery import report_from_json, report_to_json
from opd_lab.tracking.replay import sync
from opd_lab.tracking.run_folder import RunFolder
from opd_lab.tracking.tracker import FanOut, RunInfo
from opd_lab.types import Report
from tests.tracking.runs import Flaky, RemoteFlaky, info, report


def until(true: Callable[[], bool]) -> None:
    """Wait for a tracker's thread."""
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_tracker_that_cannot_start_stops_the_run_and_closes_the_others(tmp_path: Path) -> None:
    first, second = Flaky(), Flaky()
    second.up = False
    with pytest.raises(ConnectionError):
        FanOut([first, second]).start(info(tmp_path))
    assert first.got == ["start", "FAILED"]


@pytest.mark.parametrize("kind", [Flaky, RemoteFlaky])
def test_what_a_store_misses_is_delivered_in_order_when_it_is_back(
    kind: type[Flaky], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = kind()
    fan = FanOut([tracker], retry_seconds=0.0)
    fan.start(info(tmp_path))
    fan.log(report(0))
    if kind.remote:
        until(lambda: len(tracker.got) == 2)
    tracker.up = False
    fan.log(report(1))
    fan.tag("best", "1")
    fan.artifact(tmp_path / "x.txt", "files")
    if kind.remote:
        until(lambda: tracker.tries == 5)
    tracker.up = True
    fan.log(report(2))
    fan.finish("FINISHED")
    assert tracker.got == ["start", 0, 1, ("best", "1"), (tmp_path / "x.txt", "files"), 2, "FINISHED"]
    assert not list(tmp_path.glob("undelivered*"))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]  # once


def test_a_store_that_is_away_is_not_asked_at_every_step(tmp_path: Path) -> None:
    tracker = Flaky()
    fan = FanOut([tracker], retry_seconds=3600)
    fan.start(info(tmp_path))
    tracker.up = False
    for step in range(50):
        fan.log(report(step))
    assert tracker.tries == 2


def test_what_is_left_at_the_end_is_delivered_by_sync(tmp_path: Path) -> None:
    tracker = Flaky()
    fan = FanOut([RunFolder(), tracker], retry_seconds=0.0)
    fan.start(info(tmp_path))
    tracker.up = False
    fan.log(report(0))
    fan.finish("FAILED")
    assert tracker.got == ["start"]
    later = Flaky()
    assert sync(tmp_path, later)
    assert later.got == ["start", 0, "FAILED", "FAILED"]
    assert not sync(tmp_path, later)


def test_a_store_that_fails_in_the_middle_of_a_delivery_keeps_the_rest(tmp_path: Path) -> None:
    class Short(Flaky):
        def take(self, what: Any) -> None:
            super().take(what)
            self.up = self.up and self.tries != 6  # falls over after one delivery

    tracker = Short()
    fan = FanOut([tracker], retry_seconds=0.0)
    fan.start(info(tmp_path))
    tracker.up = False
    for step in range(3):
        fan.log(report(step))
    tracker.tries, tracker.up = 5, True
    fan.log(report(3))
    assert tracker.got == ["start", 0]
    tracker.tries, tracker.up = 10, True
    fan.finish("FINISHED")
    assert tracker.got == ["start", 0, 1, 2, 3, "FINISHED"]


def test_numbers_that_are_not_finite_become_nan_and_are_counted(tmp_path: Path) -> None:
    seen: list[Report] = []

    class Listening(Flaky):
        def log(self, report: Report) -> None:
            seen.append(report)

    fan = FanOut([Listening()])
    fan.start(info(tmp_path))
    fan.log(Report(0, {"a": 1.0, "b": math.inf, "c": math.nan}))
    fan.log(Report(1, {"a": 1.0}))
    assert seen[0].scalars["tracking/nonfinite_count"] == 2
    assert math.isnan(seen[0].scalars["b"]) and math.isnan(seen[0].scalars["c"])
    assert seen[1].scalars == {"a": 1.0}


def test_a_report_survives_its_way_through_a_file_exactly() -> None:
    before = report(3)
    after = report_from_json(report_to_json(before))
    assert (after.step, after.scalars) == (before.step, before.scalars)
    assert torch.equal(after.histograms["kl/reverse_nats"].counts_K, before.histograms["kl/reverse_nats"].counts_K)
    assert after.histograms["kl/reverse_nats"].bins == "kl_nats"


def test_the_protocol_has_what_the_fan_out_offers() -> None:
    assert isinstance(info(Path("x")), RunInfo)
    for method in ("start", "log", "artifact", "tag", "finish"):
        assert callable(getattr(FanOut, method)) and callable(getattr(RunFolder, method))
