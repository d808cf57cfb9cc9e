"""Group rewards: advantages by hand, degenerate groups, the mix with the teacher, KDRL's schedule."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lab.methods.base import TRAINED
from opd_lab.methods.policy_gradient import degenerate_fraction, group_advantage, over_all, per_rollout
from opd_lab.methods.reward_mix import GRPO, KDRL, RewardMix
from opd_lab.types import LOGP_STUDENT, LOGP_TEACHER, Behavior
from tests.methods.by_hand import FACTS, batch_of, token_losses
from tests.pair import LOGQ, P, near, with_gradient

REWARDS = (1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0)
REVERSE = (0.481811, -0.267793, -0.096872, 0.004733, -0.121879)


def advantages(rewards: Any, groups: Any = None, **keys: Any) -> Tensor:
    reward_B = torch.tensor(rewards, dtype=torch.float64)
    group_B = torch.zeros(len(rewards), dtype=torch.long) if groups is None else torch.tensor(groups)
    return group_advantage(reward_B, group_B, **({"std": "sample", "eps": 1e-4} | keys))


@pytest.mark.parametrize(
    ("std", "eps", "correct", "wrong"),
    [
        ("sample", 1e-4, 1.207381, -0.724429),
        ("sample", 1e-6, 1.207612, -0.724567),
        ("population", 1e-4, 1.290728, -0.774437),
        ("none", 1e-4, 0.625, -0.375),
    ],
)
def test_advantages(std: str, eps: float, correct: float, wrong: float) -> None:
    near(advantages(REWARDS, std=std, eps=eps), *(correct if r else wrong for r in REWARDS))


def test_degenerate_groups_teach_nothing_and_are_counted() -> None:
    """One alone, one of equal rewards that have no exact mean, one without rewards, and one that teaches."""
    rewards, groups = [1.0, 0.1, 0.1, 0.1, math.nan, 1.0, 0.0, math.nan], [3, 5, 5, 5, 9, 7, 7, 7]
    for std in ("sample", "population", "none"):
        got_B = advantages(rewards, groups, std=std, eps=0.0)
        assert got_B[[0, 1, 2, 3, 4, 7]].tolist() == [0.0] * 6
        assert got_B[5] == -got_B[6] > 0
    assert degenerate_fraction(torch.tensor(rewards), torch.tensor(groups)) == 0.75


def test_groups_are_found_wherever_they_stand() -> None:
    order = torch.tensor([4, 0, 6, 2, 7, 1, 5, 3])
    rewards, groups = torch.tensor(REWARDS), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    got_B = advantages(REWARDS, groups.tolist())
    near(advantages(rewards[order].tolist(), groups[order].tolist()), *got_B[order].tolist(), tolerance=1e-12)


def mixed(method: RewardMix, advantage: float, logq_V: Tensor = LOGQ) -> tuple[Tensor, Tensor]:
    """E over the vocabulary of the loss, and its gradient."""
    consulted = {"advantage": torch.full((5,), advantage, dtype=torch.float64)}
    return with_gradient(
        lambda logp: P * token_losses(method, logp, logq_V[None], range(5), consulted=consulted)[TRAINED]
    )


def test_the_mix_by_hand() -> None:
    """R = -.3, reward_coef .5 and A = 1.207381: .303691 in all."""
    method = RewardMix(reward_coef=0.5)
    logp_NV = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    q = 0.5 * math.exp(-0.3)
    logq_NV = torch.tensor([[q, 1 - q]], dtype=torch.float64).log()
    consulted = {"advantage": torch.tensor([1.207381], dtype=torch.float64)}
    loss_N = token_losses(method, logp_NV, logq_NV, [0], consulted=consulted)[TRAINED]
    near(loss_N, -0.303691 * math.log(0.5))


def test_a_constant_advantage_adds_nothing_in_expectation() -> None:
    near(mixed(RewardMix(), 1.2)[1], *REVERSE)
    near(mixed(GRPO(), 1.2)[1], 0.0, 0.0, 0.0, 0.0, 0.0)


def test_without_rewards_the_mix_is_plain_opd_in_expectation() -> None:
    near(mixed(RewardMix(reward_coef=0.0), 7.0)[1], *REVERSE)


def test_grpo_does_not_ask_the_teacher() -> None:
    assert GRPO().needs().tokens == {LOGP_STUDENT}
    assert RewardMix().needs().tokens == {LOGP_STUDENT, LOGP_TEACHER}


def test_rewards_reach_the_tokens() -> None:
    batch = batch_of(GRPO(), {LOGP_STUDENT: [[-1.0, -2.0], [-3.0]]}, group=[4, 4], reward=[1.0, 0.0])
    near(batch.consulted["advantage"], 0.7070068, -0.7070068)  # .5 / (.7071068 + 1e-4)
    assert GRPO().metrics(batch, GRPO().weights(batch)) == {"group/degenerate_fraction": 0.0}


def test_kdrl_adds_a_falling_share_of_k2() -> None:
    method = KDRL(decay_steps=4)
    assert [method.beta(step) for step in (0, 1, 2, 4, 9)] == pytest.approx([5e-3, 4e-3, 3e-3, 1e-3, 1e-3])
    consulted = {"advantage": torch.full((5,), 0.3, dtype=torch.float64)}
    _, gradient_V = with_gradient(
        lambda logp: P * token_losses(method, logp, LOGQ[None], range(5), consulted=consulted, step=2)[TRAINED]
    )
    near(gradient_V / 3e-3, *REVERSE)


def test_kdrl_pulls_towards_the_answers_that_were_better() -> None:
    """Without its k2 it is GRPO, token by token: -A log p."""
    consulted = {"advantage": torch.tensor([0.5, -0.25, 0.0, 0.0, 0.0], dtype=torch.float64)}
    alone = KDRL(beta_start=0.0, beta_end=0.0)
    for method in (alone, GRPO()):
        near(token_losses(method, P.log()[None], LOGQ[None], range(5), consulted=consulted)[TRAINED][:3],
             0.5 * math.log(2), -0.25 * math.log(5), 0.0)  # fmt: skip


def test_denominators_made_of_weights() -> None:
    """Token losses (1 2 3 4) (5) (2 2): mean of means 3.166667; the first rollout dropped: 3 and 1.285714."""
    mask_BT = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    loss_BT = torch.tensor([[1, 2, 3, 4], [5, 0, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)

    def objective(weight_BT: Tensor) -> float:
        return float((weight_BT * loss_BT).sum() / (weight_BT != 0).sum())

    kept_BT = mask_BT & torch.tensor([[False], [True], [True], [True]])
    assert objective(mask_BT.double()) == pytest.approx(2.714286, abs=1e-6)
    assert objective(per_rollout(mask_BT)) == pytest.approx(3.166667, abs=1e-6)
    assert objective(kept_BT.double()) == pytest.approx(3.0)
    assert objective(over_all(kept_BT, mask_BT)) == pytest.approx(1.285714, abs=1e-6)


def test_refused_before_the_first_token() -> None:
    with pytest.raises(ValueError) as refused:
        RewardMix().check(replace(FACTS, per_prompt=1))
    wanted = "reward_mix compares rollouts of one prompt: set rollout.per_prompt to 2 or more, got 1"
    assert str(refused.value) == wanted
    with pytest.raises(ValueError, match="grpo compares rollouts of one prompt"):
        GRPO().check(replace(FACTS, per_prompt=1))
    with pytest.raises(ValueError, match="kdrl needs graded rollouts, got data=d without a grader"):
        KDRL().check(replace(FACTS, graded=False))
    with pytest.raises(ValueError, match="use method=sampled with importance: token"):
        RewardMix().check(replace(FACTS, behavior=Behavior(temperature=0.7)))
    with pytest.raises(ValueError, match=r"optim.updates_per_rollout=2"):
        RewardMix().check(replace(FACTS, updates_per_rollout=2))
    RewardMix(reward_coef=0.0).check(replace(FACTS, per_prompt=1, graded=False))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"std": "max"}, "method.std must be one of sample, population, none, got max"),
        ({"eps": -1.0}, "method.eps must be at least 0, got -1"),
        ({"reward_coef": -1.0}, "method.reward_coef must be at least 0, got -1"),
        ({"kl_coef": 0.0, "reward_coef": 0.0}, "are both 0: nothing would be learned"),
    ],
)
def test_ranges(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardMix(**keys)


def test_conventions() -> None:
    assert RewardMix().conventions()["divergence"] == "reverse_kl+reward"
    assert RewardMix(reward_coef=0.0).conventions()["divergence"] == "reverse_kl"
    assert GRPO().conventions()["divergence"] == "reward"
    assert KDRL.status == "experimental"
