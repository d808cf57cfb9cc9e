"""The support of rollouts: by hand, ties, missing scores, one kind of answer."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from opd_lab.diagnostics.flat import Flat
from opd_lab.diagnostics.support import auroc, support
from opd_lab.types import LOGP_STUDENT, LOGP_TEACHER, Batch, Rollouts
from tests.diagnostics.batches import listed
from tests.tiny import rollouts

NAN = math.nan


def listed_gap(gap_BT: Tensor, some: Rollouts) -> Flat:
    return listed(Batch(some, {LOGP_STUDENT: gap_BT, LOGP_TEACHER: torch.zeros_like(gap_BT)}))


def test_by_hand() -> None:
    some = rollouts([[3]] * 4, [[4, 5, 6], [7, 1], [8], [9, 9]])
    gap_BT = torch.tensor([[1.0, 2.0, 3.0], [0.5, NAN, NAN], [NAN, NAN, NAN], [-1.0, 2.0, NAN]])
    graded = replace(some, reward_B=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    found = support(listed_gap(gap_BT, graded))  # supports -2, -.5, none, -.5
    assert found["rollout/support_mean_nats"] == pytest.approx(-1.0)
    assert found["rollout/support_reward_auroc_fraction"] == pytest.approx(0.25)  # one lost, one tied
    assert support(listed_gap(gap_BT, replace(some, reward_B=torch.ones(4)))).keys() == {"rollout/support_mean_nats"}
    assert support(listed_gap(torch.full_like(gap_BT, NAN), graded)) == {}


def test_auroc() -> None:
    one, two = np.array([1.0, 3.0]), np.array([2.0, 0.0, 3.0])
    assert auroc(one, two) == pytest.approx((1 + 2.5) / 6)
    assert auroc(two, one) == pytest.approx(1 - 3.5 / 6)
    assert auroc(one, one[:0]) is None
