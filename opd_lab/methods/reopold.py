"""REOPOLD, a floor under the reward and a mask of sure tokens: `method=reopold_clip`, `method=reopold`.

arXiv 2603.11137; of the paper only summaries and figures were available. A token that the teacher finds far less likely
than the student has a log-ratio without bound, and dominates the gradient. The reward gets a floor; the mask then keeps
the tokens at which the student is least sure.

    floor    log(lambda / (1 - lambda))
    A_t      = max(R_t, floor),   R_t = log q(y_t) - log p(y_t)
    mask     until switch_step: 1[R_t >= floor];   then: 1[H(p_t) >= quantile of H at 1 - beta over the step]
    loss_t   = -sg(A_t) log p(y_t) on the masked tokens, divided by their number

The floor follows from mixing the teacher with the student:  log((1 - lambda) e^R + lambda) >= log(1 - lambda) +
max(R, floor), with equality as R goes to either infinity. Three sources print it so, one prints log(lambda)/(1-lambda).

The key is `lambda_`, for Python keeps the plain word.

Status: reopold_clip, the floor alone, ships; reopold is experimental. Unknown, and ours: the step at which the stages
         change (switch_step 0 = the second from the start), and that the quantile is taken over the step. lambda and
         beta are read off figures.
Neutral: none. lambda_ 0 (and beta 1) is method=sampled, plain OPD in expectation.
Differs: unknown; no released code was seen.

Metrics: reopold/floor_fraction, tokens at the floor; for reopold also reopold/kept_fraction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opd_lab.methods.base import TRAINED, within
from opd_lab.methods.policy_gradient import PolicyGradient, highest, log_ratio, share_kept
from opd_lab.types import ENTROPY_STUDENT, LOGP_STUDENT, LOGP_TEACHER, Batch, Needs, Tokens


@dataclass(frozen=True, kw_only=True)
class ReopoldClip(PolicyGradient):
    """A floor under the log-ratio, which has no bound of its own."""

    paper = "https://arxiv.org/abs/2603.11137"

    lambda_: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.lambda_ < 1:
            raise ValueError(
                "method.lambda_ must be in [0, 1): the floor is log(lambda/(1-lambda)), "
                f"got {self.lambda_:g}; use 0 for no floor"
            )

    @property
    def floor(self) -> float:
        """Nats."""
        return math.log(self.lambda_ / (1 - self.lambda_)) if self.lambda_ > 0 else -math.inf

    def advantage(self, tokens: Tokens) -> Tensor:
        return log_ratio(tokens).clamp(min=self.floor)

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        logp_BT, logq_BT = batch.signals.get(LOGP_STUDENT), batch.signals.get(LOGP_TEACHER)
        if logp_BT is None or logq_BT is None:
            return {}
        below_N = (logq_BT - logp_BT)[batch.rollouts.mask_BT] < self.floor
        return {"reopold/floor_fraction": float(below_N.double().mean())}

    def conventions(self) -> dict[str, str]:
        return super().conventions() | {"divergence": "reward_floor" if self.lambda_ > 0 else "reverse_kl"}


@dataclass(frozen=True, kw_only=True)
class Reopold(ReopoldClip):
    """The floor, and only the tokens at which the student is least sure."""

    status: ClassVar[str] = "experimental"

    beta: float = 0.5
    switch_step: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        share_kept("beta", self.beta)
        within("switch_step", self.switch_step, "at least 0", self.switch_step >= 0)

    def needs(self) -> Needs:
        early = {LOGP_STUDENT, LOGP_TEACHER} if self.switch_step > 0 else set()
        return Needs(batch=frozenset({ENTROPY_STUDENT} | early), tokens=super().needs().tokens)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        mask_BT = batch.rollouts.mask_BT
        if batch.step < self.switch_step:
            keep_BT = mask_BT & (batch[LOGP_TEACHER] - batch[LOGP_STUDENT] >= self.floor)
        else:
            keep_BT = highest(batch[ENTROPY_STUDENT], mask_BT, self.beta)
        return {TRAINED: keep_BT.float()}

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        kept_N = weights[TRAINED][batch.rollouts.mask_BT] != 0
        return super().metrics(batch, weights) | {"reopold/kept_fraction": float(kept_N.double().mean())}

    def conventions(self) -> dict[str, str]:
        masked = self.beta < 1 or self.switch_step > 0
        return super().conventions() | {"denominator": "kept_tokens" if masked else "tokens"}
