"""Distributions between student and teacher that write the rollouts, and what is reported of them: not a method.

p is the student, q the teacher, mu what is sampled, all at the same prefix. mu comes with columns that the rollouts
carry along: `deviation` KL(mu || p), `gain` KL(p || q) - KL(mu || q), and `beta` or `replaced`, which say how much of
the teacher is in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.types import Batch, Facts


def tilted(logp_RV: Tensor, logq_RV: Tensor, beta_R1: Tensor) -> Tensor:
    """log of p^(1 - beta) q^beta / Z, 0 < beta < 1."""
    return ((1 - beta_R1) * logp_RV + beta_R1 * logq_RV).log_softmax(-1)


def nearest_in_ball(logp_RV: Tensor, logq_RV: Tensor, budget: float, halvings: int) -> tuple[Tensor, dict[str, Tensor]]:
    """argmin KL(mu || q) subject to KL(mu || p) <= budget: mu = p^(1 - beta) q^beta / Z with the largest beta allowed.
    KL(mu || p) grows with beta, so beta is found by bisection; the side kept is the one inside the ball. Bit for bit
    q where q lies inside, and p where the budget leaves nothing else."""
    whole_R1 = (d.reverse_kl(logq_RV, logp_RV) <= budget)[:, None]
    low_R1, high_R1 = torch.zeros_like(logp_RV[:, :1]), torch.ones_like(logp_RV[:, :1])
    for _ in range(halvings if budget > 0 else 0):
        middle_R1 = (low_R1 + high_R1) / 2
        inside_R1 = (d.reverse_kl(tilted(logp_RV, logq_RV, middle_R1), logp_RV) <= budget)[:, None]
        low_R1, high_R1 = torch.where(inside_R1, middle_R1, low_R1), torch.where(inside_R1, high_R1, middle_R1)
    logmu_RV = torch.where(low_R1 > 0, tilted(logp_RV, logq_RV, low_R1), logp_RV)
    logmu_RV = torch.where(whole_R1, logq_RV, logmu_RV)
    return logmu_RV, {"beta": low_R1.masked_fill(whole_R1, 1.0)[:, 0]} | _distances(logp_RV, logq_RV, logmu_RV)


def replaced_outside(logp_RV: Tensor, logq_RV: Tensor, k: int, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The student proposes, and a token outside the teacher's k likeliest is drawn again from the tempered teacher:
    mu(v) = p(v) 1[v in S] + (1 - p(S)) q_tau(v). One draw from mu is that proposal with its replacement."""
    top_RK = logq_RV.topk(min(k, logq_RV.shape[-1])).indices
    inside_RV = torch.zeros_like(logq_RV, dtype=torch.bool).scatter(-1, top_RK, True)
    outside_RV = logp_RV.masked_fill(inside_RV, -torch.inf)
    rest_R1 = torch.where(inside_RV.all(-1, keepdim=True), -torch.inf, outside_RV.logsumexp(-1, keepdim=True))
    again_RV = rest_R1 + (logq_RV / temperature).log_softmax(-1)
    logmu_RV = torch.logaddexp(logp_RV.masked_fill(~inside_RV, -torch.inf), again_RV)
    return logmu_RV, {"replaced": rest_R1[:, 0].exp()} | _distances(logp_RV, logq_RV, logmu_RV)


def _distances(logp_RV: Tensor, logq_RV: Tensor, logmu_RV: Tensor) -> dict[str, Tensor]:
    return {
        "deviation": d.reverse_kl(logmu_RV, logp_RV),
        "gain": d.reverse_kl(logp_RV, logq_RV) - d.reverse_kl(logmu_RV, logq_RV),
    }


def untempered(name: str, facts: Facts) -> None:
    """A blend is made of the models' own distributions."""
    if not facts.behavior.plain:
        raise ValueError(
            f"{name} blends the untempered distributions; set rollout.temperature=1, rollout.top_p=1, rollout.top_k=0 "
            f"and rollout.suppressed=[], got {facts.behavior}"
        )


def blend_metrics(batch: Batch) -> dict[str, float | Tensor]:
    """`blend/*`, the same for every blend; nothing where the student wrote alone."""
    rollouts = batch.rollouts
    if "deviation" not in rollouts.extra or not bool(rollouts.mask_BT.any()):
        return {}
    mask_BT = rollouts.mask_BT
    deviation_BT, gain_BT = (rollouts.extra[name].double() for name in ("deviation", "gain"))
    log_ratio_BT = (rollouts.behavior_logp_BT - rollouts.logp_BT).double()
    values: dict[str, float | Tensor] = {
        "blend/deviation_mean_nats": float(deviation_BT[mask_BT].mean()),
        "blend/deviation_sequence_mean_nats": float(deviation_BT.nansum(1).mean()),
        "blend/log_ratio_sequence_mean_nats": float(log_ratio_BT.nansum(1).mean()),
        "blend/teacher_gain_mean_nats": float(gain_BT[mask_BT].mean()),
        "blend/deviation_nats": deviation_BT[mask_BT],
    }
    if "beta" in rollouts.extra:
        beta_N = rollouts.extra["beta"][mask_BT].double()
        low, middle, high = torch.quantile(beta_N, beta_N.new_tensor([0.1, 0.5, 0.9])).tolist()
        values |= {
            "blend/beta_mean_fraction": float(beta_N.mean()),
            "blend/beta_p10_fraction": low,
            "blend/beta_p50_fraction": middle,
            "blend/beta_p90_fraction": high,
            "blend/teacher_feasible_fraction": float((beta_N == 1).double().mean()),
            "blend/budget_active_fraction": float(((beta_N > 0) & (beta_N < 1)).double().mean()),
            "blend/beta_fraction": beta_N,
        }
    return values
