"""Reverse or forward KL on a few tokens of the vocabulary: `method=topk` and the variants `topk16_*`.

arXiv 2604.13016 for `form: detached_weights`; most training systems do the others in one way or another. On the
student's rollouts only a support S of about k tokens per position is compared, with log-probs of the full vocabulary
gathered on S; no gradient flows through the choice of S. `tail` says what becomes of the mass outside:

    bucket        KL over |S| + 1 classes, the last one the left-over mass of each model
    renormalise   KL between the two distributions renormalised on S
    truncate      the bare partial sum, sum_S p (log p - log q) or sum_S q (log q - log p)
    form detached_weights, reverse only:   sum_S sg[w (log p - log q)] log p,   w = p renormalised on S

Facts, by enumeration, for p = (.5 .2 .15 .1 .05), q = (.1 .4 .15 .05 .3) and S fixed to the teacher's two likeliest
tokens, where q has .7 of its mass and p starts with .25:
    bucket        a divergence: >= 0, at most the full KL in either direction, equal to it at k = V. Gradient descent
                  brings the student's mass on S to .700000.
    renormalise   blind to the mass on S, and 0 whenever the ratios inside S agree, so always for a one-token S. The
                  mass stops at .212245 with value 0: converged, and wrong.
    truncate      no divergence. Reverse: its minimum -q(S)/e lies at p = q/e on S; the mass ends at .257516, the value
                  at -.257516. Forward: minimum q(S) ln q(S) at p = q/q(S) on S; mass 1, value -.249672. A negative
                  value is never clamped, for that kills its gradient.
    detached      the value means nothing; the gradient equals that of the direct form at k = V only.
So renormalise and truncate are here for parity with other systems and as controls (status: control). k above the
vocabulary means all of it, exactly. Where the intersection is empty a token has weight 0. S of student or union needs a
teacher that scores tokens of the student's choice: one that serves its own top-k only cannot.

Neutral: k at least the vocabulary, reverse, direct.
Differs: the systems differ among themselves. verl truncates (teacher, forward), NeMo-RL and ms-swift renormalise, TRL's
         server trainers use a bucket. The tags topk_support, topk_tail and topk_k tell them apart.

Metrics, over the trained tokens: topk/{student,teacher}_mass_fraction, what each model puts on S; with tail truncate,
topk/truncated_negative_fraction. With support intersection, over all tokens: overlap/empty_fraction, supports disjoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.base import TRAINED, Method, choice
from opd_lab.types import Batch, Facts, Needs, Tokens, TopK, overlap, topk


@dataclass(frozen=True, kw_only=True)
class TopKDistillation(Method):
    paper = "https://arxiv.org/abs/2604.13016"
    neutral: ClassVar = {"k": 10**9, "direction": "reverse", "support": "student", "tail": "bucket", "form": "direct"}

    k: int = 16
    direction: str = "reverse"
    support: str = "student"
    tail: str = "bucket"
    form: str = "direct"

    def __post_init__(self) -> None:
        choice("direction", self.direction, ("reverse", "forward"))
        choice("support", self.support, ("student", "teacher", "union", "intersection"))
        choice("tail", self.tail, d.TAILS)
        choice("form", self.form, ("direct", "detached_weights"))
        if self.form == "detached_weights" and self.direction == "forward":
            raise ValueError("method.form detached_weights is a form of reverse KL, got direction forward; use reverse")

    def check(self, facts: Facts) -> None:
        if self.k < 1:
            raise ValueError(f"method.k must be between 1 and the vocabulary size {facts.vocabulary}, got {self.k}")

    @property
    def status(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "ship" if self.tail == "bucket" or self.form != "direct" else "control"

    @property
    def not_zero_at_teacher(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        truncated = self.tail == "truncate" and self.form == "direct"
        return (
            "a bare partial sum moves mass across the border of the support even between equals" if truncated else None
        )

    @property
    def may_be_empty(self) -> bool:
        return self.support == "intersection"

    def needs(self) -> Needs:
        return Needs(
            batch=frozenset({overlap(self.k)} if self.may_be_empty else ()),
            tokens=frozenset({topk(self.k, self.support)}),
        )

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        weight_BT = super().weights(batch)[TRAINED]
        return {TRAINED: weight_BT * (batch[overlap(self.k)] > 0) if self.may_be_empty else weight_BT}

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        on: TopK = tokens[topk(self.k, self.support)]
        if self.form == "detached_weights":
            return {TRAINED: detached_reverse_kl(on)}
        return {TRAINED: d.topk_kl(on, direction=self.direction, tail=self.tail)}

    def tally(self, tokens: Tokens) -> dict[str, Tensor]:
        on: TopK = tokens[topk(self.k, self.support)]
        counts = {
            "student_mass": 1 - on.log_rest_student_N1.exp(),
            "teacher_mass": 1 - on.log_rest_teacher_N1.exp(),
            "truncated_negative": d.topk_kl(on, direction=self.direction, tail="truncate") < 0,
            "tokens": on.inside_NK.new_ones(len(on.inside_NK)),
        }
        return {name: value_N.sum(dtype=torch.float64) for name, value_N in counts.items()}

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        names = ["student_mass", "teacher_mass"] + ["truncated_negative"] * (self.tail == "truncate")
        values: dict[str, float | Tensor] = {}
        if batch.tallies:
            tokens = float(batch.tallies["tokens"])
            values |= {f"topk/{name}_fraction": float(batch.tallies[name]) / tokens for name in names}
        if self.may_be_empty:
            empty_N = batch[overlap(self.k)][batch.rollouts.mask_BT] == 0
            values["overlap/empty_fraction"] = float(empty_N.double().mean())
        return values

    def conventions(self) -> dict[str, str]:
        return super().conventions() | {
            "divergence": f"{self.direction}_kl",
            "estimator": "topk" if self.form == "direct" else "topk_detached_weights",
            "denominator": "kept_tokens" if self.may_be_empty else "tokens",
            "topk_k": str(self.k),
            "topk_support": self.support,
            "topk_tail": self.tail if self.form == "direct" else "renormalised_weights",
        }


def detached_reverse_kl(on: TopK) -> Tensor:
    """sum over S of sg[w (log p - log q)] log p, with w = p renormalised on S, and 0 where p has no mass."""
    inside_NK = on.inside_NK & ~on.logp_student_NK.isneginf()
    logp_NK = on.logp_student_NK.masked_fill(~inside_NK, 0.0)
    gap_NK = (logp_NK - on.logp_teacher_NK).masked_fill(~inside_NK, 0.0)
    w_NK = logp_NK.exp().masked_fill(~inside_NK, 0.0)
    w_NK = w_NK / w_NK.sum(-1, keepdim=True).masked_fill(~inside_NK.any(-1, keepdim=True), 1.0)
    return d.score_function(logp_NK, w_NK * gap_NK).sum(-1)
