"""How well do the estimators of KL(student || teacher) estimate it? Measured against the exact value, token by token.

    exact             sum over the whole vocabulary
    k1, k2, k3        from the sampled token alone
    top<k>_<tail>     on the student's k likeliest tokens; what is left over is truncated, renormalised, or one bucket

The error of a token is estimate - exact: its mean is the bias, its spread `std_nats`, and rmse^2 = bias^2 + std^2. A
sign error is an estimate below zero, where the exact value is above. k1 and k3 promise no bias only for tokens that the
very student sampled at temperature 1 without a filter; so the tokens are drawn for this purpose, at every evaluation,
from the student as it is then. In float64, so that rounding is no error of an estimator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.chunk import Chunk, States
from opd_lab.models import LM, evaluating
from opd_lab.step import Scorer, micro_batches
from opd_lab.types import LOGP_STUDENT, LOGP_TEACHER, REVERSE_KL, Rollouts, topk

EXACT = "exact"
Estimates = dict[str, Tensor]


@torch.no_grad()
def estimates(rollouts: Rollouts, student: LM, teacher: Scorer, *, k: int, chunk: int, micro_batch: int) -> Estimates:
    """Every estimate of every generated token, shape N, under its name."""
    parts: list[Estimates] = []
    with evaluating(student.module):
        for rows in micro_batches(len(rollouts), micro_batch):
            part = rollouts.rows(rows)
            ids_N = part.response_BT[part.mask_BT]
            own, theirs = student.states(part), teacher.view(part, frozenset({REVERSE_KL}))
            assert isinstance(theirs, States), "a teacher with full distributions gives states"
            for begin in range(0, len(ids_N), max(chunk // 2, 1)):  # numbers twice as wide, half as many
                at = slice(begin, begin + max(chunk // 2, 1))
                parts.append(of_tokens(ids_N[at], own.at(at).logits(), theirs.at(at).logits(), k))
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def of_tokens(ids_N: Tensor, student_NV: Tensor, teacher_NV: Tensor, k: int) -> Estimates:
    """The estimates from both models' logits."""
    seen = Chunk(ids_N, student_NV.double(), teacher_NV.double())
    gap_N, on = seen[LOGP_STUDENT] - seen[LOGP_TEACHER], seen[topk(k, "student")]
    sampled = {"k1": d.k1(gap_N), "k2": d.k2(gap_N), "k3": d.k3(gap_N)}
    tails = {f"top{k}_{tail}": d.topk_kl(on, direction="reverse", tail=tail) for tail in d.TAILS}
    return {EXACT: seen[REVERSE_KL]} | sampled | tails


def table(step: int, found: Estimates) -> list[dict[str, Any]]:
    """One row per estimator, over the tokens on which all of them are finite."""
    finite_N = torch.stack(list(found.values())).isfinite().all(0)
    exact_N = found[EXACT][finite_N]
    return [_row(step, name, value_N[finite_N], exact_N) for name, value_N in found.items()] if len(exact_N) else []


def _row(step: int, name: str, value_N: Tensor, exact_N: Tensor) -> dict[str, Any]:
    error_N = value_N - exact_N
    return {
        "step": step,
        "estimator": name,
        "tokens": len(value_N),
        "mean_nats": float(value_N.mean()),
        "bias_nats": float(error_N.mean()),
        "std_nats": float(error_N.std(correction=0)),
        "rmse_nats": float(error_N.square().mean().sqrt()),
        "sign_error_fraction": float(((value_N < 0) & (exact_N > 0)).double().mean()),
    }
