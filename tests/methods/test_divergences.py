"""Forward KL and the generalised JSD: the golden pair through the methods, and what `scale` does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from opd_lab.methods.base import TRAINED, Method
from opd_lab.methods.divergences import JSD, ForwardKL
from tests.methods.by_hand import token_losses
from tests.pair import LOGP, LOGQ, near, with_gradient

FORWARD = (0.619186, (0.4, -0.2, 0.0, 0.05, -0.25))
REVERSE = (0.645816, (0.481811, -0.267793, -0.096872, 0.004733, -0.121879))


def of_pair(method: Method, logits_V: Tensor = LOGP, logq_V: Tensor = LOGQ) -> tuple[Tensor, Tensor]:
    return with_gradient(lambda logp_NV: token_losses(method, logp_NV, logq_V[None])[TRAINED], logits_V)


@pytest.mark.parametrize(
    ("method", "value", "gradient_V"),
    [
        pytest.param(ForwardKL(), *FORWARD, id="forward"),
        pytest.param(JSD(beta=0), *FORWARD, id="beta 0"),
        pytest.param(JSD(beta=1), *REVERSE, id="beta 1"),
        pytest.param(JSD(beta=0, scale="unit"), *FORWARD, id="unit 0"),
        pytest.param(JSD(beta=1, scale="unit"), *REVERSE, id="unit 1"),
        pytest.param(JSD(beta=0.25), 0.10872227, (0.068773, -0.039434, -0.004472, 0.007034, -0.0319005), id=".25"),
        pytest.param(JSD(beta=0.5), 0.14354357, (0.092594, -0.0545915, -0.010534, 0.007362, -0.034830), id=".5"),
        pytest.param(JSD(beta=0.75), 0.11109767, (0.075122, -0.043747, -0.011824, 0.003867, -0.023418), id=".75"),
    ],
)
def test_value_and_gradient(method: Method, value: float, gradient_V: tuple[float, ...]) -> None:
    got, got_V = of_pair(method)
    near(got, value)
    near(got_V, *gradient_V)


@pytest.mark.parametrize(("beta", "value"), [(0.1, 0.05376884), (0.9, 0.05565303)])
def test_values_near_the_ends(beta: float, value: float) -> None:
    near(of_pair(JSD(beta=beta))[0], value, tolerance=1e-8)


@pytest.mark.parametrize(
    ("beta", "value"), [(0.1, 0.597432), (0.25, 0.579852), (0.5, 0.574174), (0.75, 0.592521), (0.9, 0.618367)]
)
def test_unit_scale_runs_from_one_kl_to_the_other(beta: float, value: float) -> None:
    near(of_pair(JSD(beta=beta, scale="unit"))[0], value)


@pytest.mark.parametrize(("beta", "end"), [(1e-6, 0.619186), (1 - 1e-6, 0.645816)])
def test_unit_scale_has_no_jump_at_its_ends(beta: float, end: float) -> None:
    near(of_pair(JSD(beta=beta, scale="unit"))[0], end, tolerance=1e-5)


def test_the_papers_scale_jumps_elevenfold_before_forward_kl() -> None:
    assert of_pair(JSD(beta=0))[0] / of_pair(JSD(beta=0.1))[0] == pytest.approx(11.52, abs=0.01)


@pytest.mark.parametrize("beta", [0.25, 0.5])
def test_jsd_is_bounded_where_reverse_kl_is_not(beta: float) -> None:
    """Logits twenty times steeper: disjoint, so the JSD is at its bound, and its gradient finite."""
    p_V, q_V = torch.tensor([3.0, 0, -3, 1, -1]).double() / 0.05, torch.tensor([0.0, 3, 1, -3, 2]).double() / 0.05
    value, gradient_V = of_pair(JSD(beta=beta), p_V, q_V.log_softmax(-1))
    assert value == pytest.approx(-beta * math.log(beta) - (1 - beta) * math.log(1 - beta), abs=1e-6)
    assert gradient_V.isfinite().all()


@pytest.mark.parametrize("beta", [-0.1, 1.5])
def test_beta_outside_its_range_is_refused_with_the_convention(beta: float) -> None:
    with pytest.raises(ValueError) as refused:
        JSD(beta=beta)
    wanted = f"method.beta must be in [0, 1] (GKD convention: 0 = forward KL, 1 = reverse KL), got {beta:g}"
    assert str(refused.value) == wanted


def test_scale_is_a_choice() -> None:
    with pytest.raises(ValueError, match=r"method.scale must be one of paper, unit, got trl"):
        JSD(scale="trl")


def test_unlike_losses_are_told_apart() -> None:
    methods = [ForwardKL(), JSD(beta=0.25), JSD(beta=0.75), JSD(beta=0.75, scale="unit"), JSD(beta=1)]
    assert len({method.conventions()["divergence"] for method in methods}) == len(methods)
    assert JSD(beta=0).conventions()["divergence"] == ForwardKL().conventions()["divergence"]
