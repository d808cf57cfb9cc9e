"""The generated tokens of a step in one flat list, as NumPy arrays.

The diagnostics ask many small questions of few tokens. At the size of a step an answer costs what it takes to ask, and
NumPy is quicker to ask than torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd_lab.types import LOGP_STUDENT, LOGP_TEACHER, Batch, Rollouts, Signal

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Flat:
    """Tokens in the order of `rollouts.mask_BT`; numbers are float64, NaN where there is none."""

    step: int
    rollouts: Rollouts
    place_N: Ints  # in a flattened BT
    row_N: Ints
    rank_N: Ints  # tokens of its rollout that were generated before it
    length_B: Ints
    ids_N: Ints
    value_SN: Floats
    order: dict[Signal, int]  # the signals' places in it

    def __getitem__(self, signal: Signal) -> Floats:
        """NaN for a signal that nobody has recorded."""
        place = self.order.get(signal)
        return np.full(len(self.ids_N), np.nan) if place is None else self.value_SN[place]

    def __contains__(self, signal: Signal) -> bool:
        return signal in self.order

    def pick(self, value_BT: Tensor) -> NDArray[Any]:
        """The tokens of something else."""
        return value_BT.numpy().reshape(-1).take(self.place_N)

    def per_rollout(self, value_N: Floats) -> tuple[Floats, Ints]:
        """Each rollout's sum of the values that exist, and how many do."""
        there_N = ~np.isnan(value_N)
        row_M, rows = self.row_N[there_N], len(self.rollouts)
        total_B, count_B = np.bincount(row_M, value_N[there_N], rows), np.bincount(row_M, minlength=rows)
        return total_B.astype(np.float64), count_B.astype(np.int64)


def flatten(batch: Batch, wanted: frozenset[Signal]) -> Flat:
    """The wanted signals, as far as they are recorded; the student's log-probs at least as its rollouts carry them."""
    rollouts = batch.rollouts
    mask_BT = rollouts.mask_BT.numpy()
    length_B = mask_BT.sum(1)
    row_N = np.repeat(np.arange(len(rollouts)), length_B)
    place_N = mask_BT.reshape(-1).nonzero()[0]
    signals = {LOGP_STUDENT: rollouts.logp_BT, **{s: batch[s] for s in wanted if s in batch.signals}}
    value_SBT = torch.stack(list(signals.values())).detach().numpy()
    return Flat(
        batch.step,
        rollouts,
        place_N,
        row_N,
        np.arange(len(row_N)) - (length_B.cumsum() - length_B)[row_N],
        length_B,
        rollouts.response_BT.numpy().reshape(-1).take(place_N).astype(np.int64),
        value_SBT.reshape(len(signals), -1).take(place_N, 1).astype(np.float64),
        {signal: place for place, signal in enumerate(signals)},
    )


def gap_N(tokens: Flat) -> Floats:
    """log p_student - log p_teacher of the sampled token."""
    return tokens[LOGP_STUDENT] - tokens[LOGP_TEACHER]
