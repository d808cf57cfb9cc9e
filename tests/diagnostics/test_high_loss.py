"""The token types that carry the divergence: equal to a naive recomputation over everything ever seen."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
import torch

from opd_lab.diagnostics.high_loss import WINDOWS
from opd_lab.types import ENTROPY_TEACHER, LOGP_TEACHER, REVERSE_KL, Batch
from tests.diagnostics.batches import NAN, high_loss_of, listed, random_batch, rollouts_of, with_signals

VOCABULARY = 12


def decode(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def occurrences(batches: list[Batch]) -> dict[int, list[dict[str, float]]]:
    """Every generated token of every batch, by type, in plain Python."""
    out: dict[int, list[dict[str, float]]] = {}
    for batch in batches:
        for b, row in enumerate(batch.rollouts.mask_BT.tolist()):
            for t in range(sum(row)):
                token = int(batch.rollouts.response_BT[b, t])
                seen = {
                    "kl": float(batch[REVERSE_KL][b, t]),
                    "p": math.exp(float(batch[LOGP_TEACHER][b, t])),
                    "entropy": float(batch[ENTROPY_TEACHER][b, t]),
                    "position": t / sum(row),
                }
                out.setdefault(token, []).append(seen)
    return out


def test_the_table_equals_a_naive_recomputation() -> None:
    batches = [random_batch(seed, VOCABULARY) for seed in range(5)]
    high_loss = high_loss_of(VOCABULARY, quantile=0.9, window=2)
    for batch in batches:
        high_loss.add(listed(batch))
    naive = occurrences(batches)
    kl_sum = sum(o["kl"] for many in naive.values() for o in many)
    tokens = sum(map(len, naive.values()))
    rows = high_loss.table(decode, VOCABULARY)
    assert {row["id"] for row in rows} == set(naive)
    for row in rows:
        many = naive[row["id"]]
        kl = [o["kl"] for o in many]
        assert row["count"] == len(many)
        assert row["kl_mean_nats"] == pytest.approx(statistics.fmean(kl), rel=1e-12)
        assert row["kl_std_nats"] == pytest.approx(statistics.pstdev(kl), rel=1e-9, abs=1e-12)
        assert row["kl_max_nats"] == max(kl)
        assert row["kl_share_fraction"] == pytest.approx(sum(kl) / kl_sum, rel=1e-12)
        assert row["enrichment_ratio"] == pytest.approx(sum(kl) / kl_sum / (len(many) / tokens), rel=1e-12)
        assert row["p_teacher_mean"] == pytest.approx(statistics.fmean(o["p"] for o in many), rel=1e-12)
        assert row["entropy_teacher_mean_nats"] == pytest.approx(
            statistics.fmean(o["entropy"] for o in many), rel=1e-12
        )
        assert row["position_mean_fraction"] == pytest.approx(statistics.fmean(o["position"] for o in many), rel=1e-12)
    assert [row["kl_share_fraction"] for row in rows] == sorted((r["kl_share_fraction"] for r in rows), reverse=True)
    assert sum(row["kl_share_fraction"] for row in rows) == pytest.approx(1)


def a_step(kl_by_token: dict[int, list[float]]) -> Batch:
    ids = [token for token, many in kl_by_token.items() for _ in many]
    kl = [value for many in kl_by_token.values() for value in many]
    return with_signals(rollouts_of([[9]], [ids]), {REVERSE_KL: torch.tensor([kl])})


def test_persistence_counts_the_windows_in_which_a_type_was_high() -> None:
    high_loss = high_loss_of(VOCABULARY, quantile=0.75, window=2)
    # A window is two steps; high are the types with the largest means that hold 1/4 of the tokens.
    for high in (True, False, True):
        high_loss.add(listed(a_step({1: [1.0] * 3, 2: [5.0 if high else 0.5]})))
        high_loss.add(listed(a_step({1: [1.0] * 3, 2: [5.0 if high else 0.5]})))
    high_loss.add(listed(a_step({1: [1.0] * 3, 2: [5.0]})))  # an open window does not count yet
    by_id = {row["id"]: row for row in high_loss.table(decode, 2)}
    assert (by_id[2]["persistence_windows"], by_id[2]["windows"]) == (2, 3)
    assert by_id[1]["persistence_windows"] == 1  # of the middle window it holds the upper 3/4, above the mean of .875


def test_a_frequent_type_can_be_high_and_equal_types_cannot() -> None:
    high_loss = high_loss_of(VOCABULARY, quantile=0.95, window=1)
    high_loss.add(listed(a_step({1: [0.1] * 5, 2: [5.0] * 5})))
    high_loss.add(listed(a_step({1: [0.5] * 5, 2: [0.5] * 5})))
    times = {row["id"]: row["persistence_windows"] for row in high_loss.table(decode, 2)}
    assert times == {1: 0, 2: 1}


def test_old_windows_are_forgotten() -> None:
    high_loss = high_loss_of(VOCABULARY, quantile=0.5, window=1)
    for step in range(WINDOWS + 5):
        high_loss.add(listed(a_step({1: [1.0] * 3, 2: [9.0 if step < 7 else 0.0]})))
    row = next(row for row in high_loss.table(decode, 2) if row["id"] == 2)
    assert (row["persistence_windows"], row["windows"]) == (2, WINDOWS)  # high in 0 ... 6, remembered from 5


def test_the_example_is_the_occurrence_with_the_largest_kl_in_its_context() -> None:
    rollouts = rollouts_of([[8, 9], [7], [6]], [[1, 2, 3], [2, 4], [2]])
    kl_BT = torch.tensor([[0.0, 1.0, 0.5], [3.0, 0.0, 0.0], [3.0, 0.0, 0.0]])  # of two equal ones, the first
    high_loss = high_loss_of(VOCABULARY, quantile=0.9, window=1)
    high_loss.add(listed(with_signals(rollouts, {REVERSE_KL: kl_BT})))
    examples = {row["id"]: row["example"] for row in high_loss.table(decode, 9)}
    assert examples[2] == "7⟦2⟧4"
    assert examples[3] == "8 9 1 2⟦3⟧"
    high_loss.add(
        listed(with_signals(rollouts, {REVERSE_KL: torch.tensor([[0.0, 2.0, 9.0], [2.0, 0.0, 0.0], [3.0] * 3])}))
    )
    assert {row["id"]: row["example"] for row in high_loss.table(decode, 9)}[2] == "7⟦2⟧4"  # 2 < 3


def test_restored_from_a_file_it_goes_on_exactly(tmp_path: Path) -> None:
    whole, first = (high_loss_of(VOCABULARY, quantile=0.9, window=3) for _ in range(2))
    for seed in range(6):
        whole.add(listed(random_batch(seed)))
    for seed in range(4):
        first.add(listed(random_batch(seed)))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second, third = (high_loss_of(VOCABULARY, quantile=0.9, window=3) for _ in range(2))
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    third.load_state_dict(first.state_dict())
    first.add(listed(random_batch(7)))  # does not reach into the copy
    for seed in (4, 5):
        second.add(listed(random_batch(seed)))
        third.add(listed(random_batch(seed)))
    assert second.table(decode, 99) == third.table(decode, 99) == whole.table(decode, 99)


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="counts 5 token types, the models have 12"):
        high_loss_of(12, quantile=0.9, window=1).load_state_dict(high_loss_of(5, quantile=0.9, window=1).state_dict())


def test_numbers_that_are_not_finite_poison_nothing() -> None:
    high_loss = high_loss_of(VOCABULARY, quantile=0.9, window=1)
    high_loss.add(listed(a_step({1: [1.0, NAN, math.inf], 2: [3.0]})))
    rows = {row["id"]: row for row in high_loss.table(decode, 9)}
    assert (rows[1]["count"], rows[1]["kl_mean_nats"], rows[2]["kl_share_fraction"]) == (1, 1.0, 0.75)
    assert rows[2]["example"] == "9 1 1 1⟦2⟧"


def test_without_a_teacher_distribution_there_is_no_table() -> None:
    high_loss = high_loss_of(VOCABULARY, quantile=0.9, window=1)
    high_loss.add(listed(Batch(rollouts_of([[1]], [[2]]), {})))
    assert high_loss.table(decode, 9) == []
