"""The updates on one batch: schedules by hand, clipping, and what stops a run."""

import math
from dataclasses import replace

import pytest
import torch
from lab_run import run, settings

from opd_lab import optimize
from opd_lab.optimize import DivergedError, learning_rate
from opd_lab.tracking import read


def rates(tmp_path, schedule: str, warmup: int, steps: int = 10) -> list[float]:
    optim = replace(settings(tmp_path).optim, lr=1.0, schedule=schedule, warmup_steps=warmup)
    return [learning_rate(optim, step, steps) for step in range(steps)]


def test_schedules_by_hand(tmp_path):
    assert rates(tmp_path, "constant", 0) == [1.0] * 10
    assert rates(tmp_path, "constant", 4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(tmp_path, "linear", 0) == pytest.approx([1 - step / 10 for step in range(10)])
    assert rates(tmp_path, "linear", 2) == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    cosine = rates(tmp_path, "cosine", 0)
    assert (cosine[0], cosine[5]) == pytest.approx((1.0, 0.5))
    assert cosine[2] == pytest.approx((1 + math.cos(0.2 * math.pi)) / 2)


def test_a_clipped_gradient_has_the_allowed_norm(tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    folder = run(tmp_path, "optim.clip_norm=0.01").folder
    logged = read.metrics(folder)
    before = logged[logged["name"] == "optim/gradient_norm"]["value"]
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)
    assert (before > 0.01).all()
    assert (logged[logged["name"] == "optim/clipped_fraction"]["value"] == 1).all()


def test_a_gradient_that_is_no_number_stops_the_run_and_names_the_rollout(tmp_path, monkeypatch):
    accumulate, calls = optimize.accumulate_gradient, []

    def broken(*args, **kwargs):
        found = accumulate(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2:  # the second step
            found.losses["opd"][1, 0] = math.inf
            found.values["opd"] = math.inf
        return found

    monkeypatch.setattr(optimize, "accumulate_gradient", broken)
    with pytest.raises(DivergedError, match=r"step 1: the objective is inf .*rollouts \[9\] have an infinite loss"):
        run(tmp_path)
    (folder,) = (tmp_path / "opd_lab").glob("opd-s0-????????")
    assert read.status(folder)["status"] == "FAILED"
    assert int(read.metrics(folder)["step"].max()) == 1, "what was done stays"
