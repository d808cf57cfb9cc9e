"""A method on one prefix, or on a step made by hand: every token of the vocabulary in the place of the sampled one, so
that what holds in expectation can be asserted exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opd_lab.chunk import Chunk, Declared
from opd_lab.methods.base import Method
from opd_lab.types import Batch, Behavior, Facts, Rollouts, Signal, Source, Tokens

FACTS = Facts(
    steps=10, behavior=Behavior(), max_tokens=8, per_prompt=4, updates_per_rollout=1, vocabulary=151936, graded=True,
    tokenizer="t", data="d", teacher="t", engine="e",
)  # fmt: skip


class Silent:
    """A teacher that no baseline asks anything."""

    def continue_(self, *args: Any, **how: Any) -> Any:
        raise AssertionError("nothing was to be asked")

    texts = shortened = show = continue_


def tokens_of(
    method: Method,
    logp_NV: Tensor,
    logq_NV: Tensor,
    ids: Sequence[int] | Tensor = (0,),
    *,
    consulted: Mapping[str, Tensor] | None = None,
    behavior_logp_N: Tensor | None = None,
    step: int = 0,
    logr_NV: Tensor | None = None,
) -> Tokens:
    """N tokens, given the distributions of both models at each and the token that was sampled. Reading what was not
    declared raises, as in a run."""
    ids_N = torch.as_tensor(ids)
    zero_N = torch.zeros_like(ids_N)
    logp_NV, logq_NV = (x.expand(len(ids_N), -1) for x in (logp_NV, logq_NV))
    if logr_NV is not None:
        logr_NV = logr_NV.expand(len(ids_N), -1)
    signals = Declared(Chunk(ids_N, logp_NV, logq_NV, logr_NV), method.needs().tokens, "needs().tokens")
    mu_N = logp_NV.gather(1, ids_N[:, None])[:, 0].detach() if behavior_logp_N is None else behavior_logp_N
    return Tokens(ids_N, zero_N, zero_N, zero_N, mu_N, signals, consulted or {}, step)


def token_losses(method: Method, *args: Any, **keys: Any) -> dict[str, Tensor]:
    """The losses of such tokens."""
    return method.losses(tokens_of(method, *args, **keys))


def padded(rows: Sequence[Sequence[float]]) -> Tensor:
    """Ragged rows as a rectangle in float64, NaN where nothing is."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[math.nan] * (width - len(row))] for row in rows], dtype=torch.float64)


def batch_of(
    method: Method,
    signals: Mapping[Signal, Sequence[Sequence[float]]],
    *,
    group: Sequence[int] | None = None,
    reward: Sequence[float] | None = None,
    step: int = 0,
) -> Batch:
    """A whole step, with its signals given row by row, as the method sees it after `consult`."""
    wide = {signal: padded(rows) for signal, rows in signals.items()}
    some_BT = next(iter(wide.values()))
    mask_BT = ~some_BT.isnan()
    b, t = mask_BT.shape
    rollouts = Rollouts(
        ids_BL=torch.zeros(b, t, dtype=torch.long),
        attention_BL=mask_BT,
        source_BT=torch.where(mask_BT, int(Source.STUDENT), int(Source.PADDING)),
        behavior_logp_BT=some_BT,
        logp_BT=some_BT,
        entropy_BT=some_BT,
        stopped_B=torch.ones(b, dtype=torch.bool),
        uid_B=torch.arange(b),
        group_B=torch.zeros(b, dtype=torch.long) if group is None else torch.tensor(group),
        reward_B=torch.full((b,), math.nan) if reward is None else torch.tensor(reward, dtype=torch.float64),
    )
    declared: Any = Declared(wide, method.needs().batch, "needs().batch")
    bare = Batch(rollouts, declared, {}, method.init_state(), step)
    return Batch(rollouts, declared, method.consult(Silent(), bare), bare.state, step)
