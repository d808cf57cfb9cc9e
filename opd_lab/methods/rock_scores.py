"""Token types ranked by the divergence at their occurrences: what rock tokens are chosen by.

An occurrence's reverse KL is a function of its prefix alone; it is attributed to the type that was realised there. Of a
corpus the scores need each type's count, sum and sum of squares, float64, which can be added up and decayed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CONFIDENCE = 0.95  # of the one-sided lower bound
INTERVALS, NEWTON_STEPS = 256, 12  # of the quantile: Simpson's rule is good to 1e-11, Newton converges from below


class TypeTable(NamedTuple):
    """Occurrences per token type, and the reverse KL at them in nats and nats^2."""

    count_V: Tensor
    kl_sum_V: Tensor
    kl_square_sum_V: Tensor

    @property
    def mean_V(self) -> Tensor:
        """NaN for a type that was not seen."""
        return self.kl_sum_V / self.count_V

    @property
    def within_V(self) -> Tensor:
        """Squared deviations from the type's mean, summed."""
        return (self.kl_square_sum_V - self.kl_sum_V * self.mean_V).clamp(min=0)


def tabulate(ids_N: Tensor, kl_N: Tensor, types: int = 0) -> TypeTable:
    """The table of a corpus, for at least `types` ids. On the CPU, where sums are the same at every run."""
    ids_N, kl_N = ids_N.cpu(), kl_N.double().cpu()
    values = (torch.ones_like(kl_N), kl_N, kl_N.square())
    return TypeTable(*(torch.bincount(ids_N, value_N, minlength=types).double() for value_N in values))


def rock_score(table: TypeTable) -> Tensor:
    """R = Freq * mean KL. Over all types it adds up to the KL of the corpus."""
    return table.kl_sum_V


def mean_kl(table: TypeTable) -> Tensor:
    return table.mean_V


def frequency(table: TypeTable) -> Tensor:
    return table.count_V


def lower_bound(table: TypeTable) -> Tensor:
    """mean - t s / sqrt(n), the 95 % lower confidence bound of the mean; -inf for n < 2."""
    n_V = table.count_V.clamp(min=2)
    error_V = (table.within_V / (n_V - 1) / n_V).sqrt()
    df, where = (n_V - 1).unique(return_inverse=True)
    bound_V = table.mean_V - student_t_quantile(df)[where] * error_V
    return bound_V.masked_fill(table.count_V < 2, -math.inf)


SCORES: dict[str, Callable[[TypeTable], Tensor]] = {
    "rock_score": rock_score,
    "mean_kl": mean_kl,
    "frequency": frequency,
    "lower_bound": lower_bound,
}


def top(score_V: Tensor, table: TypeTable, k: int, *, min_count: float = 1, exclude_most_frequent: int = 0) -> Tensor:
    """The ids of the k best types, best first, the lower id on ties; fewer where fewer are eligible."""
    count_V = table.count_V
    eligible_V = (count_V >= min_count) & (count_V > 0)
    eligible_V[count_V.sort(descending=True, stable=True).indices[:exclude_most_frequent]] = False
    ranked = score_V.masked_fill(~eligible_V, -math.inf).sort(descending=True, stable=True)
    return ranked.indices[ranked.values > -math.inf][:k]


def student_t_quantile(df_N: Tensor) -> Tensor:
    """Student's t at CONFIDENCE, df >= 1. With t = sqrt(df) tan(angle) its distribution function is 1/2 plus the
    integral of c cos^(df-1) from 0 to the angle, concave, so Newton's method from 0 never overshoots."""
    df_N1 = df_N.double()[:, None]
    c_N1 = (torch.lgamma((df_N1 + 1) / 2) - torch.lgamma(df_N1 / 2)).exp() / math.sqrt(math.pi)
    grid_K = torch.linspace(0, 1, INTERVALS + 1, dtype=torch.float64)
    simpson_K = torch.tensor([1.0, *[4.0, 2.0] * (INTERVALS // 2 - 1), 4.0, 1.0], dtype=torch.float64)
    angle_N1 = torch.zeros_like(df_N1)
    for _ in range(NEWTON_STEPS):
        density_NK = c_N1 * (angle_N1 * grid_K).cos() ** (df_N1 - 1)
        area_N = density_NK @ simpson_K / (3 * INTERVALS) * angle_N1[:, 0]
        angle_N1 = angle_N1 + ((CONFIDENCE - 0.5 - area_N) / density_NK[:, -1])[:, None]
    return (df_N1.sqrt() * angle_N1.tan())[:, 0]
