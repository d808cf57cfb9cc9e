"""How sure may one be of an accuracy, or of the difference between two? Pure functions of arrays.

`correct_SP` has a row per seed and a column per test problem; an entry is the share of correct rollouts. Seeds and
problems are crossed (every seed meets the same problems), and both are samples: other seeds, or other problems, would
have given another number. Leading axes, written `...`, are independent repetitions.

Where a mean of y_sp = mu + seed_s + problem_p + rest_sp gets its variance from, by the mean squares of the two-way
table (Searle, Casella and McCulloch, Variance Components, 1992, chapter 4):

    V_seeds    = var_s(mean_p y_sp) / S                             estimates var(seed) / S + var(rest) / (S P)
    V_problems = var_p(mean_s y_sp) / P - var(rest) / (S P), >= 0   estimates var(problem) / P

A bootstrap over three seeds knows three values and is too narrow. The interval is instead put together from one t
interval for each source (MOVER: Zou and Donner, Statistics in Medicine 27, 2008; Graybill and Wang, JASA 75, 1980):

    half width^2 = t(P - 1)^2 V_problems + t(df)^2 V_seeds

For a difference A - B the first term is that of the problems' own differences, which is the pairing; the second adds
the seeds of both, which are drawn apart, with Welch's degrees of freedom. What neither explains counts with the seeds,
whose few degrees of freedom it then has: counted with the problems, the interval of three seeds covers too little where
seeds spread about as much as problems do. Where some method has one seed, var(rest) cannot be told from var(problem), a
number can only speak of problems, and `speaks_of` says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]

LEVEL = 0.95  # of every interval
SMALLEST_P = 1e-12  # below, a p-value says no more
MOST_SEEDS, MOST_PROBLEMS = 1000, 10**6  # what `needed` still calls possible


def t_beyond(share: Any, df: Any) -> Array:
    """What Student's t exceeds in so small a share of cases (`scipy.stats.t.isf`, without its slow import)."""
    return -special.stdtrit(df, share)


@dataclass(frozen=True)
class Estimate:
    """A number [...], and the variance that it owes to the draw of problems and of seeds."""

    value: Array
    problems: Array
    problems_df: int
    seeds: Array  # 0 where nothing is known of seeds
    seeds_df: Array
    speaks_of: str  # "problems" | "problems and seeds" | "seeds"

    @property
    def standard_error(self) -> Array:
        return np.sqrt(self.problems + self.seeds)

    def half_width(self, alpha: float | Array = 1 - LEVEL) -> Array:
        t_problems = t_beyond(np.asarray(alpha) / 2, self.problems_df)
        t_seeds = t_beyond(np.asarray(alpha) / 2, self.seeds_df)
        return np.sqrt(t_problems**2 * self.problems + t_seeds**2 * self.seeds)

    def interval(self) -> tuple[Array, Array]:
        return self.value - self.half_width(), self.value + self.half_width()

    def within(self, least: float, most: float) -> tuple[float, float]:
        """The interval of one number, cut where no value can lie."""
        low, high = self.interval()
        return max(float(low), least), min(float(high), most)

    def p_value(self, null: float = 0.0) -> Array:
        """Of value = null, two-sided: one minus the level of the interval that ends there."""
        from scipy.optimize import elementwise  # late: no picture of a curve needs it

        off = np.abs(self.value - null)

        def beyond(log_p: Array, off: Array, *spread: Array) -> Array:
            problems, df, seeds, seeds_df = spread
            t = t_beyond(np.exp(log_p) / 2, np.stack([df, seeds_df]))
            return np.sqrt(t[0] ** 2 * problems + t[1] ** 2 * seeds) - off

        spread = (self.problems, np.full_like(off, self.problems_df), self.seeds, self.seeds_df)
        log_p = elementwise.find_root(beyond, (math.log(SMALLEST_P), 0.0), args=(off, *spread)).x
        p = np.where(off >= self.half_width(SMALLEST_P), SMALLEST_P, np.exp(log_p))
        return np.where(off == 0, 1.0, np.where(np.isnan(self.standard_error), np.nan, p))


