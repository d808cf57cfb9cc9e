"""What the methods share whose teacher says one number per sampled token: not a method, but what they are made of.

    loss_t = -sg(A_t) log p(y_t),   A_t = R_t = log q(y_t) - log p(y_t) unless a method says otherwise
    objective = sum_t loss_t / #tokens of the step

A constant that needs the whole step, such as the advantage of a rollout in its group, is made in `consult`, so that
neither micro-batches nor the order of rollouts can change it, and it may have either sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.base import TRAINED, Method, choice, quantile
from opd_lab.types import LOGP_STUDENT, LOGP_TEACHER, REVERSE_KL, Facts, Needs, Signal, Tokens

ON_AVERAGE = "a sampled token points to the teacher on average only, which tests/methods/test_on_average.py shows"
BASES: dict[str, frozenset[Signal]] = {
    "sampled": frozenset({LOGP_STUDENT, LOGP_TEACHER}),
    "full": frozenset({REVERSE_KL}),
}


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Method):
    """The score function on the student's own tokens, with the log-ratio to the teacher as the advantage."""

    neutral: ClassVar = None
    not_towards_teacher: ClassVar = ON_AVERAGE

    def check(self, facts: Facts) -> None:
        own_tokens(facts)

    def needs(self) -> Needs:
        return Needs(tokens=BASES["sampled"])

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        return {TRAINED: d.score_function(tokens[LOGP_STUDENT], -self.advantage(tokens))}

    def advantage(self, tokens: Tokens) -> Tensor:
        return log_ratio(tokens)

    def conventions(self) -> dict[str, str]:
        return super().conventions() | {"estimator": "k1_score"}


def log_ratio(tokens: Tokens) -> Tensor:
    """R = log q(y) - log p(y), no gradient."""
    return tokens[LOGP_TEACHER] - tokens[LOGP_STUDENT].detach()


def base_loss(tokens: Tokens, base: str) -> Tensor:
    """Reverse KL of plain OPD: from the sampled token, or over the full vocabulary."""
    if base == "full":
        return tokens[REVERSE_KL]
    return d.score_function(tokens[LOGP_STUDENT], -log_ratio(tokens))


def base_is_a_choice(base: str) -> None:
    choice("base", base, tuple(BASES))


def own_tokens(facts: Facts) -> None:
    """A policy gradient without an importance ratio is wrong on tokens that the current student did not draw."""
    if not facts.behavior.plain or facts.updates_per_rollout > 1:
        raise ValueError(
            "this method's policy gradient needs tokens drawn from the current student itself (temperature 1, no "
            f"filter, one update per rollout), got {facts.behavior} and optim.updates_per_rollout="
            f"{facts.updates_per_rollout}; change them, or use method=sampled with importance: token"
        )


def graded_groups(name: str, facts: Facts) -> None:
    """A method that compares the rewards of one prompt's rollouts needs rewards, and several rollouts."""
    if facts.per_prompt < 2:
        raise ValueError(
            f"{name} compares rollouts of one prompt: set rollout.per_prompt to 2 or more, got {facts.per_prompt}"
        )
    graded(name, facts)


def graded(name: str, facts: Facts) -> None:
    if not facts.graded:
        raise ValueError(f"{name} needs graded rollouts, got data={facts.data} without a grader; use data with answers")


def group_advantage(reward_B: Tensor, group_B: Tensor, *, std: str, eps: float) -> Tensor:
    """(reward - mean) / (std + eps) among the graded rollouts of a prompt, float64; `std` none divides by nothing. 0
    for a rollout without a reward, alone, or in a group of equal rewards."""
    advantage_B = torch.zeros_like(reward_B, dtype=torch.float64)
    for member_B in several_rewards(reward_B, group_B):
        reward_N = reward_B[member_B].double()
        spread = {"sample": 1, "population": 0}
        scale = reward_N.std(correction=spread[std]) + eps if std in spread else 1.0
        advantage_B[member_B] = (reward_N - reward_N.mean()) / scale
    return advantage_B


def several_rewards(reward_B: Tensor, group_B: Tensor) -> list[Tensor]:
    """The graded members of every group in which rewards differ."""
    members = [(group_B == group) & ~reward_B.isnan() for group in group_B.unique()]
    return [member_B for member_B in members if len(reward_B[member_B].unique()) > 1]


def degenerate_fraction(reward_B: Tensor, group_B: Tensor) -> float:
    """Share of groups that teach nothing: one rollout, or equal rewards."""
    return 1 - len(several_rewards(reward_B, group_B)) / max(len(group_B.unique()), 1)


def highest(value_BT: Tensor, mask_BT: Tensor, share: float) -> Tensor:
    """The tokens at or above the (1 - share) quantile of the step, linear interpolation. All of them at share 1."""
    return mask_BT & (value_BT >= quantile(value_BT[mask_BT], 100 * (1 - share)))


def over_all(keep_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Weights that divide the kept tokens' sum by the number of all tokens: n / N on each of the n kept."""
    return keep_BT * (keep_BT.sum() / mask_BT.sum().clamp(min=1))


def per_rollout(mask_BT: Tensor) -> Tensor:
    """Weights that make the objective the mean over rollouts of the mean over their tokens: N / (B T_i)."""
    length_B = mask_BT.sum(1).double()
    return mask_BT * (length_B.sum() / ((length_B > 0).sum() * length_B.clamp(min=1)).clamp(min=1))[:, None]


def share_kept(name: str, value: float) -> None:
    if not 0 < value <= 1:
        hint = f"; did you mean {value / 100:g}?" if 1 < value <= 100 else ""
        raise ValueError(f"method.{name} is the fraction of tokens kept, in (0, 1], got {value:g}{hint}")
