"""The pictures are drawn from what a run folder has, and say what is missing."""

import pytest
from lab_run import run

from opd_lab.analyze.figures import draw, labels, stretches, support_points
from opd_lab.tracking import read

MANY = ("diagnostics.every=1", "diagnostics.sample_rollouts=8")


def test_the_map_shows_the_tokens_of_early_and_late_rollouts(tmp_path):
    folder = run(tmp_path, *MANY).folder
    found = stretches(folder)
    sampled = read.rollouts(folder)
    assert [list(row) for row in sampled[sampled["step"] == 1]["reverse_kl"]] == found["early"]
    assert [list(row) for row in sampled[sampled["step"] == 4]["reverse_kl"]] == found["late"]
    assert draw("kl-map", folder).stat().st_size > 10_000


def test_a_point_per_run_with_means_over_the_first_steps(tmp_path):
    for seed in (0, 1):
        run(tmp_path, f"seed={seed}", "rollout.prompts=16")
    points = support_points(tmp_path / "opd_lab")
    assert len(points) == 2
    metrics = read.metrics(tmp_path / "opd_lab")
    for name, (logp, auroc, reward) in points.items():
        mine = metrics[metrics["run"] == name]
        assert logp == pytest.approx(mine[mine["name"] == "teacher/logp_mean_nats"]["value"].mean())
        assert reward == pytest.approx(mine[mine["name"] == "rollout/reward_mean_fraction"]["value"].mean())
        assert 0 <= auroc <= 1
    assert draw("support", tmp_path / "opd_lab").stat().st_size > 10_000


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    for skip in (10.0, 20.0):
        run(tmp_path, "method=fire_opd", f"method.skip_percentile={skip}", "steps=1", name="fire_opd")
    assert sorted(labels(tmp_path / "opd_lab").values()) == ["skip_percentile=10.0", "skip_percentile=20.0"]


def test_a_folder_without_runs(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        draw("support", tmp_path / "nothing")
