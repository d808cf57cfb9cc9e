"""Rows per rollout: by hand; repetition against a naive count."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from opd_lab.diagnostics.records import records, repeats, repetition
from opd_lab.types import REVERSE_KL, Batch, Source
from tests.diagnostics.batches import NAN, listed, rollouts_of, with_signals

ROLLOUTS = rollouts_of([[7], [7, 7], [7]], [[1, 2, 1, 2, 1, 2], [5, 6], [3]], rewards=[1.0, 0.0, 1.0])


def test_by_hand() -> None:
    ROLLOUTS.source_BT[1] = torch.tensor([Source.GIVEN, Source.TEACHER, 0, 0, 0, 0])
    ROLLOUTS.source_BT[0, 5] = Source.TEACHER
    kl_BT = torch.tensor([[1.0, 2.0, 3.0, NAN, 0.0, 0.0], [9.0, 4.0, 0.0, 0.0, 0.0, 0.0], [NAN] * 6])
    batch = with_signals(replace(ROLLOUTS, uid_B=torch.tensor([12, 11, 10])), {REVERSE_KL: kl_BT}, step=3)
    counted = repeats(batch.rollouts)
    rows = records(listed(batch), counted, rows=2)  # the two smallest uids
    assert [row["uid"] for row in rows] == [10, 11]
    assert math.isnan(rows[0]["kl_mean_nats"]) and math.isnan(rows[0]["repetition_fraction"])
    assert rows[1] == pytest.approx(
        {
            "step": 3,
            "uid": 11,
            "group": 0,
            "length_tokens": 1,
            "reward": 0.0,
            "kl_mean_nats": 4.0,
            "truncated": True,
            "repetition_fraction": NAN,
            "source": "teacher",
        },
        nan_ok=True,
    )
    last = records(listed(batch), counted, rows=99)[2]
    assert (last["source"], last["length_tokens"], last["kl_mean_nats"]) == ("student+teacher", 6, pytest.approx(6 / 5))
    assert last["repetition_fraction"] == pytest.approx(1 / 3)  # 1212, 2121, 1212
    assert records(listed(batch), counted, rows=0) == []


def test_without_a_teacher_distribution_there_is_no_kl() -> None:
    assert all(math.isnan(row["kl_mean_nats"]) for row in records(listed(Batch(ROLLOUTS, {})), repeats(ROLLOUTS), 9))


@pytest.mark.parametrize("first", [0, 151_000], ids=["small vocabulary", "four ids do not fit into 64 bits"])
@pytest.mark.parametrize("seed", range(3))
def test_repetition_equals_a_naive_count(seed: int, first: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids_BT = first + torch.randint(0, 3, (6, 30), generator=generator)
    lengths = [30, 17, 4, 3, 1, 0]
    repeated, grams = [], []
    for row, n in zip(ids_BT.tolist(), lengths):
        seen = [tuple(row[t : t + 4]) for t in range(n - 3)]
        repeated.append(len(seen) - len(set(seen)))
        grams.append(len(seen))
    rollouts = rollouts_of([[1]] * 6, [row[:n] for row, n in zip(ids_BT.tolist(), lengths)])
    counted = repeats(rollouts)
    assert (counted.repeated_B.tolist(), counted.grams_B.tolist()) == (repeated, grams)
    assert repetition(counted) == {"rollout/repetition_fraction": sum(repeated) / sum(grams)}
    naive = [r / g if g else NAN for r, g in zip(repeated, grams)]
    found = [row["repetition_fraction"] for row in records(listed(Batch(rollouts, {})), counted, 6)]
    assert found == pytest.approx(naive, nan_ok=True)


def test_rollouts_of_fewer_than_four_tokens_have_no_repetition() -> None:
    counted = repeats(rollouts_of([[7]], [[1, 2, 3]]))
    assert counted.grams_B.tolist() == [0] and repetition(counted) == {}
