"""How well the teacher supports whole rollouts, and whether that tells right answers from wrong ones.

    support of a rollout = mean over its tokens of log p_teacher - log p_student of the sampled token
    auroc = chance that a correct rollout has more of it than a wrong one, a tie counting half

(arXiv 2605.31159, figure 7.) The support falls where rollouts leave what the teacher would say.
"""

from __future__ import annotations

import numpy as np

from opd_lab.diagnostics.flat import Flat, Floats, gap_N


def support(tokens: Flat) -> dict[str, float]:
    """Its mean over rollouts with a scored token, and the AUROC where both kinds of answer exist."""
    total_B, count_B = tokens.per_rollout(-gap_N(tokens))
    there_B = count_B > 0
    if not there_B.any():
        return {}
    support_N, reward_N = total_B[there_B] / count_B[there_B], tokens.rollouts.reward_B.numpy()[there_B]
    values = {"rollout/support_mean_nats": float(support_N.mean())}
    found = auroc(support_N[reward_N == 1], support_N[reward_N == 0])
    return values if found is None else values | {"rollout/support_reward_auroc_fraction": found}


def auroc(right_N: Floats, wrong_N: Floats) -> float | None:
    """Chance that one of the first exceeds one of the second; None where there is no pair."""
    if not len(right_N) or not len(wrong_N):
        return None
    return float(np.sign(right_N[:, None] - wrong_N).mean() / 2 + 0.5)
