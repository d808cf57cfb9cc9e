"""Sampled-token policy gradients: rewards, the baseline, and the discount, exactly, by enumeration."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lab.methods.base import TRAINED
from opd_lab.methods.opd_sampled import OPDSampled
from opd_lab.methods.sampled import Sampled, returns
from opd_lab.types import LOGP_STUDENT, LOGP_TEACHER
from tests.methods.by_hand import batch_of, token_losses
from tests.pair import LOGP, LOGQ, P, near, with_gradient

REVERSE = (0.481811, -0.267793, -0.096872, 0.004733, -0.121879)
FORWARD = (0.4, -0.2, 0.0, 0.05, -0.25)
MU = torch.tensor([0.3, 0.3, 0.2, 0.1, 0.1], dtype=torch.float64)  # another sampler
ALL = range(5)


def losses(method: OPDSampled, logp_NV: Tensor, mu_V: Tensor = P) -> Tensor:
    """Of each of the five tokens, were it the one that was drawn."""
    return token_losses(method, logp_NV, LOGQ[None], ALL, behavior_logp_N=mu_V.log())[TRAINED]


def expected_gradient(mu_V: Tensor = P, **keys: Any) -> Tensor:
    return with_gradient(lambda logp_NV: mu_V * losses(Sampled(**keys), logp_NV, mu_V))[1]


def spread(**keys: Any) -> float:
    """Trace of the covariance of one token's gradient."""
    one = [with_gradient(lambda logp, v=v: losses(Sampled(**keys), logp)[v])[1] for v in ALL]
    gradient_VV = torch.stack(one)
    return float(P @ gradient_VV.square().sum(-1) - (P @ gradient_VV).square().sum())


@pytest.mark.parametrize(
    ("keys", "expected_V"),
    [
        ({}, REVERSE),
        ({"estimator": "k2", "form": "direct"}, REVERSE),
        ({"estimator": "k3", "form": "direct"}, FORWARD),
        ({"baseline": "exact_kl"}, REVERSE),
        ({"reward": "clip"}, REVERSE),
        ({"reward": "power"}, (0.008862, -0.004687, -0.002027, -0.001351, -0.000797)),
        ({"reward": "power", "power": 1.0}, (0.12375, -0.0705, -0.022875, -0.01025, -0.020125)),
    ],
)
def test_expected_gradient(keys: dict[str, Any], expected_V: tuple[float, ...]) -> None:
    near(expected_gradient(**keys), *expected_V)


def test_power_reward_by_hand() -> None:
    near(Sampled(reward="power").rewarded(LOGP, LOGQ), -0.031240, 0.009920, 0.0, -0.0000097, 0.002430)


def test_power_reward_divided_by_its_power_tends_to_the_log_ratio() -> None:
    small = Sampled(reward="power", power=1e-7, power_scale="unit")
    near(small.rewarded(LOGP, LOGQ), *(LOGQ - LOGP).tolist())
    near(expected_gradient(reward="power", power=1e-7, power_scale="unit"), *REVERSE)


def test_bounded_rewards_by_hand() -> None:
    """R = -ln 5, ln 2, 0, -ln 2, ln 6."""
    near(Sampled(reward="clip", reward_bound=1.0).rewarded(LOGP, LOGQ), -1.0, math.log(2), 0.0, -math.log(2), 1.0)
    near(
        Sampled(reward="tanh").rewarded(LOGP, LOGQ),
        *(math.tanh(r / 5) for r in (-math.log(5), math.log(2), 0, -math.log(2), math.log(6))),
    )
    without_bound = Sampled(reward="clip", reward_bound=math.inf)
    assert torch.equal(without_bound.rewarded(LOGP, LOGQ), LOGQ - LOGP)


def test_a_baseline_may_raise_the_variance() -> None:
    assert spread() == pytest.approx(0.432378, abs=1e-6)
    assert spread(baseline="exact_kl") == pytest.approx(0.582760, abs=1e-6)
    assert spread(estimator="k3", form="direct") == pytest.approx(1.583375, abs=1e-6)


def test_plain_settings_are_opd_sampled() -> None:
    assert torch.equal(losses(Sampled(), LOGP[None]), losses(OPDSampled(), LOGP[None]))


def test_another_sampler() -> None:
    near(expected_gradient(MU), 0.400318, -0.240949, -0.024754, 0.052812, -0.187427)
    near(expected_gradient(MU, importance="token"), *REVERSE)
    near(expected_gradient(MU, importance="token", baseline="exact_kl"), *REVERSE)


# two steps of two tokens; the second prefix depends on the first token
P1, Q1 = (0.6, 0.4), (0.5, 0.5)
P2, Q2 = {0: (0.7, 0.3), 1: (0.5, 0.5)}, {0: (0.2, 0.8), 1: (0.5, 0.5)}


