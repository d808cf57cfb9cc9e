"""The one reduction, and how other denominators are made of weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from opd_lab.divergence import weighted_mean

LOSS = torch.tensor([1.0, 2, 3, 4, 5, 2, 2])  # three rollouts: (1 2 3 4) (5) (2 2)
LENGTH = torch.tensor([4.0, 4, 4, 4, 1, 2, 2])
N, B = 7, 3
KEPT = torch.tensor([0.0, 0, 0, 0, 1, 1, 1])  # the first rollout dropped: n = 3 tokens stay


@pytest.mark.parametrize(
    ("weight_N", "expected"),
    [
        pytest.param(torch.ones(7), 2.714286, id="mean-over-tokens"),
        pytest.param(N / (B * LENGTH), 3.166667, id="mean-of-rollout-means"),
        pytest.param(torch.full((7,), N / B), 6.333333, id="mean-of-rollout-sums"),
        pytest.param(KEPT, 3.0, id="dropped-tokens-leave-the-denominator"),
        pytest.param(KEPT * 3 / N, 1.285714, id="dropped-tokens-stay-in-the-denominator"),
    ],
)
def test_denominators(weight_N: Tensor, expected: float) -> None:
    value = weighted_mean(LOSS, weight_N, int((weight_N != 0).sum()))
    assert float(value) == pytest.approx(expected, abs=1e-6)


def test_micro_batches_share_the_steps_denominator() -> None:
    """One token of loss 1 and three that sum to 9: 10 / 4, not the mean of the means 1 and 3."""
    parts = [weighted_mean(loss_N, torch.ones(len(loss_N)), 4) for loss_N in (torch.ones(1), torch.full((3,), 3.0))]
    assert float(parts[0] + parts[1]) == 2.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_stands_on_a_token_of_weight_0_touches_nothing(bad: float) -> None:
    loss_N = torch.tensor([1.0, bad, 3.0], requires_grad=True)
    value = weighted_mean(loss_N, torch.tensor([1.0, 0.0, 2.0]), 2)
    value.backward()
    assert float(value.detach()) == 3.5
    assert loss_N.grad is not None
    assert loss_N.grad.tolist() == [0.5, 0.0, 1.0]


def test_a_nan_on_a_trained_token_is_not_hidden() -> None:
    assert weighted_mean(torch.tensor([1.0, math.nan]), torch.ones(2), 2).isnan()


def test_nothing_kept_is_0_and_keeps_the_graph() -> None:
    loss_N = torch.ones(3, requires_grad=True)
    value = weighted_mean(loss_N, torch.zeros(3), 0)
    value.backward()
    assert float(value.detach()) == 0.0
    assert loss_N.grad is not None
    assert loss_N.grad.tolist() == [0.0, 0.0, 0.0]
