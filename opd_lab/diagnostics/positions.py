"""Where in a response the two models disagree: a profile over ten equal stretches of each rollout."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opd_lab.types import ENTROPY_STUDENT, ENTROPY_TEACHER, REVERSE_KL, Batch

DECILES = 10


def rank_BT(mask_BT: Tensor) -> Tensor:
    """The number of generated tokens before each token of its rollout."""
    return mask_BT.cumsum(1) - mask_BT.long()


def relative_BT(mask_BT: Tensor) -> Tensor:
    """Each generated token's place in its rollout, in [0, 1); float64."""
    return rank_BT(mask_BT).double() / mask_BT.sum(1, keepdim=True).clamp(min=1)


def profile(batch: Batch) -> list[dict[str, Any]]:
    """One row per decile of the relative position that holds a token: its tokens and the means of their signals."""
    mask_BT = batch.rollouts.mask_BT
    decile_BT = DECILES * rank_BT(mask_BT) // mask_BT.sum(1, keepdim=True).clamp(min=1)
    rows = []
    for decile in range(DECILES):
        here_BT = mask_BT & (decile_BT == decile)
        row: dict[str, Any] = {"step": batch.step, "decile": decile, "tokens": int(here_BT.sum())}
        for name, signal in _SHOWN.items():
            if signal in batch.signals:
                row[name] = float(batch[signal][here_BT].double().nanmean())
        rows.append(row)
    return [row for row in rows if row["tokens"]]


_SHOWN = {
    "kl_reverse_mean_nats": REVERSE_KL,
    "entropy_student_mean_nats": ENTROPY_STUDENT,
    "entropy_teacher_mean_nats": ENTROPY_TEACHER,
}
