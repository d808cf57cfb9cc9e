"""Steps made by hand for the rock tokens: response ids, the reverse KL at each, and the last prompt token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opd_lab.divergence import weighted_mean
from opd_lab.methods.rock_tokens import RockTokens
from opd_lab.types import REVERSE_KL, Batch, Rollouts, Source
from tests.methods.by_hand import Silent

# GV3
IDS, KL, PROMPT = [[7, 3, 7, 5, 2], [3, 7, 9]], [[0.40, 0.10, 0.20, 1.50, 0], [0.05, 0.60, 2.00]], [9, 7]


def rocks(**keys: Any) -> RockTokens:
    return RockTokens(**{"token_ids": (7,)} | keys)


def gv3() -> Batch:
    return batch_of(IDS, KL, PROMPT)


def padded(rows: Sequence[Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype)


def batch_of(
    ids: Sequence[Sequence[int]],
    kl: Sequence[Sequence[float]] | None = None,
    prompt: Sequence[int] | None = None,
    *,
    step: int = 0,
    seed: int = 0,
) -> Batch:
    """Padding has id 0, as a token may; the KL is the step's recorded one."""
    kl_BT = padded(kl or [[0.0] * len(row) for row in ids], math.nan, torch.float64)
    mask_BT = padded([[1] * len(row) for row in ids], 0, torch.bool)
    last_B1 = torch.tensor(prompt or [0] * len(ids))[:, None]
    none_BT = torch.full_like(kl_BT, math.nan)
    rollouts = Rollouts(
        ids_BL=torch.cat([torch.zeros_like(last_B1), last_B1, padded(ids, 0, torch.long)], 1),
        attention_BL=torch.cat([torch.ones(len(ids), 2, dtype=torch.bool), mask_BT], 1),
        source_BT=torch.where(mask_BT, int(Source.STUDENT), int(Source.PADDING)),
        behavior_logp_BT=none_BT, logp_BT=none_BT, entropy_BT=none_BT,
        stopped_B=torch.ones(len(ids), dtype=torch.bool),
        uid_B=torch.arange(len(ids)),
        group_B=torch.arange(len(ids)),
        reward_B=torch.full((len(ids),), math.nan),
    )  # fmt: skip
    return Batch(rollouts, {REVERSE_KL: kl_BT}, step=step, seed=seed)


def consulted(method: RockTokens, batch: Batch, state: dict[str, Any] | None = None) -> Batch:
    """The step as `weights` sees it."""
    batch = replace(batch, state=method.init_state() if state is None else state)
    return replace(batch, consulted=method.consult(Silent(), batch))


def weights_of(method: RockTokens, batch: Batch) -> Tensor:
    return method.weights(consulted(method, batch))["opd"]


def objective(method: RockTokens, batch: Batch) -> float:
    """With the platform's own denominator, the tokens whose weight is not 0."""
    weight_BT = weights_of(method, batch)
    return weighted_mean(batch[REVERSE_KL], weight_BT, int((weight_BT != 0).sum())).item()
