"""The fixed bins that all runs share, so that histograms can be added and compared without touching the values again.

A bin set is its inner edges e_1 < ... < e_K-1. Bin k holds e_k < x <= e_k+1; the first bin is open below (a KL of 0
and the tiny negatives of rounding fall there), the last is open above (infinity too). So every number lands in exactly
one bin, and NaN in none. Plain numbers: whoever draws histograms needs no torch.
"""

from __future__ import annotations


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
    "importance_ratio": [10 ** (1 / 12) * edge for edge in _log(-3, 3, 6)],  # 1 lies in the middle of a bin
    "count": [0.0, *(2.0**i for i in range(20))],  # 0, 1, 2, 3-4, 5-8, ...
    "signed": _mirrored(_log(-6, 6, 3)),  # anything else, such as a method's own tensors
}


def edges(bins: str) -> list[float]:
    """The inner edges of a bin set: one fewer than its bins."""
    if bins not in BINS:
        raise ValueError(f"bins must be one of {', '.join(BINS)}, got {bins}")
    return BINS[bins]
