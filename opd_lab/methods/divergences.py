"""Other divergences on the student's rollouts, over the whole vocabulary: `method=forward_kl`, `method=jsd`.

arXiv 2306.13649 (GKD, eq. 1). The rollouts are the student's, as in plain OPD; another divergence between the two
next-token distributions is back-propagated. Forward KL covers what the teacher likes, reverse KL keeps to what the
teacher allows; the generalised JSD lies between them.

    forward_kl   loss = KL(q || p) = sum_v q (log q - log p)
    jsd          loss = beta KL(q || m) + (1 - beta) KL(p || m),   m = beta q + (1 - beta) p           (eq. 1)
                 beta 0 := KL(q || p),  beta 1 := KL(p || q)

The JSD itself is 0 at both ends: the KLs are the limits of JSD / beta and JSD / (1 - beta). So with `scale: paper` the
loss jumps about elevenfold between beta 0.1 and beta 0, and a sweep over beta silently sweeps the learning rate.
`scale: unit` (ours) divides by beta (1 - beta) and runs without a jump from one KL to the other. p the student, q the
teacher; in other systems beta is reversed or is the weight of a plain sum of the two KLs.

Neutral: none for forward_kl, it is jsd at beta 0; jsd at beta 1 is plain OPD under either scale.
Differs: nothing; TRL 1.16.0 gives the same numbers and gradients at every beta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opd_lab.methods.base import TRAINED, Method, choice
from opd_lab.types import FORWARD_KL, Needs, Tokens, jsd


@dataclass(frozen=True, kw_only=True)
class ForwardKL(Method):
    """Forward KL, which covers what the teacher likes, in place of reverse KL."""

    paper = "https://arxiv.org/abs/2306.13649"
    neutral: ClassVar = None

    def needs(self) -> Needs:
        return Needs(tokens=frozenset({FORWARD_KL}))

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        return {TRAINED: tokens[FORWARD_KL]}

    def conventions(self) -> dict[str, str]:
        return super().conventions() | {"divergence": "forward_kl"}


@dataclass(frozen=True, kw_only=True)
class JSD(Method):
    """A divergence between forward and reverse KL."""

    paper = "https://arxiv.org/abs/2306.13649"
    neutral: ClassVar = {"beta": 1.0}

    beta: float = 0.5
    scale: str = "paper"

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(
                f"method.beta must be in [0, 1] (GKD convention: 0 = forward KL, 1 = reverse KL), got {self.beta:g}"
            )
        choice("scale", self.scale, ("paper", "unit"))

    def needs(self) -> Needs:
        return Needs(tokens=frozenset({jsd(self.beta)}))

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        loss_N = tokens[jsd(self.beta)]
        inside = 0 < self.beta < 1  # the ends are the KLs already
        return {TRAINED: loss_N / (self.beta * (1 - self.beta)) if self.scale == "unit" and inside else loss_N}

    def conventions(self) -> dict[str, str]:
        ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
        scale = "_unit" if self.scale == "unit" else ""
        if self.beta in ends:  # a KL, which has no beta
            return super().conventions() | {"divergence": ends[self.beta]}
        return super().conventions() | {
            "divergence": f"jsd_{self.beta:g}{scale}",
            "beta": "0 forward KL, 1 reverse KL",
        }
