"""Per-token divergences and estimators, each written like its equation, and the one reduction.

p is the student, q the teacher, both at the same prefix. Arguments are log-probs over the last dimension, in fp32 or
better. Formulas and golden numbers: GKD (arXiv 2306.13649, eq. 1) for the divergences; J. Schulman's k1, k2, k3 for
the estimators of the sampled token.
"""

from __future__ import annotations

import math

import numpy
import torch
from torch import Tensor

from opd_lab.types import TopK

TAILS = ("bucket", "renormalise", "truncate")


def expectation(logp_NV: Tensor, value_NV: Tensor, p_NV: Tensor | None = None) -> Tensor:
    """sum_v p(v) value(v), with 0 * inf = 0: a token without mass contributes nothing, not NaN. Here and below, `p_NV`
    and `q_NV` are the exponentials of the log-probs, for callers who have them already."""
    p_NV = logp_NV.exp() if p_NV is None else p_NV
    total_N = (p_NV * value_NV).sum(-1)
    if bool(total_N.isfinite().all()):  # nearly always; the passes over the vocabulary below cost as much again
        return total_N
    return (p_NV * value_NV.masked_fill(p_NV == 0, 0.0)).sum(-1)


def entropy(logp_NV: Tensor, p_NV: Tensor | None = None) -> Tensor:
    """H(p) = -sum_v p log p."""
    return -expectation(logp_NV, logp_NV, p_NV)


def reverse_kl(logp_NV: Tensor, logq_NV: Tensor, p_NV: Tensor | None = None) -> Tensor:
    """KL(p || q) = sum_v p (log p - log q)."""
    return expectation(logp_NV, logp_NV - logq_NV, p_NV)


def forward_kl(logp_NV: Tensor, logq_NV: Tensor, q_NV: Tensor | None = None) -> Tensor:
    """KL(q || p) = sum_v q (log q - log p)."""
    return expectation(logq_NV, logq_NV - logp_NV, q_NV)


