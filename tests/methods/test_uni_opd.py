"""Uni-OPD's margin: golden shifts, who is moved, and groups that are left alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lab.methods.base import TRAINED
from opd_lab.methods.uni_opd import UniOPD
from opd_lab.types import LOGP_STUDENT, LOGP_TEACHER, Batch
from tests.methods.by_hand import FACTS, batch_of, token_losses
from tests.pair import LOGP, LOGQ, P, near, with_gradient

R = [[0.1, -0.3, -0.1], [-0.2, -0.4], [-0.1] * 4, [-0.5, 0.1]]  # log-ratios of one prompt's answers
REWARD = [1.0, 1.0, 0.0, 0.0]


def step(method: UniOPD, rows: Any = R, reward: Any = REWARD, group: Any = None) -> Batch:
    """A step with these log-ratios."""
    signals = {
        LOGP_STUDENT: [[-1.0] * len(row) for row in rows],
        LOGP_TEACHER: [[r - 1.0 for r in row] for row in rows],
    }
    return batch_of(method, signals, reward=reward, group=group)


def lift(rows: Any = R, reward: Any = REWARD, group: Any = None, **keys: Any) -> Tensor:
    return step(UniOPD(**keys), rows, reward, group).consulted["lift"]


def test_the_margin_by_hand() -> None:
    """Means -.1 -.3 | -.1 -.2: gap -.05, shift .45, half to each side."""
    batch = step(UniOPD())
    near(batch.consulted["lift"], 0.225, 0.225, -0.225, -0.225)
    advantage_BT = torch.nan_to_num(batch[LOGP_TEACHER] - batch[LOGP_STUDENT]) + batch.consulted["lift"][:, None]
    got = advantage_BT[batch.rollouts.mask_BT]
    near(got, 0.325, -0.075, 0.125, 0.025, -0.175, -0.325, -0.325, -0.325, -0.325, -0.725, -0.125)


def test_minmax_compares_the_lowest_correct_with_the_highest_wrong() -> None:
    """-.3 against -.1: gap -.2, shift .6."""
    near(lift(stat="minmax"), 0.3, 0.3, -0.3, -0.3)


def test_one_side_takes_the_whole_shift() -> None:
    near(lift(direction="correct_up"), 0.45, 0.45, 0.0, 0.0)
    near(lift(direction="wrong_down"), 0.0, 0.0, -0.45, -0.45)


@pytest.mark.parametrize("direction", ["both", "correct_up", "wrong_down"])
def test_afterwards_the_gap_is_the_margin(direction: str) -> None:
    moved_B = torch.tensor([-0.1, -0.3, -0.1, -0.2], dtype=torch.float64) + lift(direction=direction)
    assert float(moved_B[:2].mean() - moved_B[2:].mean()) == pytest.approx(0.4)


def test_settings_of_the_code() -> None:
    """Global, delta 0, correct_up: the gap is -.05, over all four."""
    near(lift(group=[0, 1, 2, 3], scope="global", delta=0.0, direction="correct_up"), 0.05, 0.05, 0.0, 0.0)


def test_a_group_of_one_kind_is_left_alone() -> None:
    """The first prompt has both kinds, gap 0; the second only correct ones, the third an ungraded one."""
    rows = [[0.0], [0.0], [5.0], [-5.0], [9.0], [1.0]]
    got_B = lift(rows, [1.0, 0.0, 1.0, 1.0, math.nan, 0.0], [0, 0, 1, 1, 2, 2])
    near(got_B, 0.2, -0.2, 0.0, 0.0, 0.0, 0.0)


def test_a_margin_that_is_kept_moves_nothing() -> None:
    rows = [[0.3], [-0.2]]
    near(lift(rows, [1.0, 0.0]), 0.0, 0.0)
    near(lift(delta=-math.inf), 0.0, 0.0, 0.0, 0.0)


def test_metrics() -> None:
    rows, reward, group = [*R, [1.0], [0.0], [0.0]], [*REWARD, 1.0, 0.0, 1.0], [0, 0, 0, 0, 1, 1, 2]
    batch = step(UniOPD(), rows, reward, group)
    assert UniOPD().metrics(batch, UniOPD().weights(batch)) == pytest.approx(
        {"uni_opd/shift_mean_nats": (0.45 + 0.0) / 2, "uni_opd/calibrated_group_fraction": 1 / 3}
    )
    bare = step(UniOPD(), [[0.0]], [1.0])
    assert math.isnan(float(UniOPD().metrics(bare, {})["uni_opd/shift_mean_nats"]))


def test_without_a_lift_it_is_plain_opd_in_expectation() -> None:
    consulted = {"lift": torch.zeros(5, dtype=torch.float64)}
    _, gradient_V = with_gradient(
        lambda logp: P * token_losses(UniOPD(), logp, LOGQ[None], range(5), consulted=consulted)[TRAINED]
    )
    near(gradient_V, 0.481811, -0.267793, -0.096872, 0.004733, -0.121879)
    lifted = {"lift": torch.ones(1, dtype=torch.float64)}
    loss_N = token_losses(UniOPD(), LOGP[None], LOGQ[None], [1], consulted=lifted)[TRAINED]
    near(loss_N, -(math.log(2) + 1) * math.log(0.2))


def test_refused() -> None:
    with pytest.raises(ValueError) as refused:
        UniOPD().check(replace(FACTS, per_prompt=1))
    wanted = "uni_opd compares rollouts of one prompt: set rollout.per_prompt to 2 or more, got 1"
    assert str(refused.value) == wanted
    UniOPD(scope="global").check(replace(FACTS, per_prompt=1))
    with pytest.raises(ValueError, match="uni_opd needs graded rollouts"):
        UniOPD(scope="global").check(replace(FACTS, graded=False))
    for keys, message in [
        ({"scope": "batch"}, "method.scope must be one of group, global, got batch"),
        ({"stat": "median"}, "method.stat must be one of mean, minmax, got median"),
        ({"direction": "up"}, "method.direction must be one of both, correct_up, wrong_down, got up"),
        ({"delta": math.nan}, "method.delta must be below inf"),
    ]:
        with pytest.raises(ValueError, match=message):
            UniOPD(**keys)
