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

import numpy as np
import torch
from torch import Tensor

from opd_lab.diagnostics.flat import Flat, Floats, Ints
from opd_lab.diagnostics.quadrants import Quadrants
from opd_lab.types import (
    ENTROPY_STUDENT,
    ENTROPY_TEACHER,
    LOGP_STUDENT,
    LOGP_TEACHER,
    REVERSE_KL,
    Rollouts,
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
        self._sum_SV = torch.zeros(len(_SUMMED), vocabulary, dtype=torch.float64)
        self._kl_max_V = torch.full((vocabulary,), -torch.inf, dtype=torch.float64)
        self._example_VC = torch.full((vocabulary, BEFORE + 1 + AFTER), NOTHING, dtype=torch.int32)
        self._window_count_V = torch.zeros(vocabulary, dtype=torch.float64)
        self._window_kl_V = torch.zeros(vocabulary, dtype=torch.float64)
        self._high_V = torch.zeros(vocabulary, dtype=torch.int64)  # bit w: high in the w-th last window
        self._steps, self._windows = 0, 0  # steps in the open window, closed windows
        self._texts: dict[tuple[int, ...], str] = {}  # the examples of the last table

    def add(self, tokens: Flat) -> None:
        """Count the generated tokens of a step; without a full teacher distribution there is no KL to count."""
        if REVERSE_KL not in tokens:
            return
        keep_N = np.isfinite(tokens[REVERSE_KL])
        ids_N, kl_N = tokens.ids_N[keep_N], tokens[REVERSE_KL][keep_N]
        relative_N = tokens.rank_N / tokens.length_B[tokens.row_N]
        seen = {
            "count": None,
            "kl": kl_N,
            "kl_square": kl_N * kl_N,
            "p_student": np.exp(tokens[LOGP_STUDENT][keep_N]),
            "p_teacher": np.exp(tokens[LOGP_TEACHER][keep_N]),
            "entropy_student": tokens[ENTROPY_STUDENT][keep_N],
            "entropy_teacher": tokens[ENTROPY_TEACHER][keep_N],
            "position": relative_N[keep_N],
        }
        # added up in the order of the tokens
        per_type = [np.bincount(ids_N, seen[name], len(self._kl_max_V)) for name in _SUMMED]
        step_SV = torch.from_numpy(np.stack(per_type, dtype=np.float64))
        self._sum_SV += step_SV
        self._window_count_V += step_SV[0]
        self._window_kl_V += step_SV[1]
        self._keep_examples(tokens.rollouts, tokens.place_N[keep_N], ids_N, kl_N)
        self._steps += 1
        if self._steps == self._window:
            self._close_window()

    def _keep_examples(self, rollouts: Rollouts, place_N: Ints, ids_N: Ints, kl_N: Floats) -> None:
        """Where a type's maximum rises, its first such token becomes its example."""
        kl_max_V = self._kl_max_V.numpy()
        rises_M = (kl_N > kl_max_V[ids_N]).nonzero()[0]
        if not len(rises_M):
            return
        np.maximum.at(kl_max_V, ids_N[rises_M], kl_N[rises_M])
        rises_M = rises_M[kl_N[rises_M] == kl_max_V[ids_N[rises_M]]]
        types_M, first_M = np.unique(ids_N[rises_M], return_index=True)
        row_M, column_M = np.divmod(place_N[rises_M[first_M]], rollouts.source_BT.shape[1])
        column_MC = rollouts.prompt_columns + column_M[:, None] + np.arange(-BEFORE, AFTER + 1)
        ids_BL, there_BL = rollouts.ids_BL.numpy(), rollouts.attention_BL.numpy()
        inside_MC = (column_MC >= 0) & (column_MC < ids_BL.shape[1])
        column_MC = column_MC.clip(0, ids_BL.shape[1] - 1)
        inside_MC &= there_BL[row_M[:, None], column_MC]
        self._example_VC.numpy()[types_M] = np.where(inside_MC, ids_BL[row_M[:, None], column_MC], NOTHING)

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
        count_V, kl_V = self._sum_SV[:2]
        seen_V = (count_V > 0).nonzero()[:, 0]
        top_R = seen_V[kl_V[seen_V].sort(descending=True, stable=True).indices[:rows]]
        mean = dict(zip(_SUMMED, self._sum_SV[:, top_R] / count_V[top_R]))
        kl_share_R, token_share_R = kl_V[top_R] / kl_V.sum(), count_V[top_R] / count_V.sum()
        of_R = {
            "count": count_V[top_R].long(),
            "kl_mean_nats": mean["kl"],
            "kl_std_nats": (mean["kl_square"] - mean["kl"].square()).clamp(min=0).sqrt(),
            "kl_max_nats": self._kl_max_V[top_R],
            "kl_share_fraction": kl_share_R,
            "token_share_fraction": token_share_R,
            "enrichment_ratio": kl_share_R / token_share_R,
            "p_student_mean": mean["p_student"],
            "p_teacher_mean": mean["p_teacher"],
            "entropy_student_mean_nats": mean["entropy_student"],
            "entropy_teacher_mean_nats": mean["entropy_teacher"],
            "position_mean_fraction": mean["position"],
            "persistence_windows": ((self._high_V[top_R, None] >> torch.arange(WINDOWS)) & 1).sum(1),
        }
        top = top_R.tolist()
        columns = {name: value_R.tolist() for name, value_R in of_R.items()}
        examples = [tuple(ids) for ids in self._example_VC[top_R].tolist()]
        self._texts = {ids: self._texts.get(ids) or _text(decode, ids) for ids in examples}  # few are new
        return [
            {
                "rank": place,
                "id": v,
                "token": decode([v]),
                **{name: values[place] for name, values in columns.items()},
                "windows": min(self._windows, WINDOWS),
                **quadrant,
                "example": self._texts[example],
            }
            for place, (v, quadrant, example) in enumerate(zip(top, self._quadrants.columns(top), examples))
        ]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and ints only."""
        fields = {name: getattr(self, f"_{name}") for name in _STATE}
        sums = {f"sum_{name}": sum_V.clone() for name, sum_V in zip(_SUMMED, self._sum_SV)}
        return fields | sums | {"quadrants": self._quadrants.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["kl_max_V"]) != len(self._kl_max_V):
            got, want = len(state["kl_max_V"]), len(self._kl_max_V)
            raise ValueError(f"the high-loss table of the checkpoint counts {got} token types, the models have {want}")
        for name in _STATE:
            value = state[name]
            setattr(self, f"_{name}", value.clone() if isinstance(value, Tensor) else value)
        self._sum_SV = torch.stack([state[f"sum_{name}"] for name in _SUMMED])
        self._quadrants.load_state_dict(state["quadrants"])


def _text(decode: Decode, ids: tuple[int, ...]) -> str:
    """An example, its token marked."""
    parts = ids[:BEFORE], ids[BEFORE : BEFORE + 1], ids[BEFORE + 1 :]
    return "{}⟦{}⟧{}".format(*(decode([i for i in part if i != NOTHING]) for part in parts))


_SUMMED = ("count", "kl", "kl_square", "p_student", "p_teacher", "entropy_student", "entropy_teacher", "position")
_STATE = ("kl_max_V", "example_VC", "window_count_V", "window_kl_V", "high_V", "steps", "windows")
