"""Values -> counts over the fixed bins of `opd_lab.bins`."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from opd_lab.bins import edges
from opd_lab.types import Histogram


def count(values: Tensor, bins: str) -> Histogram:
    """How many of the values, of any shape, fall into each bin."""
    inner = _edges(bins)
    values_N = values.detach().reshape(-1).double().cpu()
    bin_N = torch.bucketize(values_N[~values_N.isnan()], inner)
    return Histogram(torch.bincount(bin_N, minlength=len(inner) + 1), bins)


@cache
def _edges(bins: str) -> Tensor:
    return torch.tensor(edges(bins), dtype=torch.float64)


def merge(one: Histogram, other: Histogram) -> Histogram:
    """The histogram of both sets of values together."""
    if one.bins != other.bins:
        raise ValueError(f"histograms can be added over the same bins only, got {one.bins} and {other.bins}")
    return Histogram(one.counts_K + other.counts_K, one.bins)