def total_variation(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """TV(p, q) = sum_v |p - q| / 2 = 1 - sum_v min(p, q), of probabilities."""
    return (p_NV - q_NV).abs().sum(-1) / 2


def jsd(
    logp_NV: Tensor, logq_NV: Tensor, beta: float, p_NV: Tensor | None = None, q_NV: Tensor | None = None
) -> Tensor:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p. Its ends are defined as the two KLs:
    beta 0 = forward, beta 1 = reverse (GKD and TRL's convention)."""
    if beta == 0:
        return forward_kl(logp_NV, logq_NV)
    if beta == 1:
        return reverse_kl(logp_NV, logq_NV)
    finite_NV = logp_NV.clamp(min=torch.finfo(logp_NV.dtype).min)  # the gradient of logaddexp(-inf, -inf) is NaN
    logm_NV = torch.logaddexp(logq_NV + math.log(beta), finite_NV + math.log(1 - beta))
    from_q_N, from_p_N = expectation(logq_NV, logq_NV - logm_NV, q_NV), expectation(logp_NV, logp_NV - logm_NV, p_NV)
    return beta * from_q_N + (1 - beta) * from_p_N


GROUP = 128  # tokens of the vocabulary looked at together


def likeliest(logp_NV: Tensor, k: int) -> Tensor:
    """Ids [N, K] of the k likeliest tokens, in any order. They lie in the k groups of tokens whose best are the best of
    all: so a large vocabulary is passed over once, and only those groups are searched."""
    logp_NV, V = logp_NV.detach(), logp_NV.shape[-1]
    k = min(k, V)
    if V % GROUP or k * GROUP * 2 > V:  # too small to gain from it, or not made of whole groups
        return _likeliest_on_cpu(logp_NV, k) if logp_NV.device.type == "cpu" else logp_NV.topk(k).indices
    in_groups_NGX = logp_NV.unflatten(-1, (-1, GROUP))
    group_NK = in_groups_NGX.amax(-1).topk(k).indices
    candidate_NC = in_groups_NGX.gather(1, group_NK[..., None].expand(-1, -1, GROUP)).flatten(1)
    place_NK = candidate_NC.topk(k).indices
    return group_NK.gather(1, place_NK // GROUP) * GROUP + place_NK % GROUP


def _likeliest_on_cpu(logp_NV: Tensor, k: int) -> Tensor:
    """Several times as fast as torch's own: what is no less than the k-th largest, where nothing else equals that."""
    array_NV, V = logp_NV.numpy(), logp_NV.shape[-1]
    least_N1 = numpy.partition(array_NV, V - k)[:, V - k, None]
    place_M = numpy.flatnonzero(array_NV >= least_N1)
    if len(place_M) != len(array_NV) * k:
        return torch.from_numpy(numpy.argpartition(array_NV, V - k)[:, V - k :])
    return torch.from_numpy((place_M % V).reshape(len(array_NV), k))


def shared(one_NK: Tensor, other_NK: Tensor, vocabulary: int) -> Tensor:
    """Which ids of the first are among those of the second."""
    there_NV = torch.zeros(len(one_NK), vocabulary, dtype=torch.bool, device=one_NK.device)
    return there_NV.scatter_(1, other_NK, True).gather(1, one_NK)


def support_of(logp_NV: Tensor, logq_NV: Tensor, k: int, support: str) -> tuple[Tensor, Tensor]:
    """Ids [N, K] of the k likeliest tokens of student, teacher, union or intersection, and which of them count."""
    if support in ("student", "teacher"):
        ids_NK = likeliest(logp_NV if support == "student" else logq_NV, k)
        return ids_NK, torch.ones_like(ids_NK, dtype=torch.bool)
    student_NK, teacher_NK = likeliest(logp_NV, k), likeliest(logq_NV, k)
    shared_NK = shared(teacher_NK, student_NK, logp_NV.shape[-1])
    if support == "intersection":
        return teacher_NK, shared_NK
    # union: the student's, then those of the teacher's that are new
    return torch.cat([student_NK, teacher_NK], -1), torch.cat([torch.ones_like(shared_NK), ~shared_NK], -1)


def topk(logp_NV: Tensor, logq_NV: Tensor, k: int, support: str) -> TopK:
    """Both models gathered on a support. No gradient flows through its choice."""
    ids_NK, inside_NK = support_of(logp_NV, logq_NV, k, support)
    inside_NV = torch.zeros_like(logp_NV).scatter_add(-1, ids_NK, inside_NK.to(logp_NV.dtype)) > 0
    rests_N1 = (_log_mass(logp_NV, ~inside_NV), _log_mass(logq_NV, ~inside_NV))
    return TopK(logp_NV.gather(-1, ids_NK), logq_NV.gather(-1, ids_NK), inside_NK, ids_NK, *rests_N1)


def _log_mass(logp_NV: Tensor, where_NV: Tensor) -> Tensor:
    """log sum p, [N, 1]. Added up, for 1 - sum drowns in rounding, with its gradient, once a model is confident."""
    logp_NV = logp_NV.masked_fill(~where_NV, -torch.inf)
    none_N1 = logp_NV.isneginf().all(-1, keepdim=True)
    return logp_NV.masked_fill(none_N1, 0.0).logsumexp(-1, keepdim=True).masked_fill(none_N1, -torch.inf)


def topk_kl(on: TopK, *, direction: str, tail: str) -> Tensor:
    """KL on a support S, `direction` reverse or forward. `tail` says what becomes of the mass outside S:

    bucket       one more class holds the left-over mass of each model: a divergence, never above the full KL
    renormalise  both models are renormalised on S: blind to the mass on S
    truncate     the bare partial sum: no divergence, it may be negative
    """
    logp_NK = on.logp_student_NK.masked_fill(~on.inside_NK, -math.inf)
    logq_NK = on.logp_teacher_NK.masked_fill(~on.inside_NK, -math.inf)
    if tail == "renormalise":
        logp_NK, logq_NK = _renormalise(logp_NK), _renormalise(logq_NK)
    elif tail == "bucket":
        logp_NK = torch.cat([logp_NK, on.log_rest_student_N1], -1)
        logq_NK = torch.cat([logq_NK, on.log_rest_teacher_N1], -1)
    return reverse_kl(logp_NK, logq_NK) if direction == "reverse" else forward_kl(logp_NK, logq_NK)


def _renormalise(logp_NK: Tensor) -> Tensor:
    total_N1 = logp_NK.logsumexp(-1, keepdim=True)
    return logp_NK - total_N1.masked_fill(total_N1.isneginf(), 0.0)  # an empty support stays empty


def k1(gap_N: Tensor) -> Tensor:
    """gap = log p(y) - log q(y). Unbiased for KL(p || q), high variance, negative half the time."""
    return gap_N


def k2(gap_N: Tensor) -> Tensor:
    """gap^2 / 2. Biased as a value; back-propagated, its expected gradient is that of KL(p || q)."""
    return gap_N.square() / 2


def k3(gap_N: Tensor) -> Tensor:
    """q/p - 1 + gap >= 0. Unbiased as a value; back-propagated, its expected gradient is that of KL(q || p)."""
    return torch.exp(-gap_N) - 1 + gap_N


def score_function(logp_N: Tensor, cost_N: Tensor) -> Tensor:
    """cost * log p(y), the cost held constant: its expected gradient is that of E_p[cost]."""
    return cost_N.detach() * logp_N


def weighted_mean(loss_N: Tensor, weight_N: Tensor, kept: int | Tensor) -> Tensor:
    """The one reduction: sum(weight * loss) / kept, where `kept` counts the tokens of the *whole step* whose weight
    is not 0. Tokens of weight 0 are left out by selection, so that a NaN or inf there touches nothing."""
    counted_N = weight_N != 0
    return (weight_N[counted_N] * loss_N[counted_N]).sum() / max(int(kept), 1)
