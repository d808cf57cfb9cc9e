"""REOPOLD: the floor, the law behind it, and both masks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from opd_lab.divergence import weighted_mean
from opd_lab.methods.base import TRAINED
from opd_lab.methods.reopold import Reopold, ReopoldClip
from opd_lab.types import ENTROPY_STUDENT, LOGP_STUDENT, LOGP_TEACHER, Batch
from tests.methods.by_hand import batch_of, token_losses
from tests.pair import LOGP, LOGQ, P, near, with_gradient

R, H = (-2.0, 0.5, -0.1, 0.3), (0.1, 1.2, 0.9, 0.2)


def step(method: Reopold, number: int = 0) -> Batch:
    """Four tokens in two rollouts."""

    def rows(values: Any) -> list[list[float]]:
        return [list(values[:3]), list(values[3:])]

    signals = {ENTROPY_STUDENT: rows(H)}
    if method.needs().batch > {ENTROPY_STUDENT}:
        signals |= {LOGP_STUDENT: rows([-1.0] * 4), LOGP_TEACHER: rows([r - 1.0 for r in R])}
    return batch_of(method, signals, step=number)


def coefficients(method: Reopold, number: int = 0) -> list[float]:
    """What the objective multiplies -log p(y) with, token by token."""
    batch = step(method, number)
    weight_N = method.weights(batch)[TRAINED][batch.rollouts.mask_BT].double()
    return (weight_N * torch.tensor(R, dtype=torch.float64) / (weight_N != 0).sum()).tolist()


def test_the_floor() -> None:
    assert ReopoldClip().floor == pytest.approx(-1.386294, abs=1e-6)
    assert ReopoldClip(lambda_=0.5).floor == 0
    assert ReopoldClip(lambda_=0.0).floor == -math.inf


def test_rewards_and_expected_gradient() -> None:
    loss_N = token_losses(ReopoldClip(), LOGP[None], LOGQ[None], range(5))[TRAINED]
    near(-loss_N / LOGP, -1.386294, 0.693147, 0.0, -0.693147, 1.791759)
    _, gradient_V = with_gradient(lambda logp: P * token_losses(ReopoldClip(), logp, LOGQ[None], range(5))[TRAINED])
    near(gradient_V, 0.426025, -0.245478, -0.080137, 0.015890, -0.116300)


def test_without_a_floor_it_is_plain_opd_in_expectation() -> None:
    method = ReopoldClip(lambda_=0.0)
    _, gradient_V = with_gradient(lambda logp: P * token_losses(method, logp, LOGQ[None], range(5))[TRAINED])
    near(gradient_V, 0.481811, -0.267793, -0.096872, 0.004733, -0.121879)


@pytest.mark.parametrize("lambda_", [0.05, 0.2, 0.5, 0.9])
def test_the_floor_follows_from_mixing_the_teacher_with_the_student(lambda_: float) -> None:
    floor, r_N = ReopoldClip(lambda_=lambda_).floor, torch.linspace(-30, 30, 601, dtype=torch.float64)
    mixed_N = ((1 - lambda_) * r_N.exp() + lambda_).log()
    bound_N = math.log(1 - lambda_) + r_N.clamp(min=floor)
    assert (mixed_N >= bound_N - 1e-12).all()
    torch.testing.assert_close(mixed_N[[0, -1]], bound_N[[0, -1]])


def test_refinement_keeps_the_unsure_half() -> None:
    """Quantile of H at .5: .55, between .2 and .9."""
    assert coefficients(Reopold()) == pytest.approx([0.0, 0.25, -0.05, 0.0])


def test_exploration_leaves_the_floor_out() -> None:
    method = Reopold(switch_step=5)
    assert coefficients(method, 4) == pytest.approx([0.0, 0.166667, -0.033333, 0.1], abs=1e-6)
    assert coefficients(method, 5) == coefficients(Reopold())


def test_the_whole_share_keeps_every_token() -> None:
    assert coefficients(Reopold(beta=1.0)) == pytest.approx([r / 4 for r in R])


def test_the_reduction_divides_by_the_kept_tokens() -> None:
    method = Reopold()
    batch = step(method)
    weight_N = method.weights(batch)[TRAINED][batch.rollouts.mask_BT].double()
    logp_N = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    got = weighted_mean(-torch.tensor(R, dtype=torch.float64) * logp_N, weight_N, (weight_N != 0).sum())
    near(got, -(0.25 * -2 - 0.05 * -3))


def test_metrics() -> None:
    method = Reopold(switch_step=9)
    batch = step(method)
    assert method.metrics(batch, method.weights(batch)) == {
        "reopold/floor_fraction": 0.25,
        "reopold/kept_fraction": 0.75,
    }
    late = step(Reopold())
    assert Reopold().metrics(late, Reopold().weights(late)) == {"reopold/kept_fraction": 0.5}


def test_refused() -> None:
    with pytest.raises(ValueError) as refused:
        ReopoldClip(lambda_=1.0)
    wanted = "method.lambda_ must be in [0, 1): the floor is log(lambda/(1-lambda)), got 1; use 0 for no floor"
    assert str(refused.value) == wanted
    with pytest.raises(ValueError) as refused:
        Reopold(beta=50.0)
    assert str(refused.value) == "method.beta is the fraction of tokens kept, in (0, 1], got 50; did you mean 0.5?"


def test_status() -> None:
    assert (ReopoldClip.status, Reopold.status) == ("ship", "experimental")
