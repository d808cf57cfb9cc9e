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

Metrics: sampled/advantage_{mean,std,p01,p99}_nats, of -gap over the step's tokens: before r, and for every estimator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.base import TRAINED, Method, choice, within
from opd_lab.methods.policy_gradient import ON_AVERAGE, seen
from opd_lab.types import LOGP_STUDENT, LOGP_TEACHER, Batch, Facts, Needs, Tokens

ESTIMATORS = {"k1": d.k1, "k2": d.k2, "k3": d.k3}


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
        return Needs(tokens=frozenset({LOGP_STUDENT, LOGP_TEACHER}))

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        logp_N = tokens[LOGP_STUDENT]
        if self.form == "score":
            loss_N = d.score_function(logp_N, -self.advantage(tokens))
        else:
            loss_N = ESTIMATORS[self.estimator](logp_N - tokens[LOGP_TEACHER])
        if self.importance == "token":
            ratio_N = (logp_N.detach() - tokens.behavior_logp_N).exp().clamp(max=self.importance_max)
            loss_N = ratio_N * loss_N
        return {TRAINED: loss_N}

    def advantage(self, tokens: Tokens) -> Tensor:
        """What it is worth to have drawn this token: -k1."""
        return -d.k1(tokens[LOGP_STUDENT] - tokens[LOGP_TEACHER])

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        logp_BT, logq_BT = seen(batch, LOGP_STUDENT), seen(batch, LOGP_TEACHER)
        if logp_BT is None or logq_BT is None:
            return {}
        advantage_N = (logq_BT - logp_BT)[batch.rollouts.mask_BT].double()
        p01, p99 = torch.quantile(advantage_N, advantage_N.new_tensor([0.01, 0.99])).tolist()
        return {
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
