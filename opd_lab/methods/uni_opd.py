"""Uni-OPD, the margin between correct and wrong answers: `method=uni_opd`, `method=uni_opd_code_defaults`.

arXiv 2605.03677. The teacher's log-ratio should rank the correct answers to a prompt above the wrong ones, by `delta`
nats per token. Where it does not, all tokens of the correct answers are lifted and those of the wrong ones lowered
until it does. Only this margin is here, not the paper's balancing of the data.

    R_t   = log q(y_t) - log p(y_t),   mA_i = mean of R over the tokens of rollout i
    gap   = mean of mA over the correct - mean over the wrong;   stat minmax: lowest correct - highest wrong
    shift = max(0, delta - gap);   0 where a group has not both kinds
    A_t   = R_t + shift / 2 in a correct rollout, R_t - shift / 2 in a wrong one
            correct_up: + shift on the correct alone;  wrong_down: - shift on the wrong alone
    loss_t = -sg(A_t) log p(y_t)

Neutral: none. With delta -inf it is method=sampled, plain OPD in expectation.
Differs: the released code's own defaults, `uni_opd_code_defaults`, are another method than its launch scripts': one
         group of the whole batch, delta 0, correct_up. It calls wrong_down incorrect_down. When a group lies on one
         process it shifts the correct answers whatever the direction says.

Metrics: uni_opd/shift_mean_nats, over groups with both kinds; uni_opd/calibrated_group_fraction, groups shifted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opd_lab.methods.base import choice, rollout_mean
from opd_lab.methods.policy_gradient import PolicyGradient, graded, graded_groups, log_ratio
from opd_lab.types import LOGP_STUDENT, LOGP_TEACHER, Batch, Facts, Needs, Tokens

LIFT = {"both": (0.5, -0.5), "correct_up": (1.0, 0.0), "wrong_down": (0.0, -1.0)}  # of the shift: correct, wrong


@dataclass(frozen=True, kw_only=True)
class UniOPD(PolicyGradient):
    paper = "https://arxiv.org/abs/2605.03677"
    not_zero_at_teacher: ClassVar = "equal models leave a gap of 0, which is below the margin"

    delta: float = 0.4
    scope: str = "group"
    stat: str = "mean"
    direction: str = "both"

    def __post_init__(self) -> None:
        choice("scope", self.scope, ("group", "global"))
        choice("stat", self.stat, ("mean", "minmax"))
        choice("direction", self.direction, tuple(LIFT))
        if not self.delta < math.inf:
            raise ValueError(f"method.delta must be below inf, nats per token, got {self.delta:g}; -inf = no margin")

    def check(self, facts: Facts) -> None:
        super().check(facts)
        (graded_groups if self.scope == "group" else graded)("uni_opd", facts)

    def needs(self) -> Needs:
        sampled = frozenset({LOGP_STUDENT, LOGP_TEACHER})
        return Needs(batch=sampled, tokens=sampled)

    def consult(self, ask: object, batch: Batch) -> dict[str, Tensor]:
        lift_B = torch.zeros_like(batch.rollouts.reward_B, dtype=torch.float64)
        for correct_B, wrong_B, shift in self.shifts(batch):
            up, down = LIFT[self.direction]
            lift_B[correct_B] = up * shift
            lift_B[wrong_B] = down * shift
        return {"lift": lift_B}

    def advantage(self, tokens: Tokens) -> Tensor:
        return log_ratio(tokens) + tokens.consulted["lift"].to(tokens[LOGP_STUDENT].dtype)

    def shifts(self, batch: Batch) -> list[tuple[Tensor, Tensor, float]]:
        """Of every group with both kinds: its correct rollouts, its wrong ones, and the shift. A rollout without
        tokens, verdict or a finite score takes no part."""
        rollouts = batch.rollouts
        mean_B = rollout_mean(batch[LOGP_TEACHER] - batch[LOGP_STUDENT], rollouts.mask_BT)
        scope_B = rollouts.group_B if self.scope == "group" else torch.zeros_like(rollouts.group_B)
        found = []
        for group in scope_B.unique():
            member_B = (scope_B == group) & mean_B.isfinite()
            correct_B, wrong_B = member_B & (rollouts.reward_B > 0), member_B & (rollouts.reward_B <= 0)
            if correct_B.any() and wrong_B.any():
                good_N, bad_N = mean_B[correct_B], mean_B[wrong_B]
                gap = good_N.mean() - bad_N.mean() if self.stat == "mean" else good_N.min() - bad_N.max()
                found.append((correct_B, wrong_B, max(0.0, self.delta - float(gap))))
        return found

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        shifts = [shift for _, _, shift in self.shifts(batch)]
        groups = len(batch.rollouts.group_B.unique()) if self.scope == "group" else 1
        return {
            "uni_opd/shift_mean_nats": sum(shifts) / len(shifts) if shifts else math.nan,
            "uni_opd/calibrated_group_fraction": sum(shift > 0 for shift in shifts) / max(groups, 1),
        }

    def conventions(self) -> dict[str, str]:
        return super().conventions() | {"divergence": "reverse_kl+margin"}
