"""Rows per rollout: by hand; repetition against a naive count."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from opd_lab.diagnostics.records import records, repetition_B
from opd_lab.diagnostics.summary import scalars
from opd_lab.types import REVERSE_KL, Batch, Source
from tests.diagnostics.batches import NAN, rollouts_of, with_signals

ROLLOUTS = rollouts_of([[7], [7, 7], [7]], [[1, 2, 1, 2, 1, 2], [5, 6], [3]], rewards=[1.0, 0.0, 1.0])


def test_by_hand() -> None:
    ROLLOUTS.source_BT[1] = torch.tensor([Source.GIVEN, Source.TEACHER, 0, 0, 0, 0])
    ROLLOUTS.source_BT[0, 5] = Source.TEACHER
    kl_BT = torch.tensor([[1.0, 2.0, 3.0, NAN, 0.0, 0.0], [9.0, 4.0, 0.0, 0.0, 0.0, 0.0], [NAN] * 6])
    batch = with_signals(replace(ROLLOUTS, uid_B=torch.tensor([12, 11, 10])), {REVERSE_KL: kl_BT}, step=3)
    rows = records(batch, rows=2)  # the two smallest uids
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
    last = records(batch, rows=99)[2]
    assert (last["source"], last["length_tokens"], last["kl_mean_nats"]) == ("student+teacher", 6, pytest.approx(6 / 5))
    assert last["repetition_fraction"] == pytest.approx(1 / 3)  # 1212, 2121, 1212
    assert records(batch, rows=0) == []


def test_without_a_teacher_distribution_there_is_no_kl() -> None:
    assert all(math.isnan(row["kl_mean_nats"]) for row in records(Batch(ROLLOUTS, {}), 9))


@pytest.mark.parametrize("seed", range(3))
def test_repetition_equals_a_naive_count(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(0, 3, (6, 30), generator=generator)
    lengths = [30, 17, 4, 3, 1, 0]
    mask_BT = torch.arange(30) < torch.tensor(lengths)[:, None]
    repeated, grams = [], []
    for row, n in zip(ids_BT.tolist(), lengths):
        seen = [tuple(row[t : t + 4]) for t in range(n - 3)]
        repeated.append(len(seen) - len(set(seen)))
        grams.append(len(seen))
    naive = [r / g if g else NAN for r, g in zip(repeated, grams)]
    assert repetition_B(ids_BT, mask_BT).tolist() == pytest.approx(naive, nan_ok=True)
    rollouts = rollouts_of([[1]] * 5, [row[:n] for row, n in zip(ids_BT.tolist(), lengths[:5])])
    found = scalars(Batch(rollouts, {}), {}, 0.9)["rollout/repetition_fraction"]
    assert found == pytest.approx(sum(repeated) / sum(grams))


def test_rollouts_of_fewer_than_four_tokens_have_no_repetition() -> None:
    ids_BT = torch.tensor([[1, 2, 3]])
    assert repetition_B(ids_BT, ids_BT > 0).isnan().all()
    assert "rollout/repetition_fraction" not in scalars(Batch(rollouts_of([[7]], [[1, 2, 3]]), {}), {}, 0.9)
