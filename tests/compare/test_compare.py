"""Runs made up by hand, compared: every number of the table is worked out beside it."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console
from torch import tensor

from opd_lab.compare.guard import same_axis
from opd_lab.compare.table import groups, interval, notes, render, table
from opd_lab.diagnostics.histograms import count
from opd_lab.tracking.run_folder import RunFolder
from opd_lab.tracking.tracker import FanOut, RunInfo
from opd_lab.types import Report


def a_run(
    home: Path, method: str, seed: int, correct: list[int], *, lr: float = 0.1, status: str = "FINISHED", **tags: str
) -> Path:
    """Three steps; problem p has 4 rollouts, of which 1 is correct before, and `correct[p]` after."""
    name = f"{method}-{lr}-{seed}"
    fields = {"method._target_": method, "method.beta": len(method)}
    params = {"seed": seed, "steps": 2, "rollout.prompts": 8, "optim.lr": lr, **fields}
    conventions = {"divergence": "reverse_kl", "estimator": "full_vocabulary", "denominator": "tokens"} | tags
    tracker = FanOut([RunFolder()])
    tracker.start(
        RunInfo(
            name=name,
            experiment="x",
            folder=home / name,
            params=params,
            tags={"method": method, **conventions},
            config_yaml="",
        )
    )
    for step in range(3):
        report = Report(step, {"kl/reverse_mean_nats": 1 / (step + 1), "loss/total_value": 1.0})
        report.scalars |= {"cost/generated_tokens": 100.0 * step, "cost/teacher_scored_tokens": 50.0 * step}
        report.scalars |= {"time/step_seconds": 2.0, "eval/validation/avg_at_4": step / 4}
        report.scalars |= {f"kl/reverse_p{q}_nats": q / 100 for q in (50, 90, 99)}
        report.histograms["kl/reverse_nats"] = count(tensor([0.1, 0.2]), "kl_nats")
        if step in (0, 2):
            after = correct if step else [1] * len(correct)
            report.scalars["eval/test/reverse_kl_mean_nats"] = 0.5 - step * seed / 10
            report.tables["evaluations"] = [
                {"set": "test", "problem": str(p), "n": 4, "correct": c} for p, c in enumerate(after)
            ]
        tracker.log(report)
    tracker.finish(status)
    return home / name


def test_the_numbers_of_the_table_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    a_run(tmp_path, "opd", 1, [4, 2])  # accuracy 3/4
    a_run(tmp_path, "opd", 2, [2, 0])  # accuracy 1/4
    (row,) = table(tmp_path).rows.to_dict("records")
    assert (row["method"], row["seeds"]) == ("opd", 2)
    assert row["accuracy_before"] == 0.25
    assert row["accuracy_after"] == 0.5
    # Mean accuracies of the problems: 3/4 and 1/4. Of two draws 1/4 are both low, 1/4 both high.
    assert (row["accuracy_low"], row["accuracy_high"]) == (0.25, 0.75)
    assert row["kl_held_out_nats"] == pytest.approx(0.2)  # mean of .3 and .1
    assert (row["student_tokens"], row["teacher_tokens"], row["seconds"]) == (200, 100, 6)


def test_the_interval_of_equal_problems_is_a_point_and_of_many_is_the_normal_one() -> None:
    assert interval([0.5] * 10) == (0.5, 0.5)
    low, high = interval([0.0, 1.0] * 200)  # standard error of the mean: .5 / sqrt(400) = .025
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.004)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.004)


def test_variants_of_a_method_are_rows_of_their_own_and_never_pooled_as_seeds(tmp_path: Path) -> None:
    runs = [a_run(tmp_path, "opd", seed, [1], lr=lr) for lr in (0.1, 0.2) for seed in (0, 1)]
    assert sorted(g.label for g in groups(runs)) == ["opd optim.lr=0.1", "opd optim.lr=0.2"]
    assert [len(g.folders) for g in groups(runs)] == [2, 2]


def test_keys_that_differ_besides_method_and_seed_are_named(tmp_path: Path) -> None:
    found = table([a_run(tmp_path, "opd", 0, [1]), a_run(tmp_path, "kat", 1, [1], lr=0.2)])
    assert found.differences == {"optim.lr": {"opd": 0.1, "kat": 0.2}}
    assert found.budget["rollout.prompts"] == "8"
    assert "differs: optim.lr: 0.1 (opd), 0.2 (kat)" in notes(found)
    same = table([tmp_path / "opd-0.1-0", a_run(tmp_path, "scope", 1, [1])])
    assert same.differences == {}
    assert notes(same) == ["Besides the method's own settings and the seed, nothing differs."]


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


def test_unlike_losses_are_refused_by_the_name_of_the_difference(tmp_path: Path) -> None:
    runs = [a_run(tmp_path, "opd", 0, [1]), a_run(tmp_path, "kat", 0, [1], denominator="rollouts")]
    with pytest.raises(ValueError, match=r"denominator is the same, got rollouts .*, tokens"):
        same_axis(runs, "loss/total_value")
    same_axis(runs, "kl/reverse_mean_nats")
    same_axis(runs[:1], "loss/total_value")


def test_a_convention_that_only_one_run_states_is_a_difference(tmp_path: Path) -> None:
    runs = [a_run(tmp_path, "opd", 0, [1]), a_run(tmp_path, "kat", 0, [1], beta="0.5")]
    with pytest.raises(ValueError, match=r"beta is the same, got 0\.5 .*, not said"):
        same_axis(runs, "loss/total_value")


def test_the_terminal_shows_budget_table_and_notes(tmp_path: Path) -> None:
    a_run(tmp_path, "opd", 0, [4, 2])
    out = io.StringIO()
    render(table(tmp_path), Console(file=out, width=200))
    assert "rollout.prompts 8" in out.getvalue()
    assert "0.750 [0.500, 1.000]" in out.getvalue()
