"""Plain OPD on some of the tokens: `method=entropy_top20`, `method=tip`, and the control `method=suppress_rare`.

entropy_top20 is TrOPD's baseline (arXiv 2606.01249, our reading); tip is arXiv 2604.14084, read second-hand;
suppress_rare is ours, after the abstract of arXiv 2608.31046. Not every token teaches: these keep a share of the step's
tokens, by the student's entropy, by entropy and divergence together, or without a teacher.

    entropy_top20   kept: H >= quantile of H at 1 - keep over the step, H the student's or the teacher's
    tip             kept: s >= quantile of s at 1 - rho,  s = h + d - h d,  h = H(p) / max H(p),  d = KL / max KL
    loss            reverse KL on the kept tokens, base sampled: -sg(R) log p(y), base full: exact
    suppress_rare   loss = +log p(y) where p(y) lies below the step's quantile, divided by all tokens: a rare token is
                    pushed down, whatever the teacher says. If it does as well as OPD, the teacher did not matter.

denominator kept divides by the kept tokens, all by all of them. Equal values at the quantile are all kept.

Status: entropy_top20 ships as our reading (whose entropy and which denominator are not known); tip is experimental
         (its normalisation is unknown: division by the step's largest value is ours); suppress_rare is a control.
Neutral: keep 1 or rho 1, with base full. Neutral: none for suppress_rare, it has no teacher.
Differs: unknown; no released code was seen.

Metrics: entropy_top20/kept_fraction, tip/kept_fraction, suppress_rare/pushed_fraction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opd_lab.methods.base import TRAINED, Method, choice, quantile
from opd_lab.methods.policy_gradient import (
    BASES,
    base_is_a_choice,
    base_loss,
    highest,
    over_all,
    own_tokens,
    share_kept,
)
from opd_lab.types import ENTROPY_STUDENT, ENTROPY_TEACHER, LOGP_STUDENT, REVERSE_KL, Batch, Facts, Needs, Tokens

ENTROPY = {"student": ENTROPY_STUDENT, "teacher": ENTROPY_TEACHER}


@dataclass(frozen=True, kw_only=True)
class EntropyTop(Method):
    """Plain OPD on the tokens of highest entropy."""

    paper = "https://arxiv.org/abs/2606.01249"
    neutral: ClassVar = {"keep": 1.0, "base": "full"}
    towards_teacher: ClassVar = {"base": "full"}

    keep: float = 0.2
    owner: str = "student"
    denominator: str = "kept"
    base: str = "sampled"

    def __post_init__(self) -> None:
        share_kept("keep", self.keep)
        choice("owner", self.owner, tuple(ENTROPY))
        choice("denominator", self.denominator, ("kept", "all"))
        base_is_a_choice(self.base)

    def check(self, facts: Facts) -> None:
        if self.base == "sampled":
            own_tokens(facts)

    def needs(self) -> Needs:
        return Needs(batch=frozenset({ENTROPY[self.owner]}), tokens=BASES[self.base])

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        mask_BT = batch.rollouts.mask_BT
        keep_BT = highest(batch[ENTROPY[self.owner]], mask_BT, self.keep)
        return {TRAINED: over_all(keep_BT, mask_BT) if self.denominator == "all" else keep_BT.float()}

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        return {TRAINED: base_loss(tokens, self.base)}

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        return {"entropy_top20/kept_fraction": kept_fraction(batch, weights)}

    def conventions(self) -> dict[str, str]:
        kept = self.denominator == "kept" and self.keep < 1
        return super().conventions() | {
            "estimator": "k1_score" if self.base == "sampled" else "full_vocabulary",
            "denominator": "kept_tokens" if kept else "tokens",
        }


@dataclass(frozen=True, kw_only=True)
class TIP(Method):
    """Plain OPD on the tokens of high entropy or high divergence."""

    paper = "https://arxiv.org/abs/2604.14084"
    status: ClassVar[str] = "experimental"
    neutral: ClassVar = {"rho": 1.0}

    rho: float = 0.5

    def __post_init__(self) -> None:
        share_kept("rho", self.rho)

    def needs(self) -> Needs:
        return Needs(batch=frozenset({ENTROPY_STUDENT, REVERSE_KL}), tokens=BASES["full"])

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        mask_BT = batch.rollouts.mask_BT
        h_BT, d_BT = (of_largest(batch[signal], mask_BT) for signal in (ENTROPY_STUDENT, REVERSE_KL))
        return {TRAINED: highest(h_BT + d_BT - h_BT * d_BT, mask_BT, self.rho).float()}

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        return {"tip/kept_fraction": kept_fraction(batch, weights)}

    def conventions(self) -> dict[str, str]:
        return super().conventions() | {"denominator": "kept_tokens" if self.rho < 1 else "tokens"}


@dataclass(frozen=True, kw_only=True)
class SuppressRare(Method):
    """Rare tokens are pushed down, whatever the teacher says."""

    paper = "https://arxiv.org/abs/2608.31046"
    status: ClassVar[str] = "control"
    neutral: ClassVar = None
    not_zero_at_teacher: ClassVar = "it has no teacher"
    not_towards_teacher: ClassVar = "it has no teacher"

    rare: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.rare < 1:
            raise ValueError(f"method.rare is the fraction of tokens pushed down, in (0, 1), got {self.rare:g}")

    def needs(self) -> Needs:
        return Needs(batch=frozenset({LOGP_STUDENT}), tokens=frozenset({LOGP_STUDENT}))

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        mask_BT, logp_BT = batch.rollouts.mask_BT, batch[LOGP_STUDENT]
        rare_BT = mask_BT & (logp_BT < quantile(logp_BT[mask_BT], 100 * self.rare))
        return {TRAINED: over_all(rare_BT, mask_BT)}

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        return {TRAINED: tokens[LOGP_STUDENT]}

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        return {"suppress_rare/pushed_fraction": kept_fraction(batch, weights)}

    def conventions(self) -> dict[str, str]:
        return super().conventions() | {"divergence": "none", "estimator": "score"}


def of_largest(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """As a share of the step's largest value; 0 where that is 0."""
    value_BT = value_BT.double()
    return value_BT / value_BT.masked_fill(~mask_BT, 0.0).amax().clamp(min=1e-12)


def kept_fraction(batch: Batch, weights: Mapping[str, Tensor]) -> float:
    return float((weights[TRAINED][batch.rollouts.mask_BT] != 0).double().mean())
