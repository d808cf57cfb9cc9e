"""The sampled-token policy gradient with every knob of the field: `method=sampled`, and the variants named below.

The post at the address below for the estimators; arXiv 2606.17199 (PowerOPD) for the rewards; arXiv 2605.07865, read
second-hand, for the baseline; tinker-cookbook for the discount. `method=opd_sampled` is this one with plain settings;
its card lists the estimators. What is added here is what may stand in the place of the advantage R:

    R_t = log q(y_t) - log p(y_t)
    reward    log: R   clip: clip(R, -b, b)   tanh: tanh(R / b)   zscore: (R - mean) / std over the step's tokens
              power: q(y)^a - p(y)^a, and with power_scale unit that divided by a, which tends to R as a goes to 0
    discount  A_t = sum_{s >= t} discount^(s - t) reward_s
    baseline  exact_kl: A_t + KL(p || q) at t, a control variate: the gradient stays the same in expectation
    loss_t    = -sg(A_t) log p(y_t)

Discount 0 ignores that a token changes the prefixes after it, as every full-vocabulary method does; discount 1 is the
exact gradient of the sequence-level reverse KL. The baseline need not lower the variance: on the pair of the tests it
raises the trace of the gradient's covariance from 0.432378 to 0.582760. Power rewards shrink with a: retune the
learning rate and the gradient clip. Only reward log has the gradient of a KL; the others minimise something else that
rests where both models agree on what is drawn.

Refused: k1 direct (teaches nothing), k2 and k3 as a reward (biased); another reward, a baseline or a discount without
form score. A number that depends on the prefix alone, such as a top-k KL, is not offered as an advantage: its expected
gradient is zero.

Variants: sampled_k2, sampled_k3_forward, sampled_baseline, sampled_sequence (discount 1), power_opd, log_clip,
          log_tanh, log_zscore.
Neutral: none. With reward log and discount 0 it equals plain OPD in expectation, which a test computes exactly.
Differs: PowerOPD's code masks the last stop token and averages inside micro-batches; here neither. Its zscore divides
         by at least 1e-8, here by at least 1e-6.

Metrics: those of opd_sampled, of R whatever the reward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_lab.methods.base import choice, within
from opd_lab.methods.opd_sampled import OPDSampled
from opd_lab.types import FULL_STUDENT, LOGP_STUDENT, LOGP_TEACHER, REVERSE_KL, Batch, Needs, Tokens


@dataclass(frozen=True, kw_only=True)
class Sampled(OPDSampled):
    reward: str = "log"
    reward_bound: float = 5.0
    power: float = 5.0
    power_scale: str = "paper"
    baseline: str = "none"
    discount: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("reward", self.reward, ("log", "clip", "tanh", "zscore", "power"))
        within("reward_bound", self.reward_bound, "above 0 nats", self.reward_bound > 0)
        within("power", self.power, "above 0", self.power > 0)
        choice("power_scale", self.power_scale, ("paper", "unit"))
        choice("baseline", self.baseline, ("none", "exact_kl"))
        within("discount", self.discount, "in [0, 1]", 0 <= self.discount <= 1)
        if self.form == "direct" and (self.reward, self.baseline, self.discount) != ("log", "none", 0):
            raise ValueError(
                "method.form direct back-propagates the estimator itself, so it takes reward log, baseline none and "
                f"discount 0, got {self.reward}, {self.baseline} and {self.discount:g}; use form score"
            )

    @property
    def not_zero_at_teacher(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        reason = "standardising makes the rounding between equal models as large as any reward"
        return reason if self.reward == "zscore" else None

    @property
    def whole_step(self) -> bool:
        """The advantage of a token depends on other tokens."""
        return self.reward == "zscore" or self.discount > 0

    def needs(self) -> Needs:
        sampled = frozenset({LOGP_STUDENT, LOGP_TEACHER})
        exact = {REVERSE_KL} if self.baseline == "exact_kl" else set()
        if self.whole_step:
            return Needs(batch=sampled, tokens=frozenset({LOGP_STUDENT, FULL_STUDENT} | exact))
        return Needs(tokens=sampled | exact | {FULL_STUDENT})

    def consult(self, ask: object, batch: Batch) -> dict[str, Tensor]:
        if not self.whole_step:
            return {}
        mask_BT = batch.rollouts.mask_BT
        reward_BT = self.rewarded(batch[LOGP_STUDENT].double(), batch[LOGP_TEACHER].double())
        if self.reward == "zscore":
            reward_N = reward_BT[mask_BT]
            reward_BT = (reward_BT - reward_N.mean()) / reward_N.std(correction=0).clamp(min=1e-6)
        return {"advantage": returns(reward_BT.masked_fill(~mask_BT, 0.0), self.discount)}

    def advantage(self, tokens: Tokens) -> Tensor:
        logp_N = tokens[LOGP_STUDENT].detach()
        if self.whole_step:
            advantage_N = tokens.consulted["advantage"].to(logp_N.dtype)
        else:
            advantage_N = self.rewarded(logp_N, tokens[LOGP_TEACHER])
        return advantage_N + tokens[REVERSE_KL].detach() if self.baseline == "exact_kl" else advantage_N

    def rewarded(self, logp: Tensor, logq: Tensor) -> Tensor:
        """The reward of sampled tokens, token by token."""
        if self.reward == "power":
            scale = self.power if self.power_scale == "unit" else 1.0
            return ((self.power * logq).exp() - (self.power * logp).exp()) / scale
        ratio = logq - logp
        if self.reward == "clip":
            return ratio.clamp(-self.reward_bound, self.reward_bound)
        return torch.tanh(ratio / self.reward_bound) if self.reward == "tanh" else ratio

    def conventions(self) -> dict[str, str]:
        tags = super().conventions() | {"baseline": self.baseline, "discount": f"{self.discount:g}"}
        if self.reward != "log":
            tags["divergence"] = f"reward_{self.reward}"
        elif self.discount > 0:
            tags["divergence"] = "sequence_reverse_kl" if self.discount == 1 else "discounted_reverse_kl"
        return tags


def returns(reward_BT: Tensor, discount: float) -> Tensor:
    """sum over s >= t of discount^(s - t) reward_s."""
    if discount == 0:
        return reward_BT
    columns = list(reward_BT.unbind(1))
    for t in range(len(columns) - 2, -1, -1):
        columns[t] = columns[t] + discount * columns[t + 1]
    return torch.stack(columns, 1)
