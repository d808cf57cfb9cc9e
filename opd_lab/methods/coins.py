"""Random numbers that belong to a token: pure functions of integer keys, not of a generator's past.

Neither the order of rollouts, nor padding, nor the micro-batch can change them, and a resumed run draws the same. The
hash is splitmix64 (Steele, Lea and Flood, 2014), absorbing one key after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_lab.types import Batch

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64's own


def uniform(*keys: int | Tensor) -> Tensor:
    """A float64 in [0, 1) for every combination of integer keys, which are broadcast against each other. One more key
    gives an independent number: `uniform(seed, step, uid, position, 1)`."""
    hash_ = torch.zeros((), dtype=torch.int64)
    for key in keys:
        hash_ = _mix(hash_ ^ key)
    return _shift(hash_, 11).double() * 2.0**-53


def token_coins(batch: Batch) -> Tensor:
    """One number per response position, shape BT, owned by (seed, step, rollout, position)."""
    source_BT = batch.rollouts.source_BT
    position_T = torch.arange(source_BT.shape[1], device=source_BT.device)
    return uniform(batch.seed, batch.step, batch.rollouts.uid_B[:, None], position_T)


def _mix(hash_: Tensor) -> Tensor:
    """A bijection of 64 bits, in wrapping int64 arithmetic."""
    hash_ = hash_ + _signed(GOLDEN)
    hash_ = (hash_ ^ _shift(hash_, 30)) * _signed(FIRST)
    hash_ = (hash_ ^ _shift(hash_, 27)) * _signed(SECOND)
    return hash_ ^ _shift(hash_, 31)


def _shift(hash_: Tensor, bits: int) -> Tensor:
    """To the right, filled with zeros."""
    return (hash_ >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
