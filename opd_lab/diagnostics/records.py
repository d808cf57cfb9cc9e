"""One row for each rollout of a step: what is too much to keep per token, and too little to average away."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opd_lab.methods.base import rollout_mean
from opd_lab.types import REVERSE_KL, Batch, Rollouts, Source


def records(batch: Batch, rows: int) -> list[dict[str, Any]]:
    """The `rows` rollouts with the smallest numbers. What does not exist (no grader, no teacher distribution, fewer
    than four tokens) is NaN. `source`: who wrote the generated tokens, as `student` or `student+teacher`."""
    rollouts = batch.rollouts
    mask_BT = rollouts.mask_BT
    nan_B = torch.full((len(rollouts),), torch.nan)
    kl_B = nan_B
    if REVERSE_KL in batch.signals:
        kl_B = rollout_mean(batch[REVERSE_KL], mask_BT & ~batch[REVERSE_KL].isnan())
    columns = {
        "uid": rollouts.uid_B.tolist(),
        "group": rollouts.group_B.tolist(),
        "length_tokens": rollouts.length_B.tolist(),
        "reward": rollouts.reward_B.tolist(),
        "kl_mean_nats": kl_B.tolist(),
        "truncated": (~rollouts.stopped_B).tolist(),
        "repetition_fraction": repetition_B(rollouts.response_BT, mask_BT).tolist(),
        "source": _sources(rollouts),
    }
    order = rollouts.uid_B.argsort()[:rows].tolist()
    return [{"step": batch.step, **{name: values[b] for name, values in columns.items()}} for b in order]


def _sources(rollouts: Rollouts) -> list[str]:
    writers = [source for source in Source if source > Source.GIVEN]
    wrote_WB = torch.stack([(rollouts.source_BT == writer).any(1) for writer in writers])
    return ["+".join(w.name.lower() for w, on in zip(writers, on_W) if on) for on_W in wrote_WB.T.tolist()]


def repetition_B(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The share of a rollout's 4-grams that it holds already; float64, NaN where it has none."""
    repeated_B, grams_B = repeats(ids_BT, mask_BT)
    return repeated_B.double() / grams_B.double().masked_fill(grams_B == 0, torch.nan)


def repeats(ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Of each rollout, how many 4-grams it has seen before, and how many it has."""
    whole_BG = mask_BT[:, 3:] & mask_BT[:, 2:-1] & mask_BT[:, 1:-2] & mask_BT[:, :-3]
    if not whole_BG.numel():
        return whole_BG.sum(1), whole_BG.sum(1)
    ids_BT = ids_BT.long()
    pair_BT = ids_BT[:, :-1] * (int(ids_BT.max()) + 1) + ids_BT[:, 1:]
    pairs_M, number_BT = pair_BT.unique(return_inverse=True)  # small numbers, so that two of them fit into one
    four_BG = number_BT[:, :-2] * len(pairs_M) + number_BT[:, 2:]
    none_G = -1 - torch.arange(whole_BG.shape[1], device=ids_BT.device)  # equal to nothing
    four_BG = torch.where(whole_BG, four_BG, none_G).sort(1).values
    return (four_BG[:, 1:] == four_BG[:, :-1]).sum(1), whole_BG.sum(1)
