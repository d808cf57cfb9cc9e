"""A few rollouts of a step with everything known per token, to be read by eye."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opd_lab.diagnostics.high_loss import Decode
from opd_lab.diagnostics.summary import total_weight_BT
from opd_lab.types import (
    ENTROPY_STUDENT,
    ENTROPY_TEACHER,
    FORWARD_KL,
    LOGP_STUDENT,
    LOGP_TEACHER,
    RANK_TEACHER,
    REVERSE_KL,
    Batch,
    Rollouts,
    Source,
)

_SHOWN = {
    "logp_student": LOGP_STUDENT,
    "logp_teacher": LOGP_TEACHER,
    "reverse_kl": REVERSE_KL,
    "forward_kl": FORWARD_KL,
    "rank_teacher": RANK_TEACHER,
    "entropy_student": ENTROPY_STUDENT,
    "entropy_teacher": ENTROPY_TEACHER,
}


def sample(
    batch: Batch, weights: Mapping[str, Tensor], losses: Mapping[str, Tensor], decode: Decode, rows: int
) -> list[dict[str, Any]]:
    """The `rows` rollouts with the smallest numbers. Arrays speak of the response tokens, given ones included (NaN)."""
    rollouts = batch.rollouts
    there_BT = rollouts.source_BT != Source.PADDING
    arrays = {name: batch[signal] for name, signal in _SHOWN.items() if signal in batch.signals}
    arrays["behavior_logp"] = rollouts.behavior_logp_BT
    arrays |= {name: value_BT for name, value_BT in rollouts.extra.items() if value_BT.ndim == 2}
    if weights:
        arrays["weight"] = total_weight_BT(weights)
    if losses:
        arrays["loss"] = _weighted_BT(weights, losses)
    arrays["source"] = rollouts.source_BT
    first_S = rollouts.uid_B.argsort()[:rows]
    shown = {name: value_BT[first_S].cpu() for name, value_BT in arrays.items()}
    found = []
    for place, b in enumerate(first_S.tolist()):
        there_T = there_BT[b].cpu()
        values = {name: value_ST[place][there_T].tolist() for name, value_ST in shown.items()}
        values["source"] = [Source(s).name.lower() for s in values["source"]]
        found.append(
            {"step": batch.step, "reward": float(rollouts.reward_B[b]), **tokens_of(rollouts, b, decode), **values}
        )
    return found


def tokens_of(rollouts: Rollouts, b: int, decode: Decode) -> dict[str, Any]:
    """One rollout, to be read: who it is, its prompt, its response as text and token by token."""
    there_T, attended_P = rollouts.source_BT[b] != Source.PADDING, rollouts.attention_BL[b, : rollouts.prompt_columns]
    ids = rollouts.response_BT[b][there_T].tolist()
    return {
        "uid": int(rollouts.uid_B[b]),
        "group": int(rollouts.group_B[b]),
        "stopped": bool(rollouts.stopped_B[b]),
        "prompt": decode(rollouts.ids_BL[b, : rollouts.prompt_columns][attended_P].tolist()),
        "text": decode(ids),
        "ids": ids,
        "tokens": [decode([i]) for i in ids],
    }


def _weighted_BT(weights: Mapping[str, Tensor], losses: Mapping[str, Tensor]) -> Tensor:
    """A token's part of the objective before any denominator; NaN where no term trains it."""
    part_ZBT = torch.stack([weights[term] * loss_BT for term, loss_BT in losses.items()])
    return part_ZBT.nansum(0).masked_fill(part_ZBT.isnan().all(0), torch.nan)
