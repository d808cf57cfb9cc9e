"""Golden numbers and laws of ExOPD and Veto, on one prefix of five tokens."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from by_hand import FACTS, token_losses
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.exopd import ExOPD
from opd_lab.methods.veto import Veto
from opd_lab.types import LOGP_REFERENCE, LOGP_STUDENT, LOGP_TEACHER, Tokens

P = torch.tensor([0.50, 0.20, 0.15, 0.10, 0.05], dtype=torch.float64)
Q = torch.tensor([0.10, 0.40, 0.15, 0.05, 0.30], dtype=torch.float64)
R = torch.tensor([0.40, 0.25, 0.15, 0.15, 0.05], dtype=torch.float64)


def expected(method, **known) -> tuple[float, Tensor]:
    """Value and gradient in the student's logits, in expectation over the sampled token."""
    logits_V = P.log().requires_grad_()
    logp_NV = logits_V.log_softmax(-1).expand(5, 5)
    (loss_N,) = token_losses(method, logp_NV, Q.log()[None], range(5), logr_NV=R.log()[None], **known).values()
    value = (P * loss_N).sum()
    return float(value.detach()), torch.autograd.grad(value, logits_V)[0]


def close(got: Tensor, *want: float) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-6, rtol=0)


def test_exopd_advantage():
    signals = {LOGP_STUDENT: P.log(), LOGP_TEACHER: Q.log(), LOGP_REFERENCE: R.log()}
    zero_N = torch.zeros(5)
    got_N = ExOPD().advantage(Tokens(zero_N, zero_N, zero_N, zero_N, zero_N, signals))
    close(got_N, -1.956012, 0.810648, 0, -0.967800, 2.239699)


@pytest.mark.parametrize("base", ["sampled", "full"])
def test_exopd_gradient_is_that_of_the_full_twin(base):
    value, gradient_V = expected(ExOPD(base=base))
    close(gradient_V, 0.577670, -0.322264, -0.120101, 0.016713, -0.152019)
    if base == "full":
        assert value == pytest.approx(0.964575, abs=1e-6)
        target_V = (1.25 * Q.log() - 0.25 * R.log()).softmax(-1)
        close(target_V, 0.060021, 0.381863, 0.127324, 0.032248, 0.398544)


def test_exopd_at_one_is_reverse_kl():
    value, gradient_V = expected(ExOPD(lambda_=1.0, base="full"))
    assert value == pytest.approx(0.645816, abs=1e-6)
    close(gradient_V, 0.481811, -0.267793, -0.096872, 0.004733, -0.121879)


def test_exopd_refusals():
    with pytest.raises(ValueError, match=r"method\.lambda_ must be > 0, got 0"):
        ExOPD(lambda_=0.0)
    with pytest.raises(ValueError, match=r"model\.reference\.path to be the model the teacher was trained from"):
        ExOPD(reference="teacher_base").check(FACTS)
    with pytest.raises(ValueError, match=r"model\.reference\.path to be null, got x"):
        ExOPD().check(replace(FACTS, reference="x"))
    ExOPD(reference="teacher_base").check(replace(FACTS, reference="x"))


@pytest.mark.parametrize(
    ("divergence", "value", "gradient"),
    [
        ("forward", 0.272649, (0.256558, -0.267846, 0.010625, 0.066412, -0.065749)),
        ("reverse", 0.268050, (0.225840, -0.223575, -0.029187, 0.082294, -0.055372)),
    ],
)
def test_veto(divergence, value, gradient):
    got, gradient_V = expected(Veto(divergence=divergence))
    assert got == pytest.approx(value, abs=1e-6)
    close(gradient_V, *gradient)


def test_veto_target_and_rest_point():
    close((Q.log() + 0.8 * P.log()).softmax(-1), 0.243442, 0.467846, 0.139375, 0.033588, 0.115749)
    rest_V = (2 * Q.log()).log_softmax(-1)  # q^(1/(1-beta)) at beta .5
    close(rest_V.exp(), 0.035088, 0.561404, 0.078947, 0.008772, 0.315789)
    for divergence in ("forward", "reverse"):
        logits_V = rest_V.clone().requires_grad_()
        (loss_N,) = token_losses(
            Veto(divergence=divergence, beta0=0.5, beta1=0.5), logits_V.log_softmax(-1)[None], Q.log()[None]
        ).values()
        assert torch.autograd.grad(loss_N.sum(), logits_V)[0].abs().max() < 1e-12


def test_veto_reverse_lowers_the_entropy():
    """Its gradient is that of KL(p || q) + beta H(p)."""
    logits_V = P.log().requires_grad_()
    logp_V = logits_V.log_softmax(-1)
    law = d.reverse_kl(logp_V, Q.log()) + 0.8 * d.entropy(logp_V)
    torch.testing.assert_close(torch.autograd.grad(law, logits_V)[0], expected(Veto(divergence="reverse"))[1])


def test_veto_schedule_and_neutral():
    method = Veto(beta0=0.8, beta1=0.0, schedule_steps=4)
    assert [method.beta(step) for step in (0, 1, 2, 4, 9)] == pytest.approx([0.8, 0.6, 0.4, 0, 0])
    value, _ = expected(Veto(divergence="reverse"), step=100)
    assert value == pytest.approx(0.645816, abs=1e-6)


def test_veto_refusals_and_warning():
    with pytest.raises(ValueError, match=r"method\.beta0 must be in \[0, 2\], got 3"):
        Veto(beta0=3.0)
    with pytest.warns(UserWarning, match="single token"):
        Veto(beta0=1.2).check(FACTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Veto(beta0=0.99).check(FACTS)
    assert math.isclose(Veto().beta(0), 0.8)
