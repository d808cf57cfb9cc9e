"""A floor under the teacher's log-probs, and what happens without one."""

from __future__ import annotations

import math

import pytest
import torch
from lab_run import settings

from opd_lab.chunk import Chunk, Head, States
from opd_lab.optimize import DivergedError
from opd_lab.run import load_parts
from opd_lab.tracking.tracker import FanOut
from opd_lab.train import Trainer
from opd_lab.types import FORWARD_KL, LOGP_TEACHER, REVERSE_KL
from tests.pair import P, near

HALF = torch.tensor([[0.0, 0.5, 0.2, 0.1, 0.2]], dtype=torch.float64).log()  # rules out the student's favourite


def seen(floor: float | None) -> Chunk:
    head = Head(torch.eye(5, dtype=torch.float64), floor_nats=floor)
    finite = HALF.clamp(min=-1e300)  # the identity as a head: 0 times infinity is no number
    return Chunk(torch.tensor([0]), P.log()[None], States(finite, head))


def test_by_hand() -> None:
    """p = (.5 .2 .15 .1 .05). With a floor of -10 the first token costs .5 (log .5 + 10); the others
    .2 log .4 + .15 log .75 + .1 log 1 + .05 log .25 = -.295725. Forward KL is finite anyway: where q is 0 nothing is
    added, and .000045 log (.000045 / .5) = -.000423 with the floor."""
    assert float(seen(None)[REVERSE_KL]) > 1e299
    near(seen(-10.0)[LOGP_TEACHER], -10)
    near(seen(-10.0)[REVERSE_KL], 0.5 * (math.log(0.5) + 10) - 0.295725)
    near(seen(None)[FORWARD_KL], 0.792941)
    near(seen(-10.0)[FORWARD_KL], 0.792941 + math.exp(-10) * (-10 - math.log(0.5)))


@pytest.mark.parametrize("floor", ["null", "-30"])
def test_without_one_a_step_stops_the_run_and_with_one_it_goes_on(tmp_path, floor):
    asked = settings(tmp_path, f"model.teacher_floor_nats={floor}")
    parts = load_parts(asked, lambda note: None)
    linear = parts.teacher.lm.module.get_output_embeddings()
    linear.bias = torch.nn.Parameter(torch.zeros(len(linear.weight)), requires_grad=False)
    linear.bias[15:21] = -torch.inf  # all words that open a step
    trainer = Trainer(asked, parts, FanOut([]), tmp_path)
    if floor == "null":
        with pytest.raises(DivergedError, match=r"did the teacher rule a token out\? model.teacher_floor_nats"):
            trainer.advance()
    else:
        assert 1 < trainer.advance().scalars["kl/reverse_mean_nats"] < 30


def test_it_is_below_zero(tmp_path):
    with pytest.raises(ValueError, match=r"model.teacher_floor_nats must be below 0 or null, got 0"):
        settings(tmp_path, "model.teacher_floor_nats=0")
