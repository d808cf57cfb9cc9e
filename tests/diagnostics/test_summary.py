"""The scalars of a step, worked out by hand."""

from __future__ import annotations

import pytest
import torch

from opd_lab.diagnostics.positions import absolute_profile, profile
from opd_lab.diagnostics.summary import RECORD_DUE, quantile, scalars
from opd_lab.types import LOGP_STUDENT, LOGP_TEACHER, REVERSE_KL, Batch, jsd
from tests.diagnostics.batches import NAN, listed, random_batch, rollouts_of, with_signals

ROLLOUTS = rollouts_of([[7], [7, 7]], [[1, 2, 3, 4], [5, 6]], rewards=[1.0, 0.0])
BATCH = with_signals(
    ROLLOUTS,
    {
        REVERSE_KL: torch.tensor([[1.0, 2.0, 3.0, 10.0], [0.0, 4.0, 99.0, 99.0]]),
        LOGP_STUDENT: torch.tensor([[-1.0, -1.0, -1.0, -1.0], [-1.0, -1.0, 0.0, 0.0]]),
        LOGP_TEACHER: torch.tensor([[-2.0, -2.0, -2.0, 0.0], [-1.0, NAN, 0.0, 0.0]]),
    },
)
WEIGHTS = {"opd": torch.tensor([[1.0, 1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])}


def test_all_generated_tokens_count_those_of_weight_zero_included() -> None:
    found = scalars(listed(BATCH), WEIGHTS, 0.5)
    assert found["kl/reverse_mean_nats"] == pytest.approx(20 / 6)
    assert found["kl/reverse_p50_nats"] == 2.0  # 0 1 2 | 3 4 10
    assert found["kl/reverse_p90_nats"] == found["kl/reverse_p99_nats"] == 10.0
    assert found["high_loss/kl_share_fraction"] == pytest.approx(17 / 20)  # 3 + 4 + 10
    assert found["weight/zero_fraction"] == pytest.approx(3 / 6)
    assert found["weight/effective_fraction"] == pytest.approx(16 / (6 * 6))  # (1 + 1 + 2)^2 / (6 (1 + 1 + 4))
    assert found["rollout/length_mean_tokens"] == 3.0
    assert found["rollout/truncated_fraction"] == 0.5
    assert found["rollout/reward_mean_fraction"] == 0.5


def test_a_token_without_a_score_is_left_out_and_counted() -> None:
    found = scalars(listed(BATCH), WEIGHTS, 0.5)
    assert found["teacher/unscored_fraction"] == pytest.approx(1 / 6)
    assert found["gap/mean_nats"] == pytest.approx((1 + 1 + 1 - 1 + 0) / 5)
    assert found["gap/std_nats"] == pytest.approx(((3 * 0.6**2 + 1.4**2 + 0.4**2) / 5) ** 0.5)


def test_the_jensen_shannon_divergence_is_a_yardstick_of_every_method() -> None:
    both = with_signals(ROLLOUTS, {jsd(0.5): torch.tensor([[0.1, 0.2, 0.3, 0.6], [0.0, 0.6, 9.0, 9.0]])})
    assert scalars(listed(both), WEIGHTS, 0.5)["kl/jsd_mean_nats"] == pytest.approx(1.8 / 6)
    assert jsd(0.5) in RECORD_DUE


def test_what_does_not_exist_is_absent() -> None:
    bare = Batch(rollouts_of([[7]], [[1, 2]]), {})
    found = scalars(listed(bare), {}, 0.9)
    assert set(found) == {"rollout/length_mean_tokens", "rollout/truncated_fraction"}
    nothing = with_signals(rollouts_of([[7]], [[1, 2]]), {REVERSE_KL: torch.zeros(1, 2)})
    assert "high_loss/kl_share_fraction" not in scalars(listed(nothing), {}, 0.9)


def test_quantiles_are_values_that_occur() -> None:
    values_N = torch.tensor([3.0, 1.0, 2.0, 4.0]).double()
    assert [quantile(values_N, q) for q in (0.0, 0.25, 0.5, 0.51, 1.0)] == [1, 1, 2, 3, 4]


def test_the_order_of_rollouts_changes_nothing() -> None:
    batch = random_batch(0)
    order_B = torch.tensor([3, 1, 5, 0, 2, 4])
    other = Batch(batch.rollouts.rows(order_B), {s: v[order_B] for s, v in batch.signals.items()})
    weights = {"opd": batch.rollouts.mask_BT.float()}
    found = scalars(listed(batch), weights, 0.9)
    assert scalars(listed(other), {"opd": weights["opd"][order_B]}, 0.9) == pytest.approx(found, rel=1e-12)


def test_the_profile_covers_every_token_once() -> None:
    rows = profile(listed(BATCH))
    # four tokens: deciles 0 2 5 7; two tokens: deciles 0 5
    assert [(row["decile"], row["tokens"]) for row in rows] == [(0, 2), (2, 1), (5, 2), (7, 1)]
    assert [row["kl_reverse_mean_nats"] for row in rows] == [0.5, 2.0, 3.5, 10.0]


def test_the_absolute_profile_counts_from_the_start_of_each_rollout() -> None:
    rows = absolute_profile(listed(BATCH))  # positions 0 1 2 3 and 0 1; stretches 0, 1, 2-3
    assert [(row["begin_tokens"], row["end_tokens"], row["tokens"]) for row in rows] == [
        (0, 1, 2),
        (1, 2, 2),
        (2, 4, 2),
    ]
    assert [row["kl_reverse_mean_nats"] for row in rows] == [0.5, 3.0, 6.5]


def test_a_profile_leaves_out_tokens_without_a_score() -> None:
    kl_BT = torch.tensor([[NAN, 2.0, 3.0, 10.0], [0.5, NAN, 0.0, 0.0]])
    rows = profile(listed(with_signals(ROLLOUTS, {REVERSE_KL: kl_BT})))
    assert [(row["tokens"], row["kl_reverse_mean_nats"]) for row in rows[:2]] == [(2, 0.5), (1, 2.0)]
    assert rows[2]["tokens"] == 2 and rows[2]["kl_reverse_mean_nats"] == 3.0
