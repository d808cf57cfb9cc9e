"""How well the teacher supports whole rollouts, and whether that tells right answers from wrong ones.

    support of a rollout = mean over its tokens of log p_teacher - log p_student of the sampled token
    auroc = chance that a correct rollout has more of it than a wrong one, a tie counting half

(arXiv 2605.31159, figure 7.) The support falls where rollouts leave what the teacher would say.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_lab.types import Rollouts


def support(gap_BT: Tensor, rollouts: Rollouts) -> dict[str, float]:
    """Its mean over rollouts with a scored token, and the AUROC where both kinds of answer exist."""
    scored_BT = rollouts.mask_BT & ~gap_BT.isnan()
    there_B = scored_BT.any(1)
    if not bool(there_B.any()):
        return {}
    total_B = -gap_BT.double().masked_fill(~scored_BT, 0.0).sum(1)
    support_N = (total_B / scored_BT.sum(1).clamp(min=1))[there_B]
    reward_N = rollouts.reward_B[there_B]
    values = {"rollout/support_mean_nats": float(support_N.mean())}
    found = auroc(support_N[reward_N == 1], support_N[reward_N == 0])
    return values if found is None else values | {"rollout/support_reward_auroc_fraction": found}


def auroc(right_N: Tensor, wrong_N: Tensor) -> float | None:
    """Chance that one of the first exceeds one of the second; None where there is no pair."""
    if not len(right_N) or not len(wrong_N):
        return None
    return float((torch.sign(right_N[:, None] - wrong_N) / 2 + 0.5).mean())