def accuracy(correct_SP: Array) -> Estimate:
    """The mean over seeds and problems."""
    return _estimate(correct_SP.mean(-2), (correct_SP,))


def over_seeds(value_SN: Array) -> Estimate:
    """The mean over seeds of N numbers that are not made of problems, NaN where a seed has none: a t interval each. A
    number that one seed has gets none."""
    count_N = (~np.isnan(value_SN)).sum(0)
    mean_N = np.nansum(value_SN, 0) / count_N
    df_N = np.maximum(count_N - 1, 1)
    squares_N = np.nansum((value_SN - mean_N) ** 2, 0)
    seeds_N = np.where(count_N > 1, squares_N / df_N / count_N, np.nan)
    return Estimate(mean_N, np.zeros_like(mean_N), 1, seeds_N, df_N, "seeds")


def difference(a_SP: Array, b_SP: Array) -> Estimate:
    """Mean accuracy of A less that of B, paired by problem. Both meet the same problems; S may differ."""
    return _estimate(a_SP.mean(-2) - b_SP.mean(-2), (a_SP, b_SP))


def improvement(a_SP: Array, b_SP: Array) -> Estimate:
    """The probability that on some problem a run of A does better than a run of B, a tie counting half: 0.5 = alike.

    The probability of improvement of Agarwal et al. (arXiv 2108.13264) with problems as tasks. Its variance is that of
    the placement values (DeLong et al., Biometrics 44, 1988): for a run of A, its mean over all runs of B.
    """
    a_SSP, b_SSP = a_SP[..., :, None, :], b_SP[..., None, :, :]
    better_SSP = (a_SSP > b_SSP) + 0.5 * (a_SSP == b_SSP)
    return _estimate(better_SSP.mean((-3, -2)), (better_SSP.mean(-2), better_SSP.mean(-3)))


def _estimate(value_P: Array, parts: Sequence[Array]) -> Estimate:
    """The mean of values per problem, with the seeds' spread of the tables that they were made of."""
    problems = value_P.shape[-1]
    value = value_P.mean(-1)
    blank = np.full_like(value, np.nan)
    V_problems = value_P.var(-1, ddof=1) / problems if problems > 1 else blank
    if problems < 2 or any(part_SP.shape[-2] < 2 for part_SP in parts):
        return Estimate(value, V_problems, max(problems - 1, 1), np.zeros_like(value), np.ones_like(value), "problems")
    between = [part_SP.mean(-1).var(-1, ddof=1) / part_SP.shape[-2] for part_SP in parts]
    rest = [_rest(part_SP) / (part_SP.shape[-2] * problems) for part_SP in parts]
    of_df = sum(V**2 / (part_SP.shape[-2] - 1) for V, part_SP in zip(between, parts))
    V_seeds = np.sum(between, axis=0)
    df = np.divide(V_seeds**2, of_df, out=np.ones_like(value), where=of_df > 0)
    V_problems = np.maximum(V_problems - sum(rest), 0.0)
    return Estimate(value, V_problems, problems - 1, V_seeds, df, "problems and seeds")


def _rest(y_SP: Array) -> Array:
    """The variance that neither seed nor problem explains: the mean square of the two-way residuals."""
    S, P = y_SP.shape[-2:]
    residual_SP = (
        y_SP - y_SP.mean(-1, keepdims=True) - y_SP.mean(-2, keepdims=True) + y_SP.mean((-2, -1), keepdims=True)
    )
    return (residual_SP**2).sum((-2, -1)) / ((S - 1) * (P - 1))


def holm(p_M: Sequence[float] | Array, comparisons: int | None = None) -> Array:
    """Holm's adjusted p-values: below alpha, all of them together are false with probability <= alpha at most.

    `comparisons` counts those that were made and are not shown, each as if its p-value were larger than all shown.
    (Holm, Scandinavian Journal of Statistics 6, 1979.)
    """
    p_M = np.asarray(p_M, dtype=float)
    count = len(p_M) if comparisons is None else comparisons
    assert count >= len(p_M), "more comparisons shown than made"
    order_M = np.argsort(p_M)
    adjusted_M = np.empty_like(p_M)
    adjusted_M[order_M] = np.minimum(np.maximum.accumulate((count - np.arange(len(p_M))) * p_M[order_M]), 1.0)
    return adjusted_M


