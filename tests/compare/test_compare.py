"""Runs made up by hand, compared: every number of the table is worked out beside it."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from opd_lab.compare.groups import groups, texts
from opd_lab.compare.printed import notes, render
from opd_lab.compare.table import table
from tests.compare.made_up import a_run


def test_the_numbers_of_the_table_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    a_run(tmp_path, "opd", 1, [4, 2])  # accuracy 3/4
    a_run(tmp_path, "opd", 2, [2, 0])  # accuracy 1/4
    (row,) = table(tmp_path).rows.to_dict("records")
    assert (row["method"], row["seeds"]) == ("opd", 2)
    assert row["accuracy_before"] == 0.25
    assert row["accuracy_after"] == 0.5
    # Seeds 3/4 and 1/4, problems 3/4 and 1/4: t(1) sqrt(1/16 + 1/16) is beyond what an accuracy can be.
    assert (row["accuracy_low"], row["accuracy_high"]) == (0.0, 1.0)
    assert row["kl_held_out_nats"] == pytest.approx(0.2)  # mean of .3 and .1
    assert (row["student_tokens"], row["teacher_tokens"], row["seconds"]) == (200, 100, 6)
    assert row["flops"] == 10 * (2 + 6) * 200 + 2 * 1000 * 100


def test_variants_of_a_method_are_rows_of_their_own_and_never_pooled_as_seeds(tmp_path: Path) -> None:
    runs = [a_run(tmp_path, "opd", seed, [1], lr=lr) for lr in (0.1, 0.2) for seed in (0, 1)]
    assert sorted(g.label for g in groups(runs)) == ["opd optim.lr=0.1", "opd optim.lr=0.2"]
    assert [len(g.folders) for g in groups(runs)] == [2, 2]


def test_drawn_numbers_are_named_by_as_few_digits_as_tell_them_apart(tmp_path: Path) -> None:
    runs = [a_run(tmp_path, "opd", 0, [1], lr=lr) for lr in (0.88449963, 0.00123456, 0.0003)]
    assert sorted(g.label for g in groups(runs)) == [
        "opd optim.lr=0.0003",
        "opd optim.lr=0.00123",
        "opd optim.lr=0.884",
    ]
    assert texts([0.88449963, 0.88441963, None, True]) == ["0.8845", "0.8844", "None", "True"]


def test_keys_that_differ_besides_method_and_seed_are_named(tmp_path: Path) -> None:
    found = table([a_run(tmp_path, "opd", 0, [1]), a_run(tmp_path, "kat", 1, [1], lr=0.2)])
    assert found.differences == {"optim.lr": {"opd": 0.1, "kat": 0.2}}
    assert found.budget["rollout.prompts"] == "8"
    assert "differs: optim.lr: 0.1 (opd), 0.2 (kat)" in notes(found)
    same = table([tmp_path / "opd-0.1-0", a_run(tmp_path, "scope", 1, [1])])
    assert same.differences == {}
    assert notes(same)[-1] == "Besides the method's own settings and the seed, nothing differs."


def test_unfinished_runs_are_left_out_and_named(tmp_path: Path) -> None:
    runs = [a_run(tmp_path, "opd", 0, [4]), a_run(tmp_path, "opd", 1, [0], status="KILLED")]
    found = table(runs)
    assert found.rows.accuracy_after.to_list() == [1.0]
    assert found.left_out == ["opd-0.1-1"]
    with pytest.raises(ValueError, match=r"opd-0\.1-1, none of which has finished"):
        table(runs[1])


def test_data_without_answers_give_no_accuracy(tmp_path: Path) -> None:
    (row,) = table(a_run(tmp_path, "opd", 0, [])).rows.to_dict("records")
    assert math.isnan(row["accuracy_after"])


def test_the_terminal_shows_budget_table_and_notes(tmp_path: Path) -> None:
    a_run(tmp_path, "opd", 0, [4, 2])
    out = io.StringIO()
    render(table(tmp_path), Console(file=out, width=120))
    assert "Budget of every run: steps 2, prompts 16, rollouts 64," in out.getvalue()
    assert "0.750 [0.000, 1.000]" in out.getvalue()
