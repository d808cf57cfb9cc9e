"""What a rollout engine has sampled so far, every number at its final place; in the end the `Rollouts`."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.models import LM
from opd_lab.rollout.reader import left_padded
from opd_lab.types import ENDLESS, Rollouts, Source


class Responses:
    def __init__(self, lm: LM, rows: int, columns: int) -> None:
        self._shape, self._device, self.pad_id = (rows, columns), lm.device, lm.pad_id
        self.ids_BT = self._full(lm.pad_id, torch.long)
        self.source_BT = self._full(Source.PADDING, torch.int8)
        self.behavior_logp_BT, self.logp_BT, self.entropy_BT = (self._full(torch.nan, torch.float32) for _ in range(3))
        self.stopped_B = torch.zeros(rows, dtype=torch.bool, device=lm.device)
        self.generated_B = torch.zeros(rows, dtype=torch.long, device=lm.device)
        self.kept_B = torch.full((rows,), ENDLESS, dtype=torch.long, device=lm.device)
        self.shared_B = torch.zeros(rows, dtype=torch.long, device=lm.device)
        self.extra: dict[str, Tensor] = {}

    def _full(self, value: float, dtype: torch.dtype) -> Tensor:
        return torch.full(self._shape, value, dtype=dtype, device=self._device)

    def write(
        self,
        row_R: Tensor,
        t: int,
        ids_R: Tensor,
        behavior_RV: Tensor,
        logp_RV: Tensor,
        source_R: Tensor | None,
        on_R: Tensor,
    ) -> None:
        """Token t of the rows that are still running; without sources it is the student's. The others' padding is
        written again: nobody waits for a device to say which rows those are."""
        at_R1 = ids_R[:, None]
        source_R = torch.full_like(ids_R, int(Source.STUDENT), dtype=torch.int8) if source_R is None else source_R
        columns = (
            (self.ids_BT, ids_R, self.pad_id),
            (self.source_BT, source_R, int(Source.PADDING)),
            (self.behavior_logp_BT, behavior_RV.gather(-1, at_R1)[:, 0], torch.nan),
            (self.logp_BT, logp_RV.gather(-1, at_R1)[:, 0], torch.nan),
            (self.entropy_BT, d.entropy(logp_RV), torch.nan),
        )
        for column_BT, value_R, nothing in columns:
            column_BT[:, t].index_copy_(0, row_R, value_R.to(column_BT.dtype).masked_fill(~on_R, nothing))
        self.generated_B.index_add_(0, row_R, on_R.long())

    def give(self, b: int, ids: list[int], stopped: bool) -> None:
        """The whole of a rollout that nobody sampled: whatever is known of sampled tokens stays NaN."""
        self.ids_BT[b, : len(ids)] = torch.tensor(ids, device=self._device)
        self.source_BT[b, : len(ids)] = Source.DATASET
        self.stopped_B[b], self.generated_B[b] = stopped, len(ids)

    def note(self, name: str, row_R: Tensor, t: int, value_R: Tensor, on_R: Tensor) -> None:
        """A further column's value at token t of the rows that are still running."""
        if name not in self.extra:
            self.extra[name] = self._full(torch.nan, torch.float32)
        self.extra[name][:, t].index_copy_(0, row_R, value_R.to(torch.float32).masked_fill(~on_R, torch.nan))

    def finish(self, row_R: Tensor, stopped_R: Tensor, kept_R: Tensor | None, on_R: Tensor) -> Tensor:
        """Which running rows go on: neither at a stop id nor cut to the tokens kept, -1 where there is no cut."""
        if kept_R is not None:
            cut_R = on_R & (kept_R >= 0)
            self.kept_B.index_copy_(0, row_R, torch.where(cut_R, kept_R, self.kept_B[row_R]))
            on_R = on_R & ~cut_R
        self.stopped_B.index_copy_(0, row_R, torch.where(on_R, stopped_R, self.stopped_B[row_R]))
        return on_R & ~stopped_R

    def rollouts(
        self, prompts: list[list[int]], group_B: Tensor, uid_B: Tensor, per_row: dict[str, Tensor]
    ) -> Rollouts:
        """Everything, without the tokens that were cut off; `extra` still speaks of them."""
        device = self._device
        cut_BT = torch.arange(self._shape[1], device=device) >= self.kept_B[:, None]
        self.ids_BT[cut_BT], self.source_BT[cut_BT] = self.pad_id, Source.PADDING
        for value_BT in (self.behavior_logp_BT, self.logp_BT, self.entropy_BT):
            value_BT[cut_BT] = torch.nan
        width = int(self.generated_B.max())
        source_BT = self.source_BT[:, :width]
        prompt_BP, attention_BP = left_padded(prompts, self.pad_id, device)
        return Rollouts(
            ids_BL=torch.cat([prompt_BP, self.ids_BT[:, :width]], 1),
            attention_BL=torch.cat([attention_BP, source_BT != Source.PADDING], 1),
            source_BT=source_BT,
            behavior_logp_BT=self.behavior_logp_BT[:, :width],
            logp_BT=self.logp_BT[:, :width],
            entropy_BT=self.entropy_BT[:, :width],
            stopped_B=self.stopped_B,
            uid_B=uid_B.to(device),
            group_B=group_B.to(device),
            reward_B=torch.full((len(prompts),), torch.nan, device=device),
            extra={name: value_BT[:, :width] for name, value_BT in self.extra.items()}
            | {"shared": self.shared_B}
            | per_row,
        )
