"""Batch -> Report: the same questions to every method, answered from the signals recorded on the chunk.

Scalars, but for the dearest, and a row per rollout come at every step; those, histograms, the profiles over positions,
the high-loss token types and sampled rollouts with their per-token arrays at every `settings.every`-th.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from opd_lab.diagnostics.flat import flatten, gap_N
from opd_lab.diagnostics.high_loss import Decode, HighLoss
from opd_lab.diagnostics.histograms import count
from opd_lab.diagnostics.positions import absolute_profile, profile
from opd_lab.diagnostics.records import records, repeats, repetition
from opd_lab.diagnostics.samples import sample
from opd_lab.diagnostics.summary import RECORD, RECORD_DUE, ratio_BT, scalars, total_weight_BT
from opd_lab.settings import DiagnosticsSettings
from opd_lab.types import ENTROPY_STUDENT, ENTROPY_TEACHER, FORWARD_KL, RANK_TEACHER, REVERSE_KL, Batch, Report

__all__ = ["RECORD", "RECORD_DUE", "Decode", "HighLoss", "due", "observe"]


def due(step: int, every: int) -> bool:
    """Whether a step shows histograms and tables; `every` 0 = none does."""
    return every > 0 and step % every == 0


def observe(
    batch: Batch,
    weights: Mapping[str, Tensor],
    *,
    settings: DiagnosticsSettings,
    high_loss: HighLoss,
    decode: Decode,
    losses: Mapping[str, Tensor] | None = None,
    metrics: Mapping[str, float | Tensor] | None = None,
) -> Report:
    """What one step says. `weights` and `losses` have shape BT per term; `metrics` are the method's own, NaN where one
    does not exist at this step."""
    batch, metrics = _on_cpu(batch), metrics or {}
    weights, losses = ({term: v.cpu() for term, v in some.items()} for some in (weights, losses or {}))
    tokens = flatten(batch, RECORD_DUE)
    high_loss.add(tokens)
    report = Report(batch.step, scalars(tokens, weights, settings.high_loss_quantile))
    own = {name: float(value) for name, value in metrics.items() if not _is_histogram(value)}
    report.scalars |= {name: value for name, value in own.items() if not math.isnan(value)}
    counted = repeats(batch.rollouts)
    report.scalars |= repetition(counted)
    report.tables["rollout_records"] = records(tokens, counted, settings.rollout_records)
    if not due(batch.step, settings.every):
        return report
    mask_BT = batch.rollouts.mask_BT
    for name, (signal, bins) in _HISTOGRAMS.items():
        if signal in tokens:
            report.histograms[name] = count(torch.from_numpy(tokens[signal]), bins)
    report.histograms["gap/sampled_nats"] = count(torch.from_numpy(gap_N(tokens)), "gap_nats")
    report.histograms["importance/sampled_ratio"] = count(ratio_BT(batch)[mask_BT], "importance_ratio")
    report.histograms["rollout/length_tokens"] = count(batch.rollouts.length_B, "count")
    if weights:
        report.histograms["weight/total_ratio"] = count(total_weight_BT(weights)[mask_BT], "weight_ratio")
    for term, loss_BT in losses.items():
        report.histograms[f"loss/{term}"] = count(loss_BT[mask_BT], "signed")
    for name, value in metrics.items():
        if _is_histogram(value):
            report.histograms[name] = count(value, "signed")  # pyright: ignore[reportArgumentType]
    report.tables["positions"] = profile(tokens)
    report.tables["positions_absolute"] = absolute_profile(tokens)
    report.tables["high_loss_tokens"] = [
        {"step": batch.step, **row} for row in high_loss.table(decode, settings.high_loss_rows)
    ]
    report.tables["rollouts"] = sample(batch, weights, losses, decode, settings.sample_rollouts)
    if batch.shown:
        sampled = {row["uid"] for row in report.tables["rollouts"]}
        report.tables["consulted"] = [{"step": batch.step, **row} for row in batch.shown if row["uid"] in sampled]
    return report


def _on_cpu(batch: Batch) -> Batch:
    """What is looked at here, brought over once: another device would be waited for at every number."""
    if batch.rollouts.ids_BL.device.type == "cpu":
        return batch
    signals = {signal: value_BT.cpu() for signal, value_BT in batch.signals.items()}
    return replace(batch, rollouts=batch.rollouts.to("cpu"), signals=signals)


_HISTOGRAMS = {
    "kl/reverse_nats": (REVERSE_KL, "kl_nats"),
    "kl/forward_nats": (FORWARD_KL, "kl_nats"),
    "entropy/student_nats": (ENTROPY_STUDENT, "entropy_nats"),
    "entropy/teacher_nats": (ENTROPY_TEACHER, "entropy_nats"),
    "rank/teacher_tokens": (RANK_TEACHER, "count"),
}


def _is_histogram(value: float | Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
