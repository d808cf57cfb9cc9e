"""A step's report: what comes when, and what a sampled rollout says."""

from __future__ import annotations

import json
import math

import torch

from opd_lab.diagnostics import observe
from opd_lab.settings import DiagnosticsSettings
from opd_lab.types import REVERSE_KL, Batch, Report, Source
from tests.diagnostics.batches import high_loss_of, random_batch
from tests.diagnostics.test_alerts import SETTINGS as ALARMS

SETTINGS = DiagnosticsSettings(
    every=5,
    high_loss_quantile=0.9,
    high_loss_window=5,
    high_loss_rows=3,
    quadrant_windows=2,
    quadrant_high_quantile=0.8,
    quadrant_improvement_quantile=0.2,
    rollout_records=4,
    sample_rollouts=2,
    probe_rollouts=0,
    probe_shown=0,
    estimator_rollouts=0,
    estimator_topk=4,
    gradient_every=0,
    on_alarm="warn",
    alarms=ALARMS,
)


def decode(ids: list[int]) -> str:
    return "".join(chr(96 + i) for i in ids)


def report_of(batch: Batch) -> Report:
    weights = {"opd": batch.rollouts.mask_BT.float()}
    return observe(
        batch,
        weights,
        settings=SETTINGS,
        high_loss=high_loss_of(12, quantile=0.9, window=5),
        decode=decode,
        losses={"opd": batch[REVERSE_KL]},
        metrics={
            "mine/score_ratio": 2.0,
            "mine/absent_ratio": math.nan,
            "mine/many_ratio": torch.tensor([1.0, 2.0, 3.0]),
        },
    )


def test_tables_come_every_so_many_steps_and_scalars_always() -> None:
    early = report_of(random_batch(0, step=4))
    assert set(early.tables) == {"rollout_records"} and early.histograms == {}
    assert report_of(random_batch(0, step=4)).scalars["mine/score_ratio"] == 2.0
    assert "mine/absent_ratio" not in report_of(random_batch(0, step=4)).scalars
    report = report_of(random_batch(0, step=5))
    assert set(report.tables) == {
        "rollout_records",
        "positions",
        "positions_absolute",
        "high_loss_tokens",
        "rollouts",
    }
    assert report.tables["high_loss_tokens"][0]["step"] == 5
    assert len(report.tables["high_loss_tokens"]) == 3


def test_every_histogram_of_tokens_counts_every_token_once() -> None:
    batch = random_batch(0, step=5)
    tokens = int(batch.rollouts.mask_BT.sum())
    counted = {name: int(h.counts_K.sum()) for name, h in report_of(batch).histograms.items()}
    assert counted.pop("mine/many_ratio") == 3
    assert counted.pop("rollout/length_tokens") == len(batch.rollouts)
    assert set(counted.values()) == {tokens}
    assert {"kl/reverse_nats", "gap/sampled_nats", "loss/opd"} <= set(counted)


def test_a_sampled_rollout_has_a_value_for_each_of_its_tokens() -> None:
    batch = random_batch(0, step=5)
    batch.rollouts.source_BT[0, 0] = Source.GIVEN
    batch[REVERSE_KL][0, 0] = math.nan
    rows = report_of(batch).tables["rollouts"]
    assert [row["uid"] for row in rows] == [0, 1]
    for b, row in enumerate(rows):
        length = int((batch.rollouts.source_BT[b] > 0).sum())
        assert row["ids"] == batch.rollouts.response_BT[b, :length].tolist()
        assert "".join(row["tokens"]) == row["text"] == decode(row["ids"])
        assert row["prompt"] == decode(
            [i for i in batch.rollouts.ids_BL[b, : batch.rollouts.prompt_columns].tolist() if i]
        )
        for name in ("logp_student", "logp_teacher", "reverse_kl", "entropy_teacher", "weight", "loss", "source"):
            assert len(row[name]) == length
    assert rows[0]["source"][:2] == ["given", "student"]
    assert math.isnan(rows[0]["reverse_kl"][0]) and not math.isnan(rows[1]["reverse_kl"][0])
    assert json.loads(json.dumps(rows))[0]["uid"] == 0  # plain values only
