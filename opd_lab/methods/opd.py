"""Plain on-policy distillation with the full-vocabulary reverse KL: `method=opd`.

arXiv 2306.13649 (GKD with student rollouts and beta 1) and the post at the address below.

The student writes the rollouts; at every token it wrote, KL(student || teacher) over the whole vocabulary is
back-propagated through the student's distribution. The prefix counts as given: no gradient flows through sampling.

    loss_t = sum_v p(v | y_<t) (log p(v | y_<t) - log q(v | y_<t))
    objective = sum_t loss_t / #tokens of the step

Neutral: itself.
Differs: nothing; TRL's DistillationTrainer at beta 1 minimises the same number.
"""

from __future__ import annotations

from dataclasses import dataclass

from opd_lab.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class OPD(Method):
    paper = "https://thinkingmachines.ai/blog/on-policy-distillation"
