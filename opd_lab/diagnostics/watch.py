"""What the diagnostics remember of a run: one object that the trainer feeds, asks and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from opd_lab.diagnostics import estimators, observe, probe
from opd_lab.diagnostics.alerts import Alarms
from opd_lab.diagnostics.high_loss import Decode, HighLoss, remembering
from opd_lab.diagnostics.quadrants import Quadrants
from opd_lab.models import LM
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.settings import RunSettings
from opd_lab.step import Scorer
from opd_lab.types import Batch, Report, Rollouts


class Watch:
    """Token types, alarms and the probe. `prompts` are held-out ones, `vocabulary` the number of token types."""

    def __init__(self, settings: RunSettings, prompts: list[list[int]], vocabulary: int, decode: Decode) -> None:
        self._settings, self._prompts, self._decode = settings, prompts, remembering(decode)
        d = settings.diagnostics
        quadrants = Quadrants(
            vocabulary,
            windows=d.quadrant_windows,
            high=d.quadrant_high_quantile,
            improvement=d.quadrant_improvement_quantile,
        )
        self.high_loss = HighLoss(
            vocabulary, quantile=d.high_loss_quantile, window=d.high_loss_window, quadrants=quadrants
        )
        accuracy = f"eval/validation/avg_at_{settings.evaluate.samples}"
        self.alarms = Alarms(d.alarms, accuracy, settings.optim.clip_norm or 0.0)
        self.probe: Rollouts | None = None  # off, or not begun

    def begin(self, student: LM) -> None:
        """Before the first step: the initial student writes the probe."""
        self.probe = self._sampled(student, self._settings.diagnostics.probe_rollouts)

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
            settings=self._settings.diagnostics,
            high_loss=self.high_loss,
            decode=self._decode,
            losses=losses,
            metrics=metrics,
        )

    def examine(self, report: Report, student: LM, teacher: Scorer | None) -> None:
        """Add what an evaluation tells of tokens: the probe, and the estimators. `teacher` gives full distributions."""
        d, o = self._settings.diagnostics, self._settings.optim
        how = {"chunk": o.chunk_tokens, "micro_batch": o.micro_batch}
        if self.probe is not None:
            probe.examine(report, self.probe, student, teacher, shown=d.probe_shown, decode=self._decode, **how)
        fresh = None if teacher is None else self._sampled(student, d.estimator_rollouts)
        if teacher is not None and fresh is not None:
            found = estimators.estimates(fresh, student, teacher, k=d.estimator_topk, **how)
            report.tables["estimators"] = estimators.table(report.step, found)

    def _sampled(self, student: LM, rollouts: int) -> Rollouts | None:
        """The student's own rollouts on the first held-out prompts, seeded as evaluations are."""
        e, prompts = self._settings.evaluate, self._prompts[:rollouts]
        engine = TorchEngine(e.max_tokens, self._settings.rollout.decode_rows)
        return probe.sample(engine, student, prompts, e.seed) if prompts else None

    def state_dict(self) -> dict[str, Any]:
        return {
            "high_loss": self.high_loss.state_dict(),
            "alarms": self.alarms.state_dict(),
            "probe": None if self.probe is None else probe.packed(self.probe),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.high_loss.load_state_dict(state["high_loss"])
        self.alarms.load_state_dict(state["alarms"])
        self.probe = None if state["probe"] is None else Rollouts(**state["probe"])
