"""SKD, tokens that the teacher would not say are drawn again: `method=skd`.

arXiv 2410.11325. The student proposes every token; one that is not among the teacher's K likeliest is replaced at once
by a draw from the teacher, and the student goes on from there. The loss does not change.

    mu(v) = p(v) 1[v in S] + (1 - p(S)) q_tau(v),  S the teacher's K likeliest tokens,  q_tau ~ q^(1/tau), all tokens

is what that draws from, so here it is drawn from mu, with the one uniform of the token. It costs a teacher that decodes
beside the student for the whole run.

Neutral: k at least the vocabulary with support full, rollouts bit for bit included.
Differs: nothing known; the released code proposes several tokens at a time, which draws from the same mu.

Metrics: skd/replaced_fraction, mean of 1 - p(S), the chance of a replacement; blend/deviation_mean_nats,
blend/deviation_sequence_mean_nats, blend/log_ratio_sequence_mean_nats, blend/teacher_gain_mean_nats as in `method=trb`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from opd_lab.methods.base import within
from opd_lab.methods.blends import blend_metrics, replaced_outside, untempered
from opd_lab.methods.support_loss import SupportLoss
from opd_lab.types import Batch, Behavior, Facts, State


@dataclass(frozen=True, kw_only=True)
class SKD(SupportLoss):
    paper = "https://arxiv.org/abs/2410.11325"
    neutral: ClassVar = {"teacher_k": 10**9, "support": "full"}

    teacher_k: int = 25
    teacher_temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        hint = "1 = the teacher's favourite or a draw from it"
        within("teacher_k", self.teacher_k, ">= 1", self.teacher_k >= 1, hint)
        within("teacher_temperature", self.teacher_temperature, "> 0", self.teacher_temperature > 0)

    def check(self, facts: Facts) -> None:
        untempered("SKD", facts)

    def asks(self) -> Mapping[str, str]:
        return {"blend": ""}

    def behavior(self, plain: Behavior, step: int, state: State) -> Behavior:
        k, tau = self.teacher_k, self.teacher_temperature
        return replace(plain, mix=lambda logp_RV, logq_RV: replaced_outside(logp_RV, logq_RV, k, tau))

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        values = blend_metrics(batch)
        if values:
            replaced_N = batch.rollouts.extra["replaced"][batch.rollouts.mask_BT]
            values["skd/replaced_fraction"] = float(replaced_N.double().mean())
        return values
