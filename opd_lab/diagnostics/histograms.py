"""Histograms over fixed bins that all runs share: added and compared without touching the values again.

A bin set is its inner edges e_1 < ... < e_K-1. Bin k holds e_k < x <= e_k+1; the first bin is open below (a KL of 0
and the tiny negatives of rounding fall there), the last is open above (infinity too). So every number lands in exactly
one bin, and NaN in none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_lab.types import Histogram


def _log(low: int, high: int, per_decade: int) -> list[float]:
    """10^low ... 10^high, `per_decade` edges to a decade."""
    return [10.0 ** (low + i / per_decade) for i in range((high - low) * per_decade + 1)]


def _below(edges: list[float], limit: float) -> list[float]:
    return [edge for edge in edges if edge <= limit]


def _mirrored(edges: list[float]) -> list[float]:
    return [-edge for edge in reversed(edges)] + edges


BINS: dict[str, list[float]] = {
    "kl_nats": _below(_log(-6, 2, 6), 50.0),
    "gap_nats": _mirrored(_below(_log(-3, 2, 6), 50.0)),
    "entropy_nats": _below(_log(-4, 2, 6), 15.0),
    "weight_ratio": _log(-3, 3, 6),
    "count": [0.0, *(2.0**i for i in range(20))],  # 0, 1, 2, 3-4, 5-8, ...
    "signed": _mirrored(_log(-6, 6, 3)),  # anything else, such as a method's own tensors
}


def edges(bins: str) -> list[float]:
    """The inner edges of a bin set: one fewer than its bins."""
    if bins not in BINS:
        raise ValueError(f"bins must be one of {', '.join(BINS)}, got {bins}")
    return BINS[bins]


def count(values: Tensor, bins: str) -> Histogram:
    """How many of the values, of any shape, fall into each bin."""
    inner = torch.tensor(edges(bins), dtype=torch.float64)
    values_N = values.detach().reshape(-1).double().cpu()
    bin_N = torch.bucketize(values_N[~values_N.isnan()], inner)
    return Histogram(torch.bincount(bin_N, minlength=len(inner) + 1), bins)


def merge(one: Histogram, other: Histogram) -> Histogram:
    """The histogram of both sets of values together."""
    if one.bins != other.bins:
        raise ValueError(f"histograms can be added over the same bins only, got {one.bins} and {other.bins}")
    return Histogram(one.counts_K + other.counts_K, one.bins)
