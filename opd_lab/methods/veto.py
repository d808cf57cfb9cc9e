"""Veto, a target between student and teacher: `method=veto`.

arXiv 2601.07155. The target is the teacher's distribution times a power of the student's own, which vetoes tokens that
the student would never write; the power falls over the run, so the target moves from near the student to the teacher.

    Q = q sg(p)^beta / Z,     beta_k = beta0 + (beta1 - beta0) k / schedule_steps,  k = step
    loss_t = KL(Q || p) forward, or KL(p || Q) reverse, Q held constant
    objective = sum_t loss_t / #tokens of the step

The reverse form has the gradient of KL(p || q) + beta H(p): minimising it lowers the entropy. Both forms rest at
p = q^(1/(1-beta)) / Z; from beta 1 on that is a single token.

Neutral: divergence reverse, beta0 0, beta1 0.
Differs: the released code compares logits from one position late, so that the first response token is never trained and
         the position after the last one is, and averages positions per prompt; ours trains the generated tokens, each
         once.

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
from opd_lab.types import FULL_STUDENT, FULL_TEACHER, Batch, Needs, Tokens


@dataclass(frozen=True, kw_only=True)
class Veto(Method):
    paper = "https://arxiv.org/abs/2601.07155"
    neutral: ClassVar[Mapping[str, Any] | None] = {"divergence": "reverse", "beta0": 0.0, "beta1": 0.0}
    not_zero_at_teacher: ClassVar = "its target sharpens the teacher by the student's own preferences"

    divergence: str = "forward"
    beta0: float = 0.8
    beta1: float = 0.0
    schedule_steps: int = 100

    def __post_init__(self) -> None:
        choice("divergence", self.divergence, ("forward", "reverse"))
        within("schedule_steps", self.schedule_steps, ">= 1", self.schedule_steps >= 1)
        for name, beta in (("beta0", self.beta0), ("beta1", self.beta1)):
            within(name, beta, "in [0, 2]", 0 <= beta <= 2, "at 1 and above the student ends at a single token")
            if beta >= 1:
                warnings.warn(f"method.{name}={beta:g}: from 1 on the rest point is a single token", stacklevel=2)

    def beta(self, step: int) -> float:
        return self.beta0 + (self.beta1 - self.beta0) * min(step / self.schedule_steps, 1.0)

    def needs(self) -> Needs:
        return Needs(tokens=frozenset({FULL_STUDENT, FULL_TEACHER}))

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        logp_NV, logq_NV = tokens[FULL_STUDENT], tokens[FULL_TEACHER]
        target_NV = (logq_NV + self.beta(tokens.step) * logp_NV.detach()).log_softmax(-1)
        towards = d.forward_kl if self.divergence == "forward" else d.reverse_kl
        return {TRAINED: towards(logp_NV, target_NV)}

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        return {"veto/beta_ratio": self.beta(batch.step - 1)}  # the report of step k is numbered k + 1

    def conventions(self) -> dict[str, str]:
        return super().conventions() | {"divergence": f"{self.divergence}_kl_to_veto_target"}
