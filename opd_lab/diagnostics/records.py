"""One row for each rollout of a step: what is too much to keep per token, and too little to average away."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from opd_lab.diagnostics.flat import Flat, Ints
from opd_lab.types import REVERSE_KL, Rollouts, Source


class Repeats(NamedTuple):
    """4-grams of each rollout: those that it has seen before, and all."""

    repeated_B: Ints
    grams_B: Ints


def repeats(rollouts: Rollouts) -> Repeats:
    mask_BT, ids_BT = rollouts.mask_BT.numpy(), rollouts.response_BT.numpy().astype(np.int64)
    whole_BG = mask_BT[:, 3:] & mask_BT[:, 2:-1] & mask_BT[:, 1:-2] & mask_BT[:, :-3]
    if not whole_BG.size:
        return Repeats(whole_BG.sum(1), whole_BG.sum(1))
    kinds = int(ids_BT.max()) + 1
    pair_BT, pairs = ids_BT[:, :-1] * kinds + ids_BT[:, 1:], kinds**2
    if pairs**2 > np.iinfo(np.int64).max:  # two pairs fit into one number if those that occur are counted through
        occurring_M, pair_BT = np.unique(pair_BT, return_inverse=True)
        pairs = len(occurring_M)
    four_BG = pair_BT[:, :-2] * pairs + pair_BT[:, 2:]
    none_G = -1 - np.arange(whole_BG.shape[1])  # equal to nothing
    four_BG = np.sort(np.where(whole_BG, four_BG, none_G), axis=1)
    return Repeats((four_BG[:, 1:] == four_BG[:, :-1]).sum(1), whole_BG.sum(1))


def repetition(counted: Repeats) -> dict[str, float]:
    """The share of all 4-grams that their rollout has seen before; absent where there is none."""
    grams = int(counted.grams_B.sum())
    return {"rollout/repetition_fraction": int(counted.repeated_B.sum()) / grams} if grams else {}


def records(tokens: Flat, counted: Repeats, rows: int) -> list[dict[str, Any]]:
    """The `rows` rollouts with the smallest numbers. What does not exist (no grader, no teacher distribution, fewer
    than four tokens) is NaN. `source`: who wrote the generated tokens, as `student` or `student+teacher`."""
    rollouts = tokens.rollouts
    order_R = rollouts.uid_B.numpy().argsort()[:rows]
    total_B, count_B = tokens.per_rollout(tokens[REVERSE_KL])
    with np.errstate(invalid="ignore"):  # 0 / 0 = NaN
        kl_B, repetition_B = total_B / count_B, counted.repeated_B / counted.grams_B
    columns = {
        "uid": rollouts.uid_B.numpy(),
        "group": rollouts.group_B.numpy(),
        "length_tokens": tokens.length_B,
        "reward": rollouts.reward_B.numpy(),
        "kl_mean_nats": kl_B,
        "truncated": ~rollouts.stopped_B.numpy(),
        "repetition_fraction": repetition_B,
    }
    values = zip(*(value_B[order_R].tolist() for value_B in columns.values()), _sources(rollouts, order_R))
    return [{"step": tokens.step, **dict(zip((*columns, "source"), of_one))} for of_one in values]


def _sources(rollouts: Rollouts, order_R: Ints) -> list[str]:
    wrote_R = np.bitwise_or.reduce(1 << rollouts.source_BT.numpy()[order_R], axis=1)
    return [_writers(wrote) for wrote in wrote_R.tolist()]


@cache
def _writers(wrote: int) -> str:
    """Bit s stands for source s."""
    return "+".join(source.name.lower() for source in Source if source > Source.GIVEN and wrote >> source & 1)
