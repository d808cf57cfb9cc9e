"""Is a difference of accuracy more than the choice of problems? Exact tests on integer counts, as pure functions.

A paired bootstrap draws the problems anew, with replacement. Its distribution is known exactly: the sum of n
independent draws from the n observed differences. So nothing is resampled: the limit of many resamples is computed.
"""

from __future__ import annotations

from math import comb
from typing import Any

import numpy as np

ALPHA = 0.05
STRONG_PILLAR, NEUTRAL, STRONG_STUMBLING = "strong pillar", "neutral", "strong stumbling"
FALSE_DISCOVERY = (0.05, 0.1, 0.2)


def p_of(result: Any) -> float:
    """The p value of a test of scipy, whose results have no types."""
    return float(result.pvalue)


def bootstrap_p(change_P: list[int]) -> float:
    """Two-sided p of "no change" for integer changes per problem (correct rollouts after minus before):
    min(1, 2 min(P(sum* >= 0), P(sum* <= 0)))."""
    low, high, n = min(change_P), max(change_P), len(change_P)
    one_K = np.bincount([c - low for c in change_P], minlength=high - low + 1) / n
    total_K = _power(one_K, n)
    sum_K = np.arange(len(total_K)) + n * low
    return float(min(1.0, 2 * min(total_K[sum_K >= 0].sum(), total_K[sum_K <= 0].sum())))


def _power(p_K: np.ndarray, n: int) -> np.ndarray:
    """The distribution of a sum of n independent draws."""
    out = np.ones(1)
    while n:
        out, n, p_K = (np.convolve(out, p_K) if n & 1 else out), n >> 1, np.convolve(p_K, p_K) if n > 1 else p_K
    return out


def verdict(change_P: list[int], rollouts: int, eps: float) -> tuple[str, float]:
    """The verdict on knocking a token out, and p. A pillar costs at least eps of accuracy, and significantly."""
    total, limit, p = sum(change_P), eps * len(change_P) * rollouts, bootstrap_p(change_P)
    if p >= ALPHA or abs(total) < limit - 1e-9:  # counts are whole numbers: the slack only undoes rounding of eps
        return NEUTRAL, p
    return (STRONG_PILLAR if total < 0 else STRONG_STUMBLING), p


def sign_test(fewer: int, more: int) -> float:
    """Two-sided p of so many changes down and up if both were equally likely."""
    n, k = fewer + more, min(fewer, more)
    return min(1.0, 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n)


def bonferroni(p_S: list[float], alpha: float = ALPHA) -> list[bool]:
    return [p * len(p_S) < alpha for p in p_S]


def benjamini_hochberg(p_S: list[float], q: float) -> list[bool]:
    """Which are found at a false discovery rate of q."""
    order = sorted(range(len(p_S)), key=lambda s: p_S[s])
    passed = [rank for rank, s in enumerate(order, 1) if p_S[s] <= q * rank / len(p_S)]
    found = set(order[: max(passed, default=0)])
    return [s in found for s in range(len(p_S))]
