"""What became of a token type: was it hard at first, and did it get easier?

    a     mean KL of a type in the first windows in which it was written,  b = in the last ones, as many
    tau   = quantile `high` of a over the types,  delta = quantile `improvement` of a - b over the types
    rock       a >= tau and a - b < delta      hard at first, and stayed
    learned    a >= tau and a - b >= delta     hard at first, and improved
    regressed  a < tau and b > a               got worse
    easy       otherwise

(The four quadrants of the released code of arXiv 2605.09253, whose a and b are forward KLs of one occurrence under two
checkpoints. Here they are means of the reverse KL over a type's occurrences on the student's own rollouts, which a run
can tell while it goes on. Quantiles interpolate linearly.) A type has a quadrant once its first and last windows do not
overlap. delta may be below zero: where few types improved, the rocks are those that got worse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Quadrants:
    """Sums over `windows` first and last windows, for each of `vocabulary` types. Q = windows."""

    def __init__(self, vocabulary: int, *, windows: int, high: float, improvement: float) -> None:
        self._windows, self._high, self._improvement = windows, high, improvement
        self._first_count_V, self._first_kl_V = (torch.zeros(vocabulary, dtype=torch.float64) for _ in range(2))
        self._last_count_QV, self._last_kl_QV = (torch.zeros(windows, vocabulary, dtype=torch.float64) for _ in "ab")
        self._seen_V = torch.zeros(vocabulary, dtype=torch.int32)  # windows in which the type was written

    def add(self, count_V: Tensor, kl_V: Tensor) -> None:
        """A closed window: tokens of each type, and the sum of their KL."""
        types_S = (count_V > 0).nonzero()[:, 0]
        early_S = types_S[self._seen_V[types_S] < self._windows]
        self._first_count_V[early_S] += count_V[early_S]
        self._first_kl_V[early_S] += kl_V[early_S]
        for last_QV, now_V in ((self._last_count_QV, count_V), (self._last_kl_QV, kl_V)):
            last_QV[1:, types_S] = last_QV[:-1, types_S]
            last_QV[0, types_S] = now_V[types_S]
        self._seen_V[types_S] += 1

    def columns(self, types: list[int]) -> list[dict[str, Any]]:
        """quadrant, kl_first_mean_nats and kl_last_mean_nats of some types; None where it is too early to say."""
        ready_S = (self._seen_V >= 2 * self._windows).nonzero()[:, 0]
        first_S = self._first_kl_V[ready_S] / self._first_count_V[ready_S]
        last_S = self._last_kl_QV[:, ready_S].sum(0) / self._last_count_QV[:, ready_S].sum(0)
        found: dict[int, tuple[str, float, float]] = {}
        if len(ready_S):
            tau = float(first_S.quantile(self._high))
            delta = float((first_S - last_S).quantile(self._improvement))
            found = {
                v: (_quadrant(a, b, tau, delta), a, b)
                for v, a, b in zip(ready_S.tolist(), first_S.tolist(), last_S.tolist())
            }
        names = ("quadrant", "kl_first_mean_nats", "kl_last_mean_nats")
        return [dict(zip(names, found.get(v, (None, None, None)))) for v in types]

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"_{name}") for name in _STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state["last_kl_QV"].shape != self._last_kl_QV.shape:
            raise ValueError(
                f"the quadrants of the checkpoint count (windows, token types) {tuple(state['last_kl_QV'].shape)}, "
                f"this run {tuple(self._last_kl_QV.shape)}"
            )
        for name in _STATE:
            setattr(self, f"_{name}", state[name].clone())


_STATE = ("first_count_V", "first_kl_V", "last_count_QV", "last_kl_QV", "seen_V")


def _quadrant(a: float, b: float, tau: float, delta: float) -> str:
    if a >= tau:
        return "rock" if a - b < delta else "learned"
    return "regressed" if b > a else "easy"
