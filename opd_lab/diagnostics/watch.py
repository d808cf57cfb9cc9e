"""What the diagnostics remember of a run: one object that the trainer feeds, asks and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from opd_lab.diagnostics import observe
from opd_lab.diagnostics.alerts import Alarms
from opd_lab.diagnostics.high_loss import Decode, HighLoss
from opd_lab.settings import RunSettings
from opd_lab.types import Batch, Report


class Watch:
    """Token types and alarms, over `vocabulary` token types."""

    def __init__(self, settings: RunSettings, vocabulary: int, decode: Decode) -> None:
        self._settings, self._decode = settings.diagnostics, decode
        d = settings.diagnostics
        self.high_loss = HighLoss(vocabulary, quantile=d.high_loss_quantile, window=d.high_loss_window)
        self.alarms = Alarms(d.alarms, accuracy=f"eval/validation/avg_at_{settings.evaluate.samples}")

    def observe(
        self,
        batch: Batch,
        weights: Mapping[str, Tensor],
        losses: Mapping[str, Tensor],
        metrics: Mapping[str, float | Tensor],
    ) -> Report:
        """What a step says; shapes as in `diagnostics.observe`."""
        return observe(
            batch,
            weights,
            settings=self._settings,
            high_loss=self.high_loss,
            decode=self._decode,
            losses=losses,
            metrics=metrics,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"high_loss": self.high_loss.state_dict(), "alarms": self.alarms.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.high_loss.load_state_dict(state["high_loss"])
        self.alarms.load_state_dict(state["alarms"])
