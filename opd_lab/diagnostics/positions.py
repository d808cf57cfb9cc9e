"""Where in a response the two models disagree: over equal stretches of each rollout, and by distance from its start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opd_lab.types import ENTROPY_STUDENT, ENTROPY_TEACHER, FORWARD_KL, REVERSE_KL, Batch

DECILES = 10
BEGINS = [0, *(2**i for i in range(20))]  # tokens: the absolute bins are 0, 1, 2-3, 4-7, ...; the last is open


def rank_BT(mask_BT: Tensor) -> Tensor:
    """The number of generated tokens before each token of its rollout."""
    return mask_BT.cumsum(1) - mask_BT.long()


def profile(batch: Batch) -> list[dict[str, Any]]:
    """One row per decile of the relative position that holds a token: its tokens and the means of their signals."""
    mask_BT = batch.rollouts.mask_BT
    decile_BT = DECILES * rank_BT(mask_BT) // mask_BT.sum(1, keepdim=True).clamp(min=1)
    return [{"step": batch.step, "decile": decile, **row} for decile, row in _rows(batch, decile_BT[mask_BT], DECILES)]


def absolute_profile(batch: Batch) -> list[dict[str, Any]]:
    """One row per stretch begin <= position < end that holds a token; `end_tokens` is None in the last, open one."""
    mask_BT = batch.rollouts.mask_BT
    begin_K = torch.tensor(BEGINS, device=mask_BT.device)
    bin_N = torch.bucketize(rank_BT(mask_BT)[mask_BT], begin_K, right=True) - 1
    ends = [*BEGINS[1:], None]
    return [
        {"step": batch.step, "begin_tokens": BEGINS[k], "end_tokens": ends[k], **row}
        for k, row in _rows(batch, bin_N, len(BEGINS))
    ]


def _rows(batch: Batch, bin_N: Tensor, bins: int) -> list[tuple[int, dict[str, Any]]]:
    """The bins that hold a token: how many, and the means of the signals over those that have one."""
    count_K = bin_N.bincount(minlength=bins).tolist()
    names = [name for name, signal in _SHOWN.items() if signal in batch.signals]
    means: dict[str, list[float]] = {}
    if names:
        value_SBT = torch.stack([batch[_SHOWN[name]].double() for name in names])
        value_SN = value_SBT[:, batch.rollouts.mask_BT]
        there_SN = ~value_SN.isnan()
        place_SN = bin_N + bins * torch.arange(len(names), device=bin_N.device)[:, None]
        sum_SK, there_SK = (
            place_SN.flatten().bincount(weight_SN.flatten(), minlength=len(names) * bins).view(-1, bins)
            for weight_SN in (value_SN.masked_fill(~there_SN, 0.0), there_SN.double())
        )
        means = dict(zip(names, (sum_SK / there_SK).tolist()))
    return [
        (k, {"tokens": count_K[k], **{name: mean_K[k] for name, mean_K in means.items()}})
        for k in range(bins)
        if count_K[k]
    ]


_SHOWN = {
    "kl_reverse_mean_nats": REVERSE_KL,
    "kl_forward_mean_nats": FORWARD_KL,
    "entropy_student_mean_nats": ENTROPY_STUDENT,
    "entropy_teacher_mean_nats": ENTROPY_TEACHER,
}
