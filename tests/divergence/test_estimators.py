"""Sampled-token estimators: exact expectations, by enumerating the vocabulary instead of sampling it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opd_lab import divergence as d
from tests.pair import LOGP, LOGQ, P, near, with_gradient

GAP = LOGP - LOGQ
REVERSE = (0.481811, -0.267793, -0.096872, 0.004733, -0.121879)
FORWARD = (0.4, -0.2, 0.0, 0.05, -0.25)
NOTHING = (0.0,) * 5
MU = torch.tensor([0.3, 0.3, 0.2, 0.1, 0.1], dtype=torch.float64)  # another sampler


def expected_gradient(loss: Callable[[Tensor], Tensor], sampler_V: Tensor = P) -> Tensor:
    """E over y ~ sampler of the gradient of loss(log p(y)), which is given all V tokens at once."""
    _, gradient_V = with_gradient(lambda logp_NV: sampler_V * loss(logp_NV[0]))
    return gradient_V


def test_values_per_token() -> None:
    near(d.k1(GAP), 1.609438, -0.693147, 0.0, 0.693147, -1.791759)
    near(d.k2(GAP), 1.295145, 0.240227, 0.0, 0.240227, 1.605201)
    near(d.k3(GAP), 0.809438, 0.306853, 0.0, 0.193147, 3.208241)


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    near(P @ d.k1(GAP), 0.645816)
    near(P @ d.k2(GAP), 0.799901)
    near(P @ d.k3(GAP), 0.645816)


@pytest.mark.parametrize(("estimator", "variance"), [(d.k1, 1.182723), (d.k2, 0.345006), (d.k3, 0.447719)])
def test_variance(estimator: Callable[[Tensor], Tensor], variance: float) -> None:
    value_V = estimator(GAP)
    near(P @ value_V.square() - (P @ value_V).square(), variance)


@pytest.mark.parametrize(
    ("back_propagated", "expected_V"),
    [
        pytest.param(lambda logp: d.score_function(logp, d.k1(logp - LOGQ)), REVERSE, id="k1-as-reward"),
        pytest.param(lambda logp: d.k1(logp - LOGQ), NOTHING, id="k1-direct-teaches-nothing"),
        pytest.param(lambda logp: d.k2(logp - LOGQ), REVERSE, id="k2-direct"),
        pytest.param(lambda logp: d.k3(logp - LOGQ), FORWARD, id="k3-direct-is-forward-kl"),
        pytest.param(
            lambda logp: d.score_function(logp, d.k3(logp - LOGQ)),
            (0.081811, -0.067793, -0.096872, -0.045267, 0.128121),
            id="k3-as-reward-is-neither-kl",
        ),
        pytest.param(
            lambda logp: d.score_function(logp, d.k2(logp - LOGQ)),
            (0.247622, -0.111935, -0.119985, -0.055967, 0.040265),
            id="k2-as-reward-is-neither-kl",
        ),
        pytest.param(
            lambda logp: d.score_function(logp, d.k3(logp - LOGQ)) + d.k3(logp - LOGQ), REVERSE, id="k3-both-ways"
        ),
        pytest.param(
            lambda logp: d.score_function(logp, d.reverse_kl(logp, LOGQ)), NOTHING, id="a-number-of-the-prefix-alone"
        ),
    ],
)
def test_expected_gradient(back_propagated: Callable[[Tensor], Tensor], expected_V: tuple[float, ...]) -> None:
    near(expected_gradient(back_propagated), *expected_V)


def test_k2_direct_is_the_score_function_token_by_token() -> None:
    logp_V = LOGP.clone().requires_grad_()
    (score_V,) = torch.autograd.grad(d.score_function(logp_V, d.k1(logp_V - LOGQ)).sum(), logp_V)
    (direct_V,) = torch.autograd.grad(d.k2(logp_V - LOGQ).sum(), logp_V)
    torch.testing.assert_close(score_V, direct_V)


def test_tokens_of_another_sampler_need_the_importance_ratio() -> None:
    def score(logp: Tensor) -> Tensor:
        return d.score_function(logp, d.k1(logp - LOGQ))

    near(expected_gradient(score, MU), 0.400318, -0.240949, -0.024754, 0.052812, -0.187427)
    near(expected_gradient(lambda logp: (logp - MU.log()).exp().detach() * score(logp), MU), *REVERSE)


@pytest.mark.parametrize(
    ("back_propagated", "variance"),
    [
        pytest.param(lambda logp: d.score_function(logp, d.k1(logp - LOGQ)), 0.432378, id="score"),
        pytest.param(lambda logp: d.k3(logp - LOGQ), 1.583375, id="k3-direct"),
    ],
)
def test_spread_of_the_gradient(back_propagated: Callable[[Tensor], Tensor], variance: float) -> None:
    """Trace of the covariance of one token's gradient."""
    gradient_VV = torch.stack([with_gradient(lambda logp, v=v: back_propagated(logp[0])[v])[1] for v in range(5)])
    mean_V = P @ gradient_VV
    near(P @ gradient_VV.square().sum(-1) - mean_V.square().sum(), variance)


def test_k3_is_never_negative() -> None:
    assert (d.k3(torch.linspace(-9, 9, 1001, dtype=torch.float64)) >= 0).all()