@dataclass(frozen=True)
class Needed:
    """What would separate two methods whose true difference is the one seen: `math.inf` where nothing would, within
    reason, and NaN where it cannot be known."""

    seeds: float  # per method, with the problems at hand
    problems: float  # with the seeds at hand


def needed(a_SP: Array, b_SP: Array, alpha: float, power: float = 0.8) -> Needed:
    """The fewest seeds, or problems, at which the interval of level 1 - alpha leaves out 0 with probability `power`.

    From the variance components of the data, each estimated at >= 0, and the normal quantile of the power. They are
    estimates from few seeds themselves: read the answer as an order of magnitude.
    """
    found = difference(a_SP, b_SP)
    S = np.array([a_SP.shape[0], b_SP.shape[0]])
    P = a_SP.shape[1]
    off, z = abs(float(found.value)), float(special.ndtri(power))
    grid_P = np.unique(np.geomspace(2, MOST_PROBLEMS, 4000).round())
    if (S < 2).any():  # these very runs, on other problems
        per_problem = found.problems * P
        return Needed(math.nan, _first(grid_P, off, alpha, z, per_problem / grid_P, 0 * grid_P, grid_P - 1, grid_P))
    rest = np.array([_rest(a_SP), _rest(b_SP)])
    seed = np.array([max(y.mean(1).var(ddof=1) - r / P, 0.0) for y, r in zip((a_SP, b_SP), rest)])
    paired = float(found.problems) * P
    grid_S = np.arange(2.0, MOST_SEEDS + 1)

    def first(grid: Array, S_2G: Array, P_G: Array) -> float:
        between_2G = (seed[:, None] + rest[:, None] / P_G) / S_2G
        df_G = between_2G.sum(0) ** 2 / np.maximum((between_2G**2 / (S_2G - 1)).sum(0), 1e-300)
        return _first(grid, off, alpha, z, paired / P_G, between_2G.sum(0), P_G - 1, np.maximum(df_G, 1.0))

    return Needed(
        seeds=first(grid_S, np.stack([grid_S, grid_S]), np.full_like(grid_S, P)),
        problems=first(grid_P, np.broadcast_to(S[:, None], (2, len(grid_P))), grid_P),
    )


def _first(
    grid_G: Array,
    off: float,
    alpha: float,
    z: float,
    problems_G: Array,
    seeds_G: Array,
    problems_df_G: Array,
    seeds_df_G: Array,
) -> float:
    """The first place of the grid at which the interval is narrow enough."""
    t_problems_G, t_seeds_G = t_beyond(alpha / 2, problems_df_G), t_beyond(alpha / 2, seeds_df_G)
    half_G = np.sqrt(t_problems_G**2 * problems_G + t_seeds_G**2 * seeds_G)
    enough_G = half_G + z * np.sqrt(problems_G + seeds_G) <= off
    return float(grid_G[enough_G.argmax()]) if enough_G.any() else math.inf


def bootstrap(a_SP: Array, b_SP: Array | None = None, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The hierarchical bootstrap interval of a mean, or of a paired difference: seeds drawn within each method,
    problems drawn jointly for all (Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1, 2007).

    A second opinion. With few seeds it is too narrow, since the variance of S values is (S - 1) / S of the truth.
    """
    tables = [a_SP] if b_SP is None else [a_SP, b_SP]
    weight_RP, *weights = _drawn(seed, resamples, a_SP.shape[1], *map(len, tables))
    means = [np.einsum("rs,sp,rp->r", w_RS, y_SP, weight_RP, optimize=True) for w_RS, y_SP in zip(weights, tables)]
    mean_R = means[0] - (means[1] if len(means) > 1 else 0.0)
    low, high = np.quantile(mean_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@lru_cache(8)
def _drawn(seed: int, resamples: int, *sizes: int) -> list[Any]:
    """Of each size n, how often each of n comes up in n draws, as weights that sum to 1. Methods that are compared
    have the same sizes, and the same draws."""
    generator = np.random.default_rng(seed)
    return [generator.multinomial(n, np.full(n, 1 / n), size=resamples) / n for n in sizes]
