"""Which token types are rocks: the definitions of arXiv 2605.09253 and its code, as pure functions of a corpus.

(A) Rock Score, the default, is `rock_score` of `opd_lab.methods.rock_scores`. Here stand (B), types that stay hard in
like contexts, and (C), occurrences that were hard and hardly improved, with what is said of any set of types.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from opd_lab.methods.base import quantile
from opd_lab.methods.rock_scores import CONFIDENCE, TypeTable, top

QUADRANTS = ("rock", "learned", "regressed", "easy")
Z = NormalDist().inv_cdf(CONFIDENCE)


class Shares(NamedTuple):
    """What a set of types holds of a corpus. Enrichment below 1: it is frequent rather than hard."""

    kl: float
    tokens: float

    @property
    def enrichment(self) -> float:
        return self.kl / self.tokens


def shares(table: TypeTable, ids: Tensor) -> Shares:
    """Coverage, the KL share, and token share of a set of types."""
    return Shares(
        (table.kl_sum_V[ids].sum() / table.kl_sum_V.sum()).item(),
        (table.count_V[ids].sum() / table.count_V.sum()).item(),
    )


class Shrunk(NamedTuple):
    """Means under a normal prior that the corpus itself provides. NaN for types that were not seen."""

    prior_mean: float  # nats, of the corpus
    within: float  # nats^2, variance within a type
    between: float  # nats^2, variance of the types' means beyond what `within` explains
    mean_V: Tensor
    lower_V: Tensor


def empirical_bayes(table: TypeTable) -> Shrunk:
    """q mean + (1 - q) mu0 with q = (n/sigma2) / (n/sigma2 + 1/tau2), and its 95 % lower bound."""
    seen_V, n_V = table.count_V > 0, table.count_V
    mu0 = table.kl_sum_V.sum() / n_V.sum()
    sigma2 = table.within_V[seen_V].sum() / (n_V[seen_V] - 1).sum()
    tau2 = (table.mean_V[seen_V].var(correction=1) - sigma2 / n_V[seen_V].mean()).clamp(min=0)
    q_V = n_V * tau2 / (n_V * tau2 + sigma2)
    mean_V = q_V * table.mean_V + (1 - q_V) * mu0
    return Shrunk(mu0.item(), sigma2.item(), tau2.item(), mean_V, mean_V - Z * (sigma2 * q_V / n_V).sqrt())


def persistently_high(before_N: Tensor, after_N: Tensor, tau_before: float = 0.8, tau_after: float = 0.8) -> Tensor:
    """O_PH of (B): the occurrences at or above a quantile of the loss before OPD and after it."""
    high_before_N = before_N >= quantile(before_N, 100 * tau_before)
    return high_before_N & (after_N >= quantile(after_N, 100 * tau_after))


def context_consistency(context_OD: Tensor, frequency: int, *, gamma: float = 0.5, eta: float = 0.1) -> float:
    """CCR of (B) for one type: the share of its `frequency` occurrences that are in O_PH with a context like that of
    at least `eta` of the others there, like being a cosine >= gamma. `context_OD` has a row for each in O_PH."""
    unit_OD = torch.nn.functional.normalize(context_OD, dim=1)
    return consistency((unit_OD @ unit_OD.T).clamp(-1, 1) >= gamma, frequency, eta)


def consistency(alike_OO: Tensor, frequency: int, eta: float) -> float:
    """How many of the occurrences are like at least `eta` of the others, over `frequency`."""
    others = len(alike_OO) - 1
    rho_O = (alike_OO.sum(1) - alike_OO.diagonal().long()).double() / max(others, 1)
    return (rho_O >= eta).sum().item() / frequency


def quadrants(before_N: Tensor, after_N: Tensor, *, high: float = 0.8, delta: float = 0.2) -> Tensor:
    """(C): the place in QUADRANTS of every occurrence, by forward KL before and after OPD. Rock: among the highest
    before, and improved by less than the `delta` quantile of improvements."""
    gain_N = before_N - after_N
    high_N, stuck_N = before_N >= quantile(before_N, 100 * high), gain_N < quantile(gain_N, 100 * delta)
    low_N = torch.where(gain_N < 0, 2, 3)
    return torch.where(high_N, torch.where(stuck_N, 0, 1), low_N)


def recalcitrant(ids_N: Tensor, quadrant_N: Tensor, *, min_count: int = 30, pool: int = 200) -> Tensor:
    """The types of (C): the `pool` with the highest share of rock occurrences, ordered by how many those are."""
    count_V = torch.bincount(ids_N).double()
    rock_V = torch.bincount(ids_N[quadrant_N == 0], minlength=len(count_V)).double()
    ids = top(rock_V / count_V, TypeTable(count_V, rock_V, rock_V), pool, min_count=min_count)
    return ids[rock_V[ids].sort(descending=True, stable=True).indices]


def matched_control(frequency_R: Tensor, frequency_O: Tensor) -> Tensor:
    """For each rock a type of its own among the others, as frequent as possible: the cheapest assignment, at the cost
    |log10 of the ratio of frequencies|. Indices into `frequency_O`."""
    cost_RO = (frequency_R.double().log10()[:, None] - frequency_O.double().log10()).abs()
    return torch.from_numpy(linear_sum_assignment(cost_RO.numpy())[1])
