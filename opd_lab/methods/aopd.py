"""AOPD, forward KL where the teacher does not want the sampled token more: `method=aopd`.

arXiv 2605.06387, read second-hand from three sources. Pushing a token down says nothing about what should come in its
place. So a token that the teacher finds no likelier than the student does is not pushed down; instead the student
learns the teacher's likeliest tokens there. Tokens that the teacher likes better are reinforced as ever.

    G_t    = 1[q(y_t) - p(y_t) <= tau]
    loss_t = G_t sum over the teacher's top k of q (log q - log p) + (1 - G_t) (-sg(R_t) log p(y_t))
    objective = mean over rollouts of the mean over their tokens

tau -1 leaves the policy gradient alone, tau 1 forward KL everywhere.

Status: experimental. Unknown: k and what becomes of the mass outside (16 and truncate are ours), and the optimiser.
Neutral: none. tau -1 is method=sampled, plain OPD in expectation, averaged over rollouts.
Differs: unknown; no released code was seen.

Metric: aopd/gate_fraction, tokens with G = 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.base import TRAINED, choice, within
from opd_lab.methods.policy_gradient import BASES, PolicyGradient, base_loss, per_rollout
from opd_lab.types import LOGP_STUDENT, LOGP_TEACHER, Batch, Facts, Needs, Tokens, topk


@dataclass(frozen=True, kw_only=True)
class AOPD(PolicyGradient):
    paper = "https://arxiv.org/abs/2605.06387"
    status: ClassVar[str] = "experimental"
    towards_teacher: ClassVar = {"tau": 1.0}
    not_towards_teacher: ClassVar = None
    not_zero_at_teacher: ClassVar = "a truncated forward KL pulls mass onto the teacher's top k even between equals"

    tau: float = 0.0
    k: int = 16
    tail: str = "truncate"

    def __post_init__(self) -> None:
        within("tau", self.tau, "in [-1, 1], a difference of probabilities", -1 <= self.tau <= 1)
        choice("tail", self.tail, d.TAILS)

    def check(self, facts: Facts) -> None:
        super().check(facts)
        if self.k < 1:
            raise ValueError(f"method.k must be between 1 and the vocabulary size {facts.vocabulary}, got {self.k}")

    def needs(self) -> Needs:
        return Needs(tokens=BASES["sampled"] | {topk(self.k, "teacher")})

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        return {TRAINED: per_rollout(batch.rollouts.mask_BT)}

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        cover_N = d.topk_kl(tokens[topk(self.k, "teacher")], direction="forward", tail=self.tail)
        gate_N = self.gated(tokens[LOGP_STUDENT].detach(), tokens[LOGP_TEACHER])
        return {TRAINED: torch.where(gate_N, cover_N, base_loss(tokens, "sampled"))}

    def gated(self, logp: Tensor, logq: Tensor) -> Tensor:
        return logq.exp() - logp.exp() <= self.tau

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        logp_BT, logq_BT = batch.signals.get(LOGP_STUDENT), batch.signals.get(LOGP_TEACHER)
        if logp_BT is None or logq_BT is None:
            return {}
        gate_N = self.gated(logp_BT, logq_BT)[batch.rollouts.mask_BT]
        return {"aopd/gate_fraction": float(gate_N.double().mean())}

    def conventions(self) -> dict[str, str]:
        return super().conventions() | {
            "divergence": "reverse_kl_or_forward_kl",
            "estimator": "k1_score+topk",
            "topk_k": str(self.k),
            "denominator": "rollouts",
            "topk_tail": self.tail,
        }
