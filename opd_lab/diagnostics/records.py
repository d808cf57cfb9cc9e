"""One row for each rollout of a step: what is too much to keep per token, and too little to average away."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd_lab.methods.base import rollout_mean
from opd_lab.types import REVERSE_KL, Batch, Rollouts, Source


class Repeats(NamedTuple):
    """4-grams of each rollout: those that it has seen before, and all."""

    repeated_B: Tensor
    grams_B: Tensor


def repeats(rollouts: Rollouts) -> Repeats:
    mask_BT, ids_BT = rollouts.mask_BT, rollouts.response_BT.long()
    whole_BG = mask_BT[:, 3:] & mask_BT[:, 2:-1] & mask_BT[:, 1:-2] & mask_BT[:, :-3]
    if not whole_BG.numel():
        return Repeats(whole_BG.sum(1), whole_BG.sum(1))
    pair_BT = ids_BT[:, :-1] * (int(ids_BT.max()) + 1) + ids_BT[:, 1:]
    pairs_M, number_BT = pair_BT.unique(return_inverse=True)  # small numbers, so that two of them fit into one
    four_BG = number_BT[:, :-2] * len(pairs_M) + number_BT[:, 2:]
    none_G = -1 - torch.arange(whole_BG.shape[1], device=ids_BT.device)  # equal to nothing
    four_BG = torch.where(whole_BG, four_BG, none_G).sort(1).values
    return Repeats((four_BG[:, 1:] == four_BG[:, :-1]).sum(1), whole_BG.sum(1))


def repetition(counted: Repeats) -> dict[str, float]:
    """The share of all 4-grams that their rollout has seen before; absent where there is none."""
    grams = int(counted.grams_B.sum())
    return {"rollout/repetition_fraction": int(counted.repeated_B.sum()) / grams} if grams else {}


def records(batch: Batch, counted: Repeats, rows: int) -> list[dict[str, Any]]:
    """The `rows` rollouts with the smallest numbers. What does not exist (no grader, no teacher distribution, fewer
    than four tokens) is NaN. `source`: who wrote the generated tokens, as `student` or `student+teacher`."""
    rollouts = batch.rollouts
    kl_B = torch.full((len(rollouts),), torch.nan)
    if REVERSE_KL in batch.signals:
        kl_B = rollout_mean(batch[REVERSE_KL], rollouts.mask_BT & ~batch[REVERSE_KL].isnan())
    columns = {
        "uid": rollouts.uid_B.tolist(),
        "group": rollouts.group_B.tolist(),
        "length_tokens": rollouts.length_B.tolist(),
        "reward": rollouts.reward_B.tolist(),
        "kl_mean_nats": kl_B.tolist(),
        "truncated": (~rollouts.stopped_B).tolist(),
        "repetition_fraction": (counted.repeated_B.double() / counted.grams_B).tolist(),  # 0 / 0 = NaN
        "source": _sources(rollouts),
    }
    order = rollouts.uid_B.argsort()[:rows].tolist()
    return [{"step": batch.step, **{name: values[b] for name, values in columns.items()}} for b in order]


def _sources(rollouts: Rollouts) -> list[str]:
    writer_W = torch.tensor(_WRITERS, device=rollouts.source_BT.device)
    wrote_BW = (rollouts.source_BT[..., None] == writer_W).any(1)
    return [_NAMES[tuple(on)] for on in wrote_BW.tolist()]


_WRITERS = [source for source in Source if source > Source.GIVEN]
_NAMES = {
    on: "+".join(writer.name.lower() for writer, wrote in zip(_WRITERS, on) if wrote)
    for on in product((False, True), repeat=len(_WRITERS))
}
