"""TRB, rollouts written between student and teacher at first: `method=trb`.

arXiv 2605.31159. Early rollouts of a student are poor, so the teacher is asked about poor prefixes. For the first K
steps another policy writes the rollouts: at every prefix the distribution nearest to the teacher inside a KL ball
around the student, whose radius falls to 0. Loss, weights and denominator do not change; the loss sums over the
student's own tokens, so it does not depend on which token was sampled, and needs no importance weight:

    mu = argmin KL(mu || q)  subject to  KL(mu || p) <= eps_k                                                  (1)
       = p^(1-beta) q^beta / Z,  beta the largest in [0, 1] inside the ball, per prefix                        (2)
    eps_k = eps_0 (1 - k/K) for k <= K, then 0: the student alone, by the code path of plain OPD               (3)
    E_mu[log mu - log p] = KL(mu || p),   KL(P_mu || P_student) <= sum_t eps_t over whole rollouts
    E_mu[gap] = KL(mu || q) - KL(mu || p): why losses on the sampled token are refused
    loss_t = sum_S sg[w (log p - log q)] log p,  S the student's k likeliest, w = p renormalised on S; or direct, `tail`

`schedule: constant` never ends: the baseline `fixed_epsilon`. The blend is made over the whole vocabulary, at
temperature 1; the teacher decodes beside the student while a budget is left, and not at all afterwards.
Unlike stop ids are one event, as in the paper, for every method (`model.stop_event`); whether the paper drops the mass
on the other model's is not said, here it is added. Teacher := student gives gradient 0, except for direct truncate.

Neutral: initial_budget_nats 0 with support full, rollouts bit for bit included.
Differs: unknown; no released code was seen.

Metrics, absent where nothing is blended but for the first: blend/budget_nats, blend/beta_{mean,p10,p50,p90}_fraction,
blend/teacher_feasible_fraction (beta 1), blend/budget_active_fraction (0 < beta < 1), blend/deviation_mean_nats
(KL(mu || p)), blend/deviation_sequence_mean_nats, blend/log_ratio_sequence_mean_nats (its estimate),
blend/teacher_gain_mean_nats (KL(p || q) - KL(mu || q)); histograms blend/beta_fraction, blend/deviation_nats.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from opd_lab.methods.base import choice, within
from opd_lab.methods.blends import blend_metrics, nearest_in_ball, untempered
from opd_lab.methods.support_loss import SupportLoss
from opd_lab.types import Batch, Behavior, Facts, State


@dataclass(frozen=True, kw_only=True)
class TRB(SupportLoss):
    paper = "https://arxiv.org/abs/2605.31159"
    neutral: ClassVar = {"initial_budget_nats": 0.0, "support": "full"}

    initial_budget_nats: float = 0.02
    warmup_steps: int = 50
    schedule: str = "linear"
    bisection_steps: int = 30
    support: str = "student"

    def __post_init__(self) -> None:
        super().__post_init__()
        eps, halvings = self.initial_budget_nats, self.bisection_steps
        within("initial_budget_nats", eps, ">= 0", eps >= 0, "0 is plain OPD, the paper tried 0.001 to 0.05")
        hint = "for no warm-up set method.initial_budget_nats=0"
        within("warmup_steps", self.warmup_steps, ">= 1", self.warmup_steps >= 1, hint)
        choice("schedule", self.schedule, ("linear", "constant"))
        within("bisection_steps", halvings, "in [10, 60]", 10 <= halvings <= 60)

    def check(self, facts: Facts) -> None:
        if self.initial_budget_nats == 0:
            return
        untempered("TRB", facts)
        if self.schedule == "linear" and self.warmup_steps > facts.steps:
            warnings.warn(
                f"method.warmup_steps={self.warmup_steps} is more than the {facts.steps} steps of the run: it never "
                "becomes on-policy",
                stacklevel=2,
            )

    def budget(self, step: int) -> float:
        """eps_k in nats, k = step, from 0 on."""
        left = 1.0 if self.schedule == "constant" else 1 - min(step / self.warmup_steps, 1.0)
        return self.initial_budget_nats * left

    def asks(self) -> Mapping[str, str]:
        return {"blend": "method.initial_budget_nats=0"} if self.initial_budget_nats > 0 else {}

    def behavior(self, plain: Behavior, step: int, state: State) -> Behavior:
        budget, halvings = self.budget(step), self.bisection_steps
        if budget == 0:
            return plain
        return replace(plain, mix=lambda logp_RV, logq_RV: nearest_in_ball(logp_RV, logq_RV, budget, halvings))

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        # the report of step k is numbered k + 1
        return {"blend/budget_nats": self.budget(batch.step - 1)} | blend_metrics(batch)
