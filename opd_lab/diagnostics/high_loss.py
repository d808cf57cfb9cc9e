"""Which token types carry the divergence, over a whole run and in bounded memory.

Per token type: how often it was written, its KL (mean, spread, maximum), its share of all KL against its share of all
tokens, what both models thought of it, where it stood, the most extreme example in context, and its persistence: in
how many of the last windows of training its mean KL was high. High in a window are the types with the largest mean KL
that together hold a share 1 - quantile of its tokens (the type on the border included, so a frequent type can be high),
as far as they lie above the window's own mean. What became of a type over the run: `quadrants.py`.

All sums are float64 on the CPU, so neither the device nor a restart changes them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from opd_lab.diagnostics.positions import relative_BT
from opd_lab.diagnostics.quadrants import Quadrants
from opd_lab.types import (
    ENTROPY_STUDENT,
    ENTROPY_TEACHER,
    LOGP_STUDENT,
    LOGP_TEACHER,
    REVERSE_KL,
    Batch,
)

WINDOWS = 16  # remembered for the persistence
BEFORE, AFTER = 16, 6  # tokens of context around the example
NOTHING = -1  # no token here

Decode = Callable[[list[int]], str]


def remembering(decode: Decode) -> Decode:
    """The same, quicker: tables say the same words again and again."""
    known = lru_cache(maxsize=1 << 14)(lambda ids: decode(list(ids)))
    return lambda ids: known(tuple(ids))


class HighLoss:
    """Accumulators over `vocabulary` token types; a window is `window` steps long."""

    def __init__(self, vocabulary: int, *, quantile: float, window: int, quadrants: Quadrants) -> None:
        self._quantile, self._window, self._quadrants = quantile, max(window, 1), quadrants
        self._sums = {name: torch.zeros(vocabulary, dtype=torch.float64) for name in _SUMMED}
        self._kl_max_V = torch.full((vocabulary,), -torch.inf, dtype=torch.float64)
        self._example_VC = torch.full((vocabulary, BEFORE + 1 + AFTER), NOTHING, dtype=torch.int32)
        self._window_count_V = torch.zeros(vocabulary, dtype=torch.float64)
        self._window_kl_V = torch.zeros(vocabulary, dtype=torch.float64)
        self._high_V = torch.zeros(vocabulary, dtype=torch.int64)  # bit w: high in the w-th last window
        self._steps, self._windows = 0, 0  # steps in the open window, closed windows

    def add(self, batch: Batch) -> None:
        """Count the generated tokens of a step; without a full teacher distribution there is no KL to count."""
        if REVERSE_KL not in batch.signals:
            return
        kl_BT = batch[REVERSE_KL].detach().double().cpu()
        keep_BT = batch.rollouts.mask_BT.cpu() & kl_BT.isfinite()
        ids_N = batch.rollouts.response_BT.cpu()[keep_BT].long()
        kl_N = kl_BT[keep_BT]
        nan_BT = torch.full_like(batch[REVERSE_KL], torch.nan)
        others_SBT = torch.stack([batch.signals.get(signal, nan_BT).detach().double() for signal in _OTHERS]).cpu()
        logp_N, logq_N, entropy_student_N, entropy_teacher_N = others_SBT[:, keep_BT]
        seen = {
            "count": torch.ones_like(kl_N),
            "kl": kl_N,
            "kl_square": kl_N.square(),
            "p_student": logp_N.exp(),
            "p_teacher": logq_N.exp(),
            "entropy_student": entropy_student_N,
            "entropy_teacher": entropy_teacher_N,
            "position": relative_BT(batch.rollouts.mask_BT.cpu())[keep_BT],
        }
        step = {name: torch.bincount(ids_N, value_N, minlength=len(self._kl_max_V)) for name, value_N in seen.items()}
        for name, sum_V in step.items():
            self._sums[name] += sum_V
        self._window_count_V += step["count"]
        self._window_kl_V += step["kl"]
        self._keep_examples(batch, keep_BT, ids_N, kl_N)
        self._steps += 1
        if self._steps == self._window:
            self._close_window()

    def _keep_examples(self, batch: Batch, keep_BT: Tensor, ids_N: Tensor, kl_N: Tensor) -> None:
        """Where a type's maximum rises, its first such token becomes its example."""
        before_V = self._kl_max_V.clone()
        self._kl_max_V.scatter_reduce_(0, ids_N, kl_N, "amax")
        winner_N = (kl_N == self._kl_max_V[ids_N]) & (kl_N > before_V[ids_N])
        order_M = winner_N.nonzero()[:, 0]
        first_V = torch.full(before_V.shape, NOTHING)
        first_V.scatter_reduce_(0, ids_N[order_M], order_M, "amin", include_self=False)
        types_M = (first_V != NOTHING).nonzero()[:, 0]
        row_M, column_M = keep_BT.nonzero()[first_V[types_M]].unbind(1)
        column_MC = batch.rollouts.prompt_columns + column_M[:, None] + torch.arange(-BEFORE, AFTER + 1)
        ids_BL, there_BL = batch.rollouts.ids_BL.cpu(), batch.rollouts.attention_BL.cpu()
        inside_MC = (column_MC >= 0) & (column_MC < ids_BL.shape[1])
        column_MC = column_MC.clamp(0, ids_BL.shape[1] - 1)
        inside_MC &= there_BL[row_M[:, None], column_MC]
        self._example_VC[types_M] = ids_BL[row_M[:, None], column_MC].masked_fill(~inside_MC, NOTHING).int()

    def _close_window(self) -> None:
        mean_V = self._window_kl_V / self._window_count_V  # NaN where the type was not written
        mean_S, order_S = mean_V[self._window_count_V > 0].sort()
        if len(mean_S):
            reached_S = self._window_count_V[self._window_count_V > 0][order_S].cumsum(0)
            border = torch.searchsorted(reached_S, self._quantile * reached_S[-1], right=True).clamp(
                max=len(mean_S) - 1
            )
            middle = self._window_kl_V.sum() / reached_S[-1]
            high_V = (mean_V >= mean_S[border]) & (mean_V > middle)
            self._high_V = (self._high_V << 1 | high_V.long()) & ((1 << WINDOWS) - 1)
            self._windows += 1
            self._quadrants.add(self._window_count_V, self._window_kl_V)
        self._window_count_V.zero_()
        self._window_kl_V.zero_()
        self._steps = 0

    def table(self, decode: Decode, rows: int) -> list[dict[str, Any]]:
        """The `rows` token types that own most of the KL, the greatest first."""
        count_V, kl_V = self._sums["count"], self._sums["kl"]
        mean = {name: sum_V / count_V for name, sum_V in self._sums.items()}
        std_V = (mean["kl_square"] - mean["kl"].square()).clamp(min=0).sqrt()
        kl_share_V, token_share_V = kl_V / kl_V.sum(), count_V / count_V.sum()
        times_V = torch.stack([(self._high_V >> w) & 1 for w in range(WINDOWS)]).sum(0)
        seen_V = (count_V > 0).nonzero()[:, 0]
        top = seen_V[kl_V[seen_V].sort(descending=True, stable=True).indices[:rows]].tolist()
        of_V = {
            "count": count_V.long(),
            "kl_mean_nats": mean["kl"],
            "kl_std_nats": std_V,
            "kl_max_nats": self._kl_max_V,
            "kl_share_fraction": kl_share_V,
            "token_share_fraction": token_share_V,
            "enrichment_ratio": kl_share_V / token_share_V,
            "p_student_mean": mean["p_student"],
            "p_teacher_mean": mean["p_teacher"],
            "entropy_student_mean_nats": mean["entropy_student"],
            "entropy_teacher_mean_nats": mean["entropy_teacher"],
            "position_mean_fraction": mean["position"],
            "persistence_windows": times_V,
        }
        columns = {name: value_V[top].tolist() for name, value_V in of_V.items()}
        return [
            {
                "rank": place,
                "id": v,
                "token": decode([v]),
                **{name: values[place] for name, values in columns.items()},
                "windows": min(self._windows, WINDOWS),
                **quadrant,
                "example": self._example(decode, v),
            }
            for place, (v, quadrant) in enumerate(zip(top, self._quadrants.columns(top)))
        ]

    def _example(self, decode: Decode, v: int) -> str:
        before, after = self._example_VC[v, :BEFORE].tolist(), self._example_VC[v, BEFORE + 1 :].tolist()
        texts = (decode([i for i in ids if i != NOTHING]) for ids in (before, [v], after))
        return "{}⟦{}⟧{}".format(*texts)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and ints only."""
        fields = {name: getattr(self, f"_{name}") for name in _STATE}
        sums = {f"sum_{name}": sum_V for name, sum_V in self._sums.items()}
        return fields | sums | {"quadrants": self._quadrants.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["kl_max_V"]) != len(self._kl_max_V):
            got, want = len(state["kl_max_V"]), len(self._kl_max_V)
            raise ValueError(f"the high-loss table of the checkpoint counts {got} token types, the models have {want}")
        for name in _STATE:
            value = state[name]
            setattr(self, f"_{name}", value.clone() if isinstance(value, Tensor) else value)
        self._sums = {name: state[f"sum_{name}"].clone() for name in _SUMMED}
        self._quadrants.load_state_dict(state["quadrants"])


_OTHERS = (LOGP_STUDENT, LOGP_TEACHER, ENTROPY_STUDENT, ENTROPY_TEACHER)
_SUMMED = ("count", "kl", "kl_square", "p_student", "p_teacher", "entropy_student", "entropy_teacher", "position")
_STATE = ("kl_max_V", "example_VC", "window_count_V", "window_kl_V", "high_V", "steps", "windows")
