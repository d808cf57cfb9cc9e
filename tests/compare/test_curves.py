"""Curves with bands over seeds, on axes of what was spent."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from opd_lab import evaluate
from opd_lab.compare.budget import AXES, along, spent
from opd_lab.compare.curves import COLUMNS, bounds, curves
from opd_lab.compare.scores import pass_at_k
from opd_lab.compare.table import table
from opd_lab.tracking import read
from tests.compare.made_up import a_run


def test_mean_and_band_by_hand(tmp_path: Path) -> None:
    a_run(tmp_path, "opd", 1, [4, 2], tokens=100)
    a_run(tmp_path, "opd", 2, [2, 0], tokens=300)
    found = curves(tmp_path, "eval/test/reverse_kl_mean_nats", "student_tokens")
    assert list(found.columns) == list(COLUMNS)
    first, last = found.to_dict("records")
    assert (first["step"], first["x"], first["mean"], first["seeds"]) == (0, 0, 0.5, 2)
    assert (last["step"], last["x"]) == (2, 400)  # the mean of 200 and 600
    assert (last["lowest"], last["highest"]) == pytest.approx((0.1, 0.3))
    half = 12.706205 * 0.1  # t(1), standard error of .1 and .3
    assert (last["low"], last["high"]) == pytest.approx((0.2 - half, 0.2 + half))
    assert last["speaks_of"] == "seeds"


def test_an_accuracy_has_the_interval_of_the_table(tmp_path: Path) -> None:
    a_run(tmp_path, "opd", 1, [4, 2, 1, 0])
    a_run(tmp_path, "opd", 2, [3, 2, 0, 0])
    a_run(tmp_path, "kat", 1, [4, 1, 3, 0])  # one seed
    found = curves(tmp_path, "eval/test/avg_at_4").groupby("method").last()
    rows = table(tmp_path).rows.set_index("method")
    for of_curve, of_table in (("mean", "after"), ("low", "low"), ("high", "high")):
        assert found[of_curve].to_dict() == rows[f"accuracy_{of_table}"].to_dict()
    assert (
        found["speaks_of"].to_dict() == {"opd": "problems and seeds", "kat": "problems"} == rows["speaks_of"].to_dict()
    )
    assert found["mean"]["kat"] == 0.5  # 1, .25, .75, 0: a standard deviation of .4564 and t(3) = 3.18245
    assert found["high"]["kat"] == pytest.approx(min(0.5 + 3.182446 * 0.4564355 / 2, 1))
    assert (found["lowest"]["opd"], found["highest"]["opd"]) == pytest.approx((5 / 16, 7 / 16))


def test_a_seed_that_has_come_less_far_takes_its_part_of_the_interval_with_it(tmp_path: Path) -> None:
    a_run(tmp_path, "opd", 1, [4, 2], best=[2, 2])
    a_run(tmp_path, "opd", 2, [2, 0])
    found = curves(tmp_path, "eval/test/avg_at_4").set_index("step")
    assert found["seeds"].to_dict() == {0: 2, 1: 1, 2: 2}
    assert found["speaks_of"].to_dict() == {0: "problems and seeds", 1: "problems", 2: "problems and seeds"}
    assert (found["low"][1], found["high"][1]) == (0.5, 0.5)  # both problems alike


def test_pass_at_k_of_the_rows_is_that_of_an_evaluation() -> None:
    for c in range(5):
        for k in (1, 2, 4):
            assert pass_at_k(4, c, k) == pytest.approx(evaluate.pass_at_k(4, c, k))


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("kl/reverse_mean_nats", (0, math.inf)),
        ("gap/mean_nats", (-math.inf, math.inf)),
        ("overlap/top16_fraction", (0, 1)),
        ("oprd/cosine_mean_fraction", (-1, 1)),
    ],
)
def test_an_interval_ends_where_no_value_can_lie(metric: str, expected: tuple[float, float]) -> None:
    assert bounds(metric) == expected


def test_every_axis_counts_what_was_spent(tmp_path: Path) -> None:
    run = a_run(tmp_path, "opd", 0, [4, 2], tokens=100)
    expected = {"steps": 2, "student_tokens": 200, "teacher_tokens": 100, "seconds": 6, "flops": 8 * 2000 + 2 * 1e5}
    assert set(expected) == set(AXES)
    for axis, value in expected.items():
        found = curves(run, "kl/reverse_mean_nats", axis)
        assert found.x.to_list() == [0, value / 2, value], axis
        assert math.isnan(found.low[0])  # one seed


def test_what_was_spent_in_the_end_is_the_end_of_every_axis(tmp_path: Path) -> None:
    run = a_run(tmp_path, "opd", 0, [4, 2], tokens=100)
    metrics = read.metrics(run)
    found = spent(metrics, run)
    assert found == {axis: float(along(axis, metrics, run).iloc[-1]) for axis in AXES if axis != "steps"}
    assert spent(metrics[metrics["name"] != "cost/generated_tokens"], run) == {"seconds": 6, "teacher_tokens": 100}


def test_the_teachers_tokens_are_each_counted_once() -> None:
    spent = {"scored": 100, "prefix": 50, "cached": 20, "decoded": 30, "generated": 10}
    rows = [{"step": 1, "name": f"cost/teacher_{name}_tokens", "value": value} for name, value in spent.items()]
    assert along("teacher_tokens", pd.DataFrame(rows), Path("run")).to_list() == [100 + 50 - 20 + 30]


def test_tokens_of_the_data_are_trained_and_not_sampled(tmp_path: Path) -> None:
    run = a_run(tmp_path, "sft", 0, [4, 2])
    counts = {"cost/generated_tokens": 100, "cost/dataset_tokens": 30}
    metrics = pd.DataFrame([{"step": 1, "name": name, "value": value} for name, value in counts.items()])
    assert along("flops", metrics, run).to_list() == [10 * (8 * 100 - 2 * 30)]  # a student of 10 parameters
    assert along("student_tokens", metrics, run).to_list() == [100]


def test_running_seeds_count_where_they_are(tmp_path: Path) -> None:
    a_run(tmp_path, "opd", 0, [4, 2], status="RUNNING")
    assert len(curves(tmp_path, "kl/reverse_mean_nats")) == 3


def test_what_cannot_be_drawn_is_refused_by_name(tmp_path: Path) -> None:
    a_run(tmp_path, "opd", 0, [4, 2])
    with pytest.raises(ValueError, match="x must be one of steps, student_tokens, teacher_tokens, seconds, flops, got"):
        curves(tmp_path, "kl/reverse_mean_nats", "dollars")
    with pytest.raises(ValueError, match="kl/nothing was logged by none of the runs of opd"):
        curves(tmp_path, "kl/nothing")