def sequence_gradient(discount: float) -> tuple[Tensor, Tensor]:
    """E over the four sequences of the gradient, with respect to the logits of step 1 and of step 2 after token a."""
    method = Sampled(discount=discount)
    z1, z2 = (torch.tensor(x, dtype=torch.float64).log().requires_grad_() for x in (P1, P2[0]))
    after = {0: z2, 1: torch.tensor(P2[1], dtype=torch.float64).log()}
    total = torch.zeros((), dtype=torch.float64)
    for y in itertools.product((0, 1), repeat=2):
        logp = torch.stack([z1.log_softmax(-1), after[y[0]].log_softmax(-1)])
        logq = torch.tensor([Q1, Q2[y[0]]], dtype=torch.float64).log()
        row = {LOGP_STUDENT: [logp[t, v].item() for t, v in enumerate(y)]}
        row |= {LOGP_TEACHER: [logq[t, v].item() for t, v in enumerate(y)]}
        batch = batch_of(method, {signal: [values] for signal, values in row.items()})
        consulted = {name: value[0] for name, value in batch.consulted.items()}
        probability = math.exp(sum(row[LOGP_STUDENT]))
        total = total + probability * token_losses(method, logp, logq, y, consulted=consulted)[TRAINED].sum()
    return torch.autograd.grad(total, (z1, z2))


@pytest.mark.parametrize(("discount", "slope"), [(0.0, 0.097312), (0.5, 0.167234), (1.0, 0.237156)])
def test_discount(discount: float, slope: float) -> None:
    first_V, second_V = sequence_gradient(discount)
    near(first_V, slope, -slope)
    near(second_V, 0.281433, -0.281433)


def test_discount_one_is_the_gradient_of_the_sequence_kl() -> None:
    z1, z2 = (torch.tensor(x, dtype=torch.float64).log().requires_grad_() for x in (P1, P2[0]))
    logp1, logp2 = z1.log_softmax(-1), z2.log_softmax(-1)
    kl1 = (logp1.exp() * (logp1 - torch.tensor(Q1, dtype=torch.float64).log())).sum()
    kl2 = (logp2.exp() * (logp2 - torch.tensor(Q2[0], dtype=torch.float64).log())).sum()  # after token b it is 0
    sequence_kl = kl1 + logp1[0].exp() * kl2
    near(sequence_kl, 0.369747)
    for ours, exact in zip(sequence_gradient(1.0), torch.autograd.grad(sequence_kl, (z1, z2))):
        torch.testing.assert_close(ours, exact, atol=1e-12, rtol=0)


def test_a_baseline_leaves_the_discounted_gradient_as_it_is() -> None:
    """It is added at the token alone: later prefixes depend on the token, so their KL is no constant."""
    method = Sampled(discount=0.5, baseline="exact_kl")
    batch = batch_of(method, {LOGP_STUDENT: [[-1.0, -2.0]], LOGP_TEACHER: [[-1.5, -1.0]]})
    near(batch.consulted["advantage"], -0.5 + 0.5 * 1.0, 1.0)


def test_returns_end_with_the_rollout() -> None:
    reward_BT = torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    assert returns(reward_BT, 0.5).tolist() == [[3.0, 4.0, 4.0], [3.0, 0.0, 0.0]]
    assert returns(reward_BT, 1.0).tolist() == [[7.0, 6.0, 4.0], [3.0, 0.0, 0.0]]
    assert returns(reward_BT, 0.0) is reward_BT


def test_zscore_over_the_step() -> None:
    """R = 1, -1, 3: mean 1, variance (0 + 4 + 4) / 3."""
    method = Sampled(reward="zscore")
    batch = batch_of(method, {LOGP_STUDENT: [[-2.0, -1.0], [-4.0]], LOGP_TEACHER: [[-1.0, -2.0], [-1.0]]})
    got_N = batch.consulted["advantage"][batch.rollouts.mask_BT]
    near(got_N, 0.0, -2 / math.sqrt(8 / 3), 2 / math.sqrt(8 / 3))


def test_zscore_of_equal_rewards_is_zero() -> None:
    batch = batch_of(Sampled(reward="zscore"), {LOGP_STUDENT: [[-2.0], [-1.0]], LOGP_TEACHER: [[-2.0], [-1.0]]})
    assert batch.consulted["advantage"].tolist() == [[0.0], [0.0]]
    assert Sampled(reward="zscore").not_zero_at_teacher, "rounding is standardised too"
    assert Sampled().not_zero_at_teacher is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"form": "direct"}, "k1 with form direct cannot teach: its expected gradient is zero; use form score"),
        ({"estimator": "k3"}, "k3 as a reward is biased"),
        ({"estimator": "k2", "form": "direct", "discount": 1.0}, "reward log, baseline none and discount 0, got log, "),
        ({"reward": "exp"}, "method.reward must be one of log, clip, tanh, zscore, power, got exp"),
        ({"power": 0.0}, "method.power must be above 0, got 0"),
        ({"reward_bound": 0.0}, "method.reward_bound must be above 0 nats, got 0"),
        ({"discount": 1.5}, r"method.discount must be in \[0, 1\], got 1.5"),
        ({"baseline": "mean"}, "method.baseline must be one of none, exact_kl, got mean"),
        ({"power_scale": "on"}, "method.power_scale must be one of paper, unit, got on"),
    ],
)
def test_what_cannot_work_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampled(**keys)


def test_unlike_losses_are_told_apart() -> None:
    methods = [Sampled(), Sampled(reward="power"), Sampled(discount=1.0), Sampled(discount=0.5)]
    methods += [Sampled(reward="clip"), Sampled(estimator="k3", form="direct")]
    assert len({method.conventions()["divergence"] for method in methods}) == len(methods)
