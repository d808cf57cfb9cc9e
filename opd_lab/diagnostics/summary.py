"""A step in numbers: the scalars that every run logs at every step, whatever its method.

They speak of all generated tokens of the step, not only of those a method keeps, so that methods can be compared. A
token without a score (NaN) is left out of a mean and counted in `teacher/unscored_fraction`. A number that does not
exist (no grader, no teacher distribution) is absent, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from opd_lab.diagnostics.flat import Flat, Floats, gap_N
from opd_lab.diagnostics.support import support
from opd_lab.types import (
    ENTROPY_STUDENT,
    ENTROPY_TEACHER,
    FORWARD_KL,
    LOGP_STUDENT,
    LOGP_TEACHER,
    RANK_TEACHER,
    REVERSE_KL,
    TOTAL_VARIATION,
    Batch,
    Signal,
    Source,
    jsd,
    outside,
    overlap,
)

OVERLAP, OUTSIDE, HALF = overlap(16), outside(16), jsd(0.5)

# What the trainer records on the chunk, for every method.
RECORD: frozenset[Signal] = frozenset(
    {
        LOGP_STUDENT,
        LOGP_TEACHER,
        ENTROPY_STUDENT,
        ENTROPY_TEACHER,
        REVERSE_KL,
        FORWARD_KL,
        RANK_TEACHER,
    }
)
# And at a step that shows histograms and tables: what asks for more passes over the vocabulary than all of the above,
# or for its likeliest tokens.
RECORD_DUE: frozenset[Signal] = RECORD | {HALF, TOTAL_VARIATION, OVERLAP, OUTSIDE}


def present(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The values of the generated tokens that have one, flat, float64, on the CPU."""
    value_N = value_BT[mask_BT].detach().double().cpu()
    return value_N[~value_N.isnan()]


def quantile(value_N: Tensor, q: float) -> float:
    """The smallest value that at least a share q of the values does not exceed (nearest rank)."""
    return _quantile(value_N.sort().values, q)


def _quantile(sorted_N: Tensor | Floats, q: float) -> float:
    return float(sorted_N[max(math.ceil(q * len(sorted_N)), 1) - 1])


def scalars(tokens: Flat, weights: Mapping[str, Tensor], high_loss_quantile: float) -> dict[str, float]:
    """Every scalar of the step that exists."""
    out = _rollouts(tokens) | _weights(weights, tokens)
    there_SN = ~np.isnan(tokens.value_SN)
    total_S, count_S = np.where(there_SN, tokens.value_SN, 0.0).sum(1).tolist(), there_SN.sum(1).tolist()
    means = {signal: total / count for signal, total, count in zip(tokens.order, total_S, count_S) if count}
    out |= {name: means[signal] for name, signal in _MEANS.items() if signal in means}
    if REVERSE_KL in means:
        kl_N = np.sort(tokens[REVERSE_KL])[: count_S[tokens.order[REVERSE_KL]]]  # NaN stand last
        out |= {f"kl/reverse_p{round(100 * q)}_nats": _quantile(kl_N, q) for q in (0.5, 0.9, 0.99)}
        if (total := float(kl_N.sum())) > 0:
            out["high_loss/kl_share_fraction"] = float(kl_N[kl_N > _quantile(kl_N, high_loss_quantile)].sum()) / total
    out |= support(tokens)
    if LOGP_TEACHER in tokens:
        gap_M = (gap := gap_N(tokens))[~np.isnan(gap)]
        if len(gap_M):
            out |= {"gap/mean_nats": float(gap_M.mean()), "gap/std_nats": float(gap_M.std())}
        if len(gap):
            out["teacher/unscored_fraction"] = (len(gap) - count_S[tokens.order[LOGP_TEACHER]]) / len(gap)
    return out


_MEANS = {
    "kl/reverse_mean_nats": REVERSE_KL,
    "kl/forward_mean_nats": FORWARD_KL,
    "kl/jsd_mean_nats": HALF,
    "entropy/student_mean_nats": ENTROPY_STUDENT,
    "entropy/teacher_mean_nats": ENTROPY_TEACHER,
    "teacher/logp_mean_nats": LOGP_TEACHER,
    "rank/teacher_mean_tokens": RANK_TEACHER,
    "overlap/top16_fraction": OVERLAP,
    "overlap/outside_top16_fraction": OUTSIDE,
    "overlap/total_variation_mean_fraction": TOTAL_VARIATION,
}


def ratio_BT(batch: Batch) -> Tensor:
    """p_student / p of whoever sampled the token: 1 on the student's own untempered tokens, but for rounding, until it
    has moved. NaN where the sampler left no probability or is not known."""
    logp_BT = batch.signals.get(LOGP_STUDENT, batch.rollouts.logp_BT)
    return (logp_BT - batch.rollouts.behavior_logp_BT).exp()


def total_weight_BT(weights: Mapping[str, Tensor]) -> Tensor:
    """A token's weight, summed over the terms."""
    return torch.stack([weight_BT.double() for weight_BT in weights.values()]).sum(0)


def _weights(weights: Mapping[str, Tensor], tokens: Flat) -> dict[str, float]:
    """The share of tokens that count nothing, and the share of tokens that do the work: (sum w)^2 / (N sum w^2)."""
    if not weights or not len(tokens.ids_N):
        return {}
    weight_N = tokens.pick(total_weight_BT(weights))
    out: dict[str, float] = {"weight/zero_fraction": np.count_nonzero(weight_N == 0) / len(weight_N)}
    if (square := float(weight_N @ weight_N)) > 0:
        out["weight/effective_fraction"] = float(weight_N.sum()) ** 2 / (len(weight_N) * square)
    return out


def _rollouts(tokens: Flat) -> dict[str, float]:
    rollouts = tokens.rollouts
    if not len(rollouts):
        return {}
    out: dict[str, float] = {
        "rollout/length_mean_tokens": len(tokens.ids_N) / len(rollouts),
        "rollout/truncated_fraction": np.count_nonzero(~rollouts.stopped_B.numpy()) / len(rollouts),
    }
    if "generated" in rollouts.extra:
        out["rollout/cut_fraction"] = float(rollouts.cut_B.double().mean())
    reward_B = rollouts.reward_B.numpy().astype(np.float64)
    if len(reward_M := reward_B[~np.isnan(reward_B)]):
        out["rollout/reward_mean_fraction"] = float(reward_M.mean())
    return out


def spent(batch: Batch, *, scored: bool) -> dict[str, int]:
    """What a step cost, under the names of the metrics `cost/...`."""
    rollouts = batch.rollouts
    decoded_B = rollouts.extra.get("teacher_decoded")
    cost = {
        "generated_tokens": int(rollouts.generated_B.sum()),
        "teacher_scored_tokens": int(rollouts.length_B.sum()) if scored else 0,
        "teacher_decoded_tokens": 0 if decoded_B is None else int(decoded_B.sum()),
        "teacher_generated_tokens": int((rollouts.source_BT == Source.TEACHER).sum()),
        "dataset_tokens": int((rollouts.source_BT == Source.DATASET).sum()),  # of the generated: nobody sampled them
    }
    return cost | {name: cost.get(name, 0) + count for name, count in batch.cost.items()}
