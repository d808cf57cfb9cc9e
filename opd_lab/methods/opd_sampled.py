"""On-policy distillation from the sampled token alone: `method=opd_sampled`.

The post at the address below (k1 as the reward of a policy gradient); the estimators are J. Schulman's (2020).

The teacher says one number per token, its log-prob of the token that the student drew. The loss is a policy gradient
whose cost is the gap of that token: on average the gradient of reverse KL, token by token a noisy one. So it costs a
teacher no distribution, and needs tokens that the student itself drew.

    gap_t = log p(y_t) - log q(y_t),   k1 = gap,   k2 = gap^2 / 2,   k3 = q/p - 1 + gap
    loss_t = sg(r_t) * { sg(k1) log p(y_t)    score        E gradient = that of KL(p || q)
                       { k2                   direct       the same, token by token
                       { k3                   direct       E gradient = that of KL(q || p)
    r_t = 1, or min(p(y_t) / mu(y_t), importance_max) with importance: token;   mu: who drew y_t
    objective = sum_t loss_t / #tokens of the step

The value of the score form is not a divergence: read progress off kl/reverse_mean_nats. Refused, because by enumeration
of a vocabulary the expected gradient is another: k1 direct (it is zero), k2 and k3 as a reward (neither KL).
No ratio brings back a token that mu never draws (top-p, top-k, suppressed): there the gradient lacks its share.

Neutral: none. It equals plain OPD in expectation only, which the test of this method computes exactly.
Differs: tinker-cookbook also offers a discount over later tokens; here each token answers for itself, as in plain OPD.

Metrics: sampled/advantage_{mean,std,p01,p99}_nats, of -gap over the step's tokens: before r, and for every estimator;
sampled/gradient_variance, E|g|^2 - |E g|^2 over the step's tokens, g a token's gradient in its logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.base import TRAINED, Method, choice, within
from opd_lab.methods.policy_gradient import ON_AVERAGE
from opd_lab.types import FULL_STUDENT, LOGP_STUDENT, LOGP_TEACHER, Batch, Facts, Needs, Tokens

ESTIMATORS = {"k1": d.k1, "k2": d.k2, "k3": d.k3}
SLOPES = {"k2": lambda gap_N: gap_N, "k3": lambda gap_N: 1 - (-gap_N).exp()}  # their derivatives


@dataclass(frozen=True, kw_only=True)
class OPDSampled(Method):
    paper = "https://thinkingmachines.ai/blog/on-policy-distillation"
    neutral: ClassVar = None
    not_towards_teacher: ClassVar = ON_AVERAGE

    estimator: str = "k1"
    form: str = "score"
    importance: str = "none"
    importance_max: float = 5.0

    def __post_init__(self) -> None:
        choice("estimator", self.estimator, tuple(ESTIMATORS))
        choice("form", self.form, ("score", "direct"))
        choice("importance", self.importance, ("none", "token"))
        within("importance_max", self.importance_max, "at least 1", self.importance_max >= 1)
        if (self.estimator, self.form) == ("k1", "direct"):
            raise ValueError(
                "method.estimator k1 with form direct cannot teach: its expected gradient is zero; use form score"
            )
        if self.estimator != "k1" and self.form == "score":
            raise ValueError(
                f"method.estimator {self.estimator} with form score: {self.estimator} as a reward is biased; "
                "use estimator k1, or form direct"
            )

    def check(self, facts: Facts) -> None:
        if self.importance == "token":
            return
        if not facts.behavior.plain:
            raise ValueError(
                "method.importance none needs tokens drawn from the student itself (temperature 1, no filter), "
                f"got {facts.behavior}; use importance: token, or temperature 1, top_p 1, top_k 0, none suppressed"
            )
        if facts.updates_per_rollout > 1:
            raise ValueError(
                "method.importance none needs tokens of the current student, got "
                f"optim.updates_per_rollout={facts.updates_per_rollout}; use importance: token, or 1 update"
            )

    def needs(self) -> Needs:
        return Needs(tokens=frozenset({LOGP_STUDENT, LOGP_TEACHER, FULL_STUDENT}))

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        logp_N = tokens[LOGP_STUDENT]
        if self.form == "score":
            loss_N = d.score_function(logp_N, -self.advantage(tokens))
        else:
            loss_N = ESTIMATORS[self.estimator](logp_N - tokens[LOGP_TEACHER])
        return {TRAINED: self.ratio(tokens) * loss_N}

    def ratio(self, tokens: Tokens) -> Tensor | float:
        if self.importance == "none":
            return 1.0
        return (tokens[LOGP_STUDENT].detach() - tokens.behavior_logp_N).exp().clamp(max=self.importance_max)

    def slope(self, tokens: Tokens) -> Tensor:
        """Derivative of a token's loss in its log-prob."""
        if self.form == "score":
            return -self.ratio(tokens) * self.advantage(tokens)
        return self.ratio(tokens) * SLOPES[self.estimator](tokens[LOGP_STUDENT] - tokens[LOGP_TEACHER])

    def tally(self, tokens: Tokens) -> dict[str, Tensor]:
        """Of a token's gradient in the logits, slope (onehot - p): the sum, and the sum of squared lengths."""
        slope_N, p_NV = self.slope(tokens).detach(), tokens[FULL_STUDENT].detach().exp()
        square_N = 1 - 2 * tokens[LOGP_STUDENT].detach().exp() + p_NV.square().sum(-1)
        gradient_V = -(slope_N @ p_NV).double()
        gradient_V = gradient_V.index_add(0, tokens.ids_N, slope_N.double())
        square = (slope_N.double().square() * square_N).sum()
        return {"tokens": torch.tensor(len(slope_N)), "gradient_V": gradient_V, "square": square}

    def advantage(self, tokens: Tokens) -> Tensor:
        """What it is worth to have drawn this token: -k1."""
        return -d.k1(tokens[LOGP_STUDENT] - tokens[LOGP_TEACHER])

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        logp_BT, logq_BT = batch.signals.get(LOGP_STUDENT), batch.signals.get(LOGP_TEACHER)
        if logp_BT is None or logq_BT is None:
            return {}
        advantage_N = (logq_BT - logp_BT)[batch.rollouts.mask_BT].double()
        p01, p99 = torch.quantile(advantage_N, advantage_N.new_tensor([0.01, 0.99])).tolist()
        return {
            "sampled/gradient_variance": variance(batch.tallies),
            "sampled/advantage_mean_nats": float(advantage_N.mean()),
            "sampled/advantage_std_nats": float(advantage_N.std(correction=0)),
            "sampled/advantage_p01_nats": p01,
            "sampled/advantage_p99_nats": p99,
        }

    def conventions(self) -> dict[str, str]:
        return super().conventions() | {
            "divergence": "forward_sampled" if self.estimator == "k3" else "reverse_kl",
            "estimator": f"{self.estimator}_{self.form}",
            "importance": self.importance,
        }


def variance(tallies: Mapping[str, Tensor]) -> float:
    """Of the tokens' gradients, from their sums; NaN without tokens."""
    if not tallies or not tallies["tokens"]:
        return math.nan
    mean_V = tallies["gradient_V"] / tallies["tokens"]
    return float(tallies["square"] / tallies["tokens"] - mean_V @ mean_V)
