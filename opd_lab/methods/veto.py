"""Veto, a target between student and teacher: `method=veto`.

arXiv 2601.07155. The target is the teacher's distribution times a power of the student's own, which vetoes tokens that
the student would never write; the power falls over the run, so the target moves from near the student to the teacher.

    Q = q sg(p)^beta / Z,     beta_k = beta0 + (beta1 - beta0) k / schedule_steps,  k = step
    loss_t = KL(Q || p) forward, or KL(p || Q) reverse, Q held constant
    objective = sum_t loss_t / #tokens of the step

The reverse form has the gradient of KL(p || q) + beta H(p): minimising it lowers the entropy. Both forms rest at
p = q^(1/(1-beta)) / Z; from beta 1 on that is a single token.

Neutral: divergence reverse, beta0 0, beta1 0, align predict, aggregation token_mean.
Differs: the released code compares logits one position late, so that what predicts the first response token is never
         trained and what follows the last one is (align token), and averages positions per prompt (aggregation
         sequence_mean); its settings file has the reverse form from beta 1.2: `veto_official_code`.

Metrics: veto/beta_ratio.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.base import TRAINED, Method, choice, within
from opd_lab.methods.policy_gradient import per_rollout
from opd_lab.types import (
    FULL_STUDENT,
    FULL_STUDENT_AFTER,
    FULL_TEACHER,
    FULL_TEACHER_AFTER,
    Batch,
    Facts,
    Needs,
    Signal,
    Tokens,
)


@dataclass(frozen=True, kw_only=True)
class Veto(Method):
    paper = "https://arxiv.org/abs/2601.07155"
    neutral: ClassVar[Mapping[str, Any] | None] = {
        **{"divergence": "reverse", "beta0": 0.0, "beta1": 0.0},
        **{"align": "predict", "aggregation": "token_mean"},
    }
    not_zero_at_teacher: ClassVar = "its target sharpens the teacher by the student's own preferences"

    divergence: str = "forward"
    beta0: float = 0.8
    beta1: float = 0.0
    schedule_steps: int = 100
    align: str = "predict"
    aggregation: str = "token_mean"

    def __post_init__(self) -> None:
        choice("divergence", self.divergence, ("forward", "reverse"))
        within("schedule_steps", self.schedule_steps, ">= 1", self.schedule_steps >= 1)
        choice("align", self.align, ("predict", "token"))
        choice("aggregation", self.aggregation, ("token_mean", "sequence_mean"))
        for name, beta in (("beta0", self.beta0), ("beta1", self.beta1)):
            within(name, beta, "in [0, 2]", 0 <= beta <= 2, "at 1 and above the student ends at a single token")

    def check(self, facts: Facts) -> None:
        for name, beta in (("beta0", self.beta0), ("beta1", self.beta1)):
            if beta >= 1:
                warnings.warn(f"method.{name}={beta:g}: from 1 on the rest point is a single token", stacklevel=2)

    def beta(self, step: int) -> float:
        return self.beta0 + (self.beta1 - self.beta0) * min(step / self.schedule_steps, 1.0)

    def needs(self) -> Needs:
        return Needs(tokens=frozenset(self.both))

    @property
    def both(self) -> tuple[Signal, Signal]:
        """The distributions of student and teacher that are compared."""
        after = self.align == "token"
        return (FULL_STUDENT_AFTER, FULL_TEACHER_AFTER) if after else (FULL_STUDENT, FULL_TEACHER)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        mask_BT = batch.rollouts.mask_BT
        return {TRAINED: mask_BT.float() if self.aggregation == "token_mean" else per_rollout(mask_BT)}

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        logp_NV, logq_NV = (tokens[signal] for signal in self.both)
        target_NV = (logq_NV + self.beta(tokens.step) * logp_NV.detach()).log_softmax(-1)
        towards = d.forward_kl if self.divergence == "forward" else d.reverse_kl
        return {TRAINED: towards(logp_NV, target_NV)}

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        return {"veto/beta_ratio": self.beta(batch.step - 1)}  # the report of step k is numbered k + 1

    def conventions(self) -> dict[str, str]:
        return super().conventions() | {
            "divergence": f"{self.divergence}_kl_to_veto_target",
            "denominator": "tokens" if self.aggregation == "token_mean" else "rollouts",
            "align": self.align,
        }
