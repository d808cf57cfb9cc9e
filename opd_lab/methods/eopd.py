"""EOPD, forward KL where the teacher is unsure: `method=eopd`, `eopd_switch`, `eopd_official_code`.

arXiv 2603.07079. Reverse KL keeps a student to one of the teacher's ways. Where the teacher's entropy is high, so that
several ways are open, a forward KL on its likeliest tokens is added, which asks the student to cover them.

    base_t    = -sg(R_t) log p(y_t) with base sampled, the exact KL(p || q) with base full
    gate_t    = 1[H(q_t) >= tau]
    forward_t = alpha gate_t sum over the teacher's top k of qn (log qn - log p),   qn = q renormalised on its top k
    mode add:     base + forward;   mode switch: (1 - gate) base + forward
    both terms are divided by the number of all tokens

p is not renormalised, so the term also pulls mass onto the teacher's top k.

Neutral: alpha 0, base full, mode add.
Differs: two readers of the paper say that forward KL replaces the base where the gate is open, four that it is added:
         mode. The official README shows k 32, `eopd_official_code`; the paper's k is 16.

Metric: eopd/gate_fraction, tokens with an open gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opd_lab.divergence import forward_kl
from opd_lab.methods.base import TRAINED, Method, choice, within
from opd_lab.methods.policy_gradient import BASES, base_is_a_choice, base_loss, own_tokens
from opd_lab.types import ENTROPY_TEACHER, Batch, Facts, Needs, Tokens, TopK, topk


@dataclass(frozen=True, kw_only=True)
class EOPD(Method):
    paper = "https://arxiv.org/abs/2603.07079"
    neutral: ClassVar = {"alpha": 0.0, "base": "full", "mode": "add"}
    towards_teacher: ClassVar = {"base": "full"}
    not_zero_at_teacher: ClassVar = "the forward term renormalises the teacher on its top k and not the student"

    alpha: float = 1.0
    tau: float = 0.8
    k: int = 16
    gate: str = "at_least"
    mode: str = "add"
    base: str = "sampled"

    def __post_init__(self) -> None:
        within("alpha", self.alpha, "at least 0", self.alpha >= 0)
        within("tau", self.tau, "above 0 nats", self.tau > 0)
        choice("gate", self.gate, ("at_least", "above"))
        choice("mode", self.mode, ("add", "switch"))
        base_is_a_choice(self.base)

    def check(self, facts: Facts) -> None:
        if self.k < 1:
            raise ValueError(f"method.k must be between 1 and the vocabulary size {facts.vocabulary}, got {self.k}")
        if self.base == "sampled":
            own_tokens(facts)

    def needs(self) -> Needs:
        return Needs(tokens=BASES[self.base] | {ENTROPY_TEACHER, topk(self.k, "teacher")})

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        all_BT = super().weights(batch)[TRAINED]
        return {TRAINED: all_BT, "forward": all_BT}

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        open_N = self.opened(tokens[ENTROPY_TEACHER])
        base_N = base_loss(tokens, self.base)
        if self.mode == "switch":
            base_N = base_N.masked_fill(open_N, 0.0)
        cover_N = cover(tokens[topk(self.k, "teacher")]).masked_fill(~open_N, 0.0)
        return {TRAINED: base_N, "forward": self.alpha * cover_N}

    def opened(self, entropy: Tensor) -> Tensor:
        return entropy >= self.tau if self.gate == "at_least" else entropy > self.tau

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        entropy_BT = batch.signals.get(ENTROPY_TEACHER)
        if entropy_BT is None:
            return {}
        open_N = self.opened(entropy_BT[batch.rollouts.mask_BT])
        return {"eopd/gate_fraction": float(open_N.double().mean())}

    def conventions(self) -> dict[str, str]:
        return super().conventions() | {
            "divergence": f"reverse_kl+gated_forward_kl_{self.mode}",
            "estimator": ("k1_score" if self.base == "sampled" else "full_vocabulary") + "+topk",
            "topk_k": str(self.k),
        }


def cover(on: TopK) -> Tensor:
    """sum over S of qn (log qn - log p): the teacher renormalised on S, the student not."""
    return forward_kl(on.logp_student_NK, on.logp_teacher_NK.log_softmax(-1))
