"""Where in a response the two models disagree: over equal stretches of each rollout, and by distance from its start."""

from __future__ import annotations

from typing import Any

import numpy as np

from opd_lab.diagnostics.flat import Flat, Ints
from opd_lab.types import ENTROPY_STUDENT, ENTROPY_TEACHER, FORWARD_KL, REVERSE_KL

DECILES = 10
BEGINS = [0, *(2**i for i in range(20))]  # tokens: the absolute bins are 0, 1, 2-3, 4-7, ...; the last is open


def profile(tokens: Flat) -> list[dict[str, Any]]:
    """One row per decile of the relative position that holds a token: its tokens and the means of their signals."""
    decile_N = DECILES * tokens.rank_N // tokens.length_B[tokens.row_N]
    return [{"step": tokens.step, "decile": decile, **row} for decile, row in _rows(tokens, decile_N, DECILES)]


def absolute_profile(tokens: Flat) -> list[dict[str, Any]]:
    """One row per stretch begin <= position < end that holds a token; `end_tokens` is None in the last, open one."""
    bin_N = np.searchsorted(BEGINS, tokens.rank_N, side="right") - 1
    ends = [*BEGINS[1:], None]
    return [
        {"step": tokens.step, "begin_tokens": BEGINS[k], "end_tokens": ends[k], **row}
        for k, row in _rows(tokens, bin_N, len(BEGINS))
    ]


def _rows(tokens: Flat, bin_N: Ints, bins: int) -> list[tuple[int, dict[str, Any]]]:
    """The bins that hold a token: how many, and the means of the signals over those that have one."""
    count_K = np.bincount(bin_N, minlength=bins).tolist()
    means: dict[str, list[float]] = {}
    for name, signal in _SHOWN.items():
        if signal in tokens:
            there_N = ~np.isnan(tokens[signal])
            sum_K = np.bincount(bin_N[there_N], tokens[signal][there_N], bins)
            with np.errstate(invalid="ignore"):  # 0 / 0 = NaN
                means[name] = (sum_K / np.bincount(bin_N[there_N], minlength=bins)).tolist()
    return [
        (k, {"tokens": count_K[k], **{name: mean_K[k] for name, mean_K in means.items()}})
        for k in range(bins)
        if count_K[k]
    ]


_SHOWN = {
    "kl_reverse_mean_nats": REVERSE_KL,
    "kl_forward_mean_nats": FORWARD_KL,
    "entropy_student_mean_nats": ENTROPY_STUDENT,
    "entropy_teacher_mean_nats": ENTROPY_TEACHER,
}
