"""What both models say of rollouts that are finished: for evaluations, which need no gradient and no method."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_lab.chunk import measure, reads
from opd_lab.models import LM, evaluating
from opd_lab.step import Scorer
from opd_lab.types import Rollouts, Signal


@torch.no_grad()
def score(
    wanted: frozenset[Signal], rollouts: Rollouts, student: LM, teacher: Scorer | None, *, chunk: int, micro_batch: int
) -> dict[Signal, Tensor]:
    """The wanted signals of the generated tokens, shape BT, NaN elsewhere. Rollouts of similar length are scored
    together, which saves their padding. Without a teacher, `wanted` asks of the student alone."""
    out = {s: torch.full(rollouts.mask_BT.shape, torch.nan, device=rollouts.mask_BT.device) for s in wanted}
    with evaluating(student.module):
        for index_R in rollouts.length_B.argsort(stable=True).split(micro_batch):
            rows = rollouts.rows(index_R)
            mask_RT = rows.mask_BT
            view = teacher.view(rows, wanted) if teacher is not None and "teacher" in reads(wanted) else None
            seen = measure(wanted, rows.response_BT[mask_RT], student.states(rows), view, chunk=chunk)
            for signal, value_N in seen.items():
                value_RT = torch.full(mask_RT.shape, torch.nan, device=mask_RT.device)
                value_RT[mask_RT] = value_N.float()
                out[signal][index_R] = value_RT
    return out
