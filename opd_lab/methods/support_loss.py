"""Reverse KL over the whole vocabulary or on the student's likeliest tokens: not a method, but the loss that methods
share which change the sampler alone. On a support it has the gradients of `method=topk`, whose card has the facts about
tails; with detached weights its value is the weighted gap itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.base import TRAINED, Method, choice, within
from opd_lab.types import REVERSE_KL, Needs, Signal, Tokens, TopK, topk


@dataclass(frozen=True, kw_only=True)
class SupportLoss(Method):
    """Whoever sampled a token, the loss at its prefix is a sum over tokens of the student's distribution."""

    neutral: ClassVar = {"support": "full"}

    support: str = "full"
    k: int = 16
    form: str = "detached_weights"
    tail: str = "bucket"

    def __post_init__(self) -> None:
        if self.support not in ("student", "full"):
            raise ValueError(
                f"method.support must be student or full, got {self.support}: tokens may be drawn from another "
                "distribution than the student's, where one-sample estimates of its KL are biased"
            )
        within("k", self.k, ">= 1", self.k >= 1)
        choice("form", self.form, ("direct", "detached_weights"))
        choice("tail", self.tail, d.TAILS)

    @property
    def signal(self) -> Signal:
        return REVERSE_KL if self.support == "full" else topk(self.k, "student")

    @property
    def not_zero_at_teacher(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        truncated = (self.support, self.form, self.tail) == ("student", "direct", "truncate")
        return "a truncated sum moves mass across the border of the support even between equals" if truncated else None

    def needs(self) -> Needs:
        return Needs(tokens=frozenset({self.signal}))

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        if self.support == "full":
            return {TRAINED: tokens[REVERSE_KL]}
        if self.form == "detached_weights":
            return {TRAINED: weighted_gap(tokens[self.signal])}
        return {TRAINED: d.topk_kl(tokens[self.signal], direction="reverse", tail=self.tail)}

    def conventions(self) -> dict[str, str]:
        if self.support == "full":
            return super().conventions()
        return super().conventions() | {
            "estimator": "topk" if self.form == "direct" else "topk_detached_weights",
            "topk_k": str(self.k),
            "topk_support": "student",
            "topk_tail": self.tail if self.form == "direct" else "renormalised_weights",
        }


def weighted_gap(on: TopK) -> Tensor:
    """sum_S w (log p - log q), w = p renormalised on S; its gradient is sum_S w (log p - log q) grad log p."""
    gone_NK = ~on.inside_NK | on.logp_student_NK.isneginf()
    logp_NK = on.logp_student_NK.masked_fill(gone_NK, -1e9)
    cost_NK = logp_NK.softmax(-1) * (logp_NK - on.logp_teacher_NK).masked_fill(gone_NK, 0.0)
    return d.score_function(1 + logp_NK - logp_NK.detach(), cost_NK).sum(-1)
