"""Every method against the baseline, what was chosen on validation, and what was spent: by hand, on made-up runs."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from opd_lab.compare.printed import caption, notes, render
from opd_lab.compare.table import table
from tests.compare.made_up import a_run


def test_gains_over_the_baseline_are_paired_by_problem(tmp_path: Path) -> None:
    a_run(tmp_path, "kat", 0, [4, 4, 0, 0])
    a_run(tmp_path, "opd", 0, [4, 0, 0, 0])
    found = table(tmp_path)
    assert found.baseline == "opd"  # though kat started first
    (row,) = found.gains.to_dict("records")
    assert (row["method"], row["baseline"], row["problems"], row["gain"]) == ("kat", "opd", 4, 0.25)
    assert row["speaks_of"] == "problems"
    half = 3.182446 * 0.25  # t(3), and the differences 0, 1, 0, 0
    assert (row["gain_low"], row["gain_high"]) == pytest.approx((0.25 - half, min(0.25 + half, 1.0)))
    assert row["p"] == row["p_holm"] == pytest.approx(0.391002, abs=1e-6)
    assert not row["separated"]
    assert row["improvement"] == (0.5 + 1 + 0.5 + 0.5) / 4
    assert math.isnan(row["seeds_needed"])
    assert row["problems_needed"] > 4
    assert "nothing is known of other seeds" in caption(found)


def test_any_row_can_be_the_baseline_and_nothing_else_can(tmp_path: Path) -> None:
    for method in ("opd", "kat", "scope"):
        a_run(tmp_path, method, 0, [4, 2])
    assert set(table(tmp_path, "kat").gains.method) == {"opd", "scope"}
    with pytest.raises(
        ValueError, match=r"--baseline must be a row of the table, got skd; the rows are opd, kat, scope"
    ):
        table(tmp_path, "skd")


def test_only_shared_problems_are_compared(tmp_path: Path) -> None:
    a_run(tmp_path, "opd", 0, [4, 0])
    a_run(tmp_path, "kat", 0, [4, 4, 4])
    (row,) = table(tmp_path).gains.to_dict("records")
    assert (row["problems"], row["gain"]) == (2, 0.5)


def test_what_was_tried_and_is_not_shown_counts_as_a_comparison(tmp_path: Path) -> None:
    opd = a_run(tmp_path, "opd", 0, [4, 0, 0, 0])
    best, *_ = (a_run(tmp_path, "kat", 0, [4, 4, 4, 4], lr=lr) for lr in (0.1, 0.2, 0.3))
    found = table([opd, best])
    (row,) = found.gains.to_dict("records")
    assert found.comparisons == 3
    assert row["p_holm"] == pytest.approx(3 * row["p"])
    assert found.rows.tried.to_list() == [1, 3]
    out = io.StringIO()
    render(found, Console(file=out, width=120))
    assert "3 comparisons, 2 of them settings that are not shown" in " ".join(out.getvalue().split())
    a_run(tmp_path, "kat", 0, [4, 4, 4, 4], lr=0.4, status="FAILED")
    assert table([opd, best]).comparisons == 3


def test_the_gap_between_the_last_and_the_chosen_checkpoint(tmp_path: Path) -> None:
    a_run(tmp_path, "opd", 0, [4, 0], best=[4, 2])
    a_run(tmp_path, "kat", 0, [4, 0])
    opd, kat = table(tmp_path).rows.to_dict("records")
    assert (opd["accuracy_after"], opd["accuracy_best"], opd["best_gain"], opd["best_step"]) == (0.5, 0.75, 0.25, 1)
    assert (opd["best_gain_low"], opd["best_gain_high"]) == (-1.0, 1.0)  # t(1) * 0.25, cut
    assert math.isnan(kat["accuracy_best"])  # it was not tested


def test_an_unequal_budget_is_warned_of_with_its_ratio(tmp_path: Path) -> None:
    a_run(tmp_path, "opd", 0, [4, 2])
    a_run(tmp_path, "kat", 0, [4, 2], tokens=40)
    said = notes(table(tmp_path))
    assert "Equal for all: steps 2, prompts 16, rollouts 64, response limit 20, updates 2, seconds about 6" in said
    assert "WARNING: unequal budget: student tokens spent: 80 (kat) to 200 (opd), ratio 2.50" in said
    assert "WARNING: unequal budget: teacher tokens spent: 40 (kat) to 100 (opd), ratio 2.50" in said


def test_the_tables_fit_into_120_columns(tmp_path: Path) -> None:
    for seed in (0, 1):
        a_run(tmp_path, "opd", seed, [4, 0, 4, 2], best=[4, 4, 4, 2])
        a_run(tmp_path, "oprd_bridge_plus_opd", seed, [4, 4, 2, 0], best=[4, 4, 4, 2], tokens=1e6)
    out = io.StringIO()
    render(table(tmp_path), Console(file=out, width=120))
    tables = [line for line in out.getvalue().splitlines() if line[:1] in "┃│┏└┡"]
    assert max(map(len, out.getvalue().splitlines())) <= 120
    assert sum("oprd_bridge_plus_opd" in line for line in tables) == 2  # neither table has folded a name


def test_a_mark_from_one_seed_each_is_of_these_runs_only(tmp_path: Path) -> None:
    a_run(tmp_path, "opd", 0, [0] * 19 + [1])
    a_run(tmp_path, "kat", 0, [4] * 20)
    out = io.StringIO()
    render(table(tmp_path), Console(file=out, width=120))
    said = " ".join(out.getvalue().split())
    assert "< 0.001 │ (*) │" in said
    assert "after Holm over 1 comparison. (*) = of these very runs, which another seed may undo." in said
