"""Divergences of the golden pair: values and gradients with respect to the student's logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.chunk import Chunk
from opd_lab.types import TopK, topk
from tests.pair import LOGP, LOGQ, P, Q, near, with_gradient

REVERSE_GRADIENT = (0.481811, -0.267793, -0.096872, 0.004733, -0.121879)


def on(logp_NV: Tensor, logq_NV: Tensor, k: int, support: str) -> TopK:
    """A support as the signals pass makes it."""
    return Chunk(torch.zeros(len(logp_NV), dtype=torch.long), logp_NV, logq_NV)[topk(k, support)]


def test_entropies() -> None:
    near(d.entropy(LOGP), 1.333074)
    near(d.entropy(LOGQ), 1.392321)


def test_reverse_kl_and_its_gradient() -> None:
    value, gradient_V = with_gradient(lambda logp: d.reverse_kl(logp, LOGQ[None]))
    near(value, 0.645816)
    near(gradient_V, *REVERSE_GRADIENT)


def test_forward_kl_and_its_gradient_p_minus_q() -> None:
    value, gradient_V = with_gradient(lambda logp: d.forward_kl(logp, LOGQ[None]))
    near(value, 0.619186)
    near(gradient_V, 0.4, -0.2, 0.0, 0.05, -0.25)


def test_forward_kl_is_cross_entropy_less_the_teachers_entropy() -> None:
    cross_entropy, gradient_V = with_gradient(lambda logp: -(Q * logp).sum(-1))
    near(cross_entropy, 2.011507)
    near(cross_entropy - d.entropy(LOGQ), 0.619186)
    near(gradient_V, 0.4, -0.2, 0.0, 0.05, -0.25)


def test_forward_kl_where_the_teacher_excludes_a_token() -> None:
    logq_V = torch.tensor([0.0, 0.5, 0.2, 0.1, 0.2], dtype=torch.float64).log()
    value, gradient_V = with_gradient(lambda logp: d.forward_kl(logp, logq_V[None]))
    near(value, 0.792941)
    near(gradient_V, 0.5, -0.3, -0.05, 0.0, -0.15)
    assert d.reverse_kl(LOGP, logq_V) == math.inf, "the student's mass there is infinitely costly, and says so"


JSD = {  # TRL 1.16.0 in float64 agrees with all of these to 1e-8
    1.0: (0.61918556, 0.05376884, 0.10872227, 0.14354357, 0.11109767, 0.05565303, 0.64581626),
    2.0: (0.16698891, 0.01488805, 0.03072345, 0.04075636, 0.03079417, 0.01493989, 0.16767113),
}


@pytest.mark.parametrize("temperature", JSD)
@pytest.mark.parametrize(("column", "beta"), [*enumerate((0, 0.1, 0.25, 0.5, 0.75, 0.9, 1))])
def test_jsd_from_forward_kl_to_reverse_kl(temperature: float, column: int, beta: float) -> None:
    logp_V, logq_V = (LOGP / temperature).log_softmax(-1), (LOGQ / temperature).log_softmax(-1)
    near(d.jsd(logp_V, logq_V, beta), JSD[temperature][column], tolerance=1e-8)


@pytest.mark.parametrize(
    ("beta", "expected_V"),
    [
        (0, (0.4, -0.2, 0.0, 0.05, -0.25)),
        (0.25, (0.068773, -0.039434, -0.004472, 0.007034, -0.0319005)),
        (0.5, (0.092594, -0.0545915, -0.010534, 0.007362, -0.034830)),
        (0.75, (0.075122, -0.043747, -0.011824, 0.003867, -0.023418)),
        (1, REVERSE_GRADIENT),
    ],
)
def test_gradient_of_jsd(beta: float, expected_V: tuple[float, ...]) -> None:
    _, gradient_V = with_gradient(lambda logp: d.jsd(logp, LOGQ[None], beta))
    near(gradient_V, *expected_V)


@pytest.mark.parametrize(
    ("beta", "scaled"), [(0.1, 0.597432), (0.25, 0.579852), (0.5, 0.574174), (0.75, 0.592521), (0.9, 0.618367)]
)
def test_jsd_by_its_curvature_runs_smoothly_between_the_kls(beta: float, scaled: float) -> None:
    near(d.jsd(LOGP, LOGQ, beta) / (beta * (1 - beta)), scaled)


TOPK = {  # k = 2, by support and direction: bucket, renormalise, truncate
    ("student", "reverse"): (0.512842, 0.615084, 0.666090),
    ("student", "forward"): (0.371728, 0.569102, 0.116315),
    ("teacher", "reverse"): (0.459001, 0.116750, -0.228217),
    ("teacher", "forward"): (0.539899, 0.134362, 0.814787),
    ("union", "reverse"): (0.632287, 0.833207, 0.576502),
    ("union", "forward"): (0.609214, 0.752765, 0.653843),
    ("intersection", "reverse"): (0.091516, 0.0, -0.138629),
    ("intersection", "forward"): (0.104650, 0.0, 0.277259),
}


@pytest.mark.parametrize(("column", "tail"), [*enumerate(d.TAILS)])
@pytest.mark.parametrize(("support", "direction"), TOPK)
def test_topk_by_support_direction_and_tail(support: str, direction: str, column: int, tail: str) -> None:
    value, _ = with_gradient(lambda logp: d.topk_kl(on(logp, LOGQ[None], 2, support), direction=direction, tail=tail))
    near(value, TOPK[support, direction][column])


@pytest.mark.parametrize(
    ("support", "direction", "tail", "expected_V"),
    [
        ("student", "reverse", "bucket", (0.548298, -0.241198, -0.153550, -0.102367, -0.051183)),
        ("student", "reverse", "truncate", (0.621674, -0.211847, -0.204913, -0.136609, -0.068304)),
        ("student", "forward", "bucket", (0.4, -0.2, -0.1, -0.066667, -0.033333)),
        ("teacher", "reverse", "bucket", (0.228645, -0.230430, 0.068594, 0.045729, -0.112538)),
        ("teacher", "forward", "bucket", (0.3, -0.2, 0.09, 0.06, -0.25)),
        ("teacher", "forward", "truncate", (0.35, -0.26, 0.105, 0.07, -0.265)),
        ("union", "reverse", "bucket", (0.488575, -0.265087, -0.061372, -0.040914, -0.121202)),
        ("intersection", "reverse", "bucket", (0.098083, -0.156933, 0.029425, 0.019617, 0.009808)),
    ],
)
def test_gradient_of_topk(support: str, direction: str, tail: str, expected_V: tuple[float, ...]) -> None:
    _, gradient_V = with_gradient(
        lambda logp: d.topk_kl(on(logp, LOGQ[None], 2, support), direction=direction, tail=tail)
    )
    near(gradient_V, *expected_V)


def at_rest(p: tuple[float, ...], direction: str, tail: str) -> tuple[float, float]:
    """Value and largest gradient of top-2 teacher (tokens 1 and 4, teacher mass .7) for another student p."""
    value, gradient_V = with_gradient(
        lambda logp: d.topk_kl(on(logp, LOGQ[None], 2, "teacher"), direction=direction, tail=tail),
        torch.tensor(p, dtype=torch.float64).log(),
    )
    return float(value), float(gradient_V.abs().max())


def test_truncated_reverse_rests_where_most_mass_has_left_the_support() -> None:
    inside, outside = 0.7 / math.e, 1 - 0.7 / math.e  # 0.257516 of the mass stays: p = q/e on the support
    p = (outside / 3, inside * 4 / 7, outside / 3, outside / 3, inside * 3 / 7)
    assert at_rest(p, "reverse", "truncate") == pytest.approx((-0.257516, 0.0), abs=1e-6)
    value, slope = at_rest(p, "reverse", "bucket")
    assert value > 0.3
    assert slope > 0.1, "the bucket pulls the mass back"


def test_truncated_forward_rests_below_zero_with_all_mass_on_the_support() -> None:
    p = (1e-9, 4 / 7, 1e-9, 1e-9, 3 / 7)
    assert at_rest(p, "forward", "truncate") == pytest.approx((0.7 * math.log(0.7), 0.0), abs=1e-6)


def test_renormalised_is_blind_to_the_mass_on_the_support() -> None:
    p = (0.3, 0.1 * 4 / 7, 0.3, 0.3, 0.1 * 3 / 7)  # right ratio, a seventh of the teacher's mass
    assert at_rest(p, "reverse", "renormalise") == pytest.approx((0.0, 0.0), abs=1e-12)
    assert at_rest(p, "forward", "renormalise") == pytest.approx((0.0, 0.0), abs=1e-12)


def test_a_truncated_term_may_be_negative_and_is_never_clamped() -> None:
    logp_NV, logq_NV = torch.tensor([[0.6, 0.4]]).log(), torch.tensor([[0.9, 0.1]]).log()
    near(d.topk_kl(on(logp_NV, logq_NV, 1, "student"), direction="reverse", tail="truncate"), -0.243279)
    near(d.reverse_kl(logp_NV, logq_NV), 0.311239)


def test_support_of_one_token() -> None:
    """S = {0}: .5 against .1, and .5 against .9 outside."""
    one = on(LOGP[None], LOGQ[None], 1, "student")
    near(d.topk_kl(one, direction="reverse", tail="bucket"), 0.5 * math.log(5) + 0.5 * math.log(5 / 9))
    near(d.topk_kl(one, direction="reverse", tail="truncate"), 0.5 * math.log(5))
    near(d.topk_kl(one, direction="reverse", tail="renormalise"), 0.0)


def test_total_variation_of_the_pair() -> None:
    near((P - Q).abs().sum() / 2, 0.45)
