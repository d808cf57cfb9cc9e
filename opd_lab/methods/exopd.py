"""ExOPD, a step beyond the teacher: `method=exopd`.

arXiv 2602.12125. The teacher's advantage over a reference, log q - log r, is what the teacher learnt; it is amplified
by lambda > 1, so that the student is pulled past the teacher in that direction. The reference is the student's own
beginning, or the model that the teacher was trained from.

    A_t = lambda (log q - log r) - (log p - log r)                       at the sampled token
    base sampled  loss_t = -sg(A_t) log p(y_t)
    base full     loss_t = KL(p || q^lambda r^(1-lambda) / Z), the same gradient in expectation
    objective = sum_t loss_t / #tokens of the step

The key is `lambda_`, for Python keeps the plain word.

Neutral: lambda_ 1, base full.
Differs: the released example trains plain OPD at learning rate 1e-6 and ExOPD at 1e-5; compare at one rate.

Metrics: exopd/advantage_mean_nats, exopd/teacher_over_reference_mean_nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.base import TRAINED, choice, within
from opd_lab.methods.policy_gradient import PolicyGradient, base_is_a_choice
from opd_lab.types import (
    FULL_REFERENCE,
    FULL_STUDENT,
    FULL_TEACHER,
    LOGP_REFERENCE,
    LOGP_STUDENT,
    LOGP_TEACHER,
    Batch,
    Facts,
    Needs,
    Tokens,
)


@dataclass(frozen=True, kw_only=True)
class ExOPD(PolicyGradient):
    paper = "https://arxiv.org/abs/2602.12125"
    neutral: ClassVar[Mapping[str, Any] | None] = {"lambda_": 1.0, "base": "full"}
    towards_teacher: ClassVar[Mapping[str, Any]] = {"base": "full"}
    not_towards_teacher: ClassVar = None
    not_zero_at_teacher: ClassVar = "its target lies beyond the teacher, away from the reference"

    lambda_: float = 1.25
    reference: str = "student_init"
    base: str = "sampled"

    def __post_init__(self) -> None:
        within("lambda_", self.lambda_, "> 0", self.lambda_ > 0, "1 is plain OPD")
        choice("reference", self.reference, ("student_init", "teacher_base"))
        base_is_a_choice(self.base)

    def check(self, facts: Facts) -> None:
        if self.base == "sampled":
            super().check(facts)
        if (self.reference == "teacher_base") != (facts.reference is not None):
            raise ValueError(
                f"method.reference={self.reference} needs model.reference.path to be "
                f"{'the model the teacher was trained from' if facts.reference is None else 'null'}, "
                f"got {facts.reference or 'null'}"
            )

    def needs(self) -> Needs:
        sampled = {LOGP_STUDENT, LOGP_TEACHER, LOGP_REFERENCE}
        tokens = sampled if self.base == "sampled" else {FULL_STUDENT, FULL_TEACHER, FULL_REFERENCE}
        return Needs(batch=frozenset(sampled), tokens=frozenset(tokens))

    def advantage(self, tokens: Tokens) -> Tensor:
        logp_N, logq_N, logr_N = tokens[LOGP_STUDENT].detach(), tokens[LOGP_TEACHER], tokens[LOGP_REFERENCE]
        return self.lambda_ * (logq_N - logr_N) - (logp_N - logr_N)

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        if self.base == "sampled":
            return super().losses(tokens)
        beyond_NV = self.lambda_ * tokens[FULL_TEACHER] + (1 - self.lambda_) * tokens[FULL_REFERENCE]
        return {TRAINED: d.reverse_kl(tokens[FULL_STUDENT], beyond_NV.log_softmax(-1))}

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        mask_BT = batch.rollouts.mask_BT
        gained_N = (batch[LOGP_TEACHER] - batch[LOGP_REFERENCE])[mask_BT].double()
        moved_N = (batch[LOGP_STUDENT] - batch[LOGP_REFERENCE])[mask_BT].double()
        return {
            "exopd/advantage_mean_nats": float((self.lambda_ * gained_N - moved_N).mean()),
            "exopd/teacher_over_reference_mean_nats": float(gained_N.mean()),
        }

    def conventions(self) -> dict[str, str]:
        return super().conventions() | {
            "divergence": "reverse_kl" if self.lambda_ == 1 else f"reverse_kl_beyond_{self.lambda_:g}",
            "estimator": "k1_score" if self.base == "sampled" else "full_vocabulary",
        }
