"""Agreement with TRL 1.16.0 on the same hidden states and logits: loss and gradient.

TRL's `beta` is GKD's: 0 = KL(teacher || student), 1 = KL(student || teacher). `generalized_jsd_loss` divides by the
rows where no labels are given; with labels it sums over the vocabulary and divides by `num_items_in_batch`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.chunk import States
from opd_lab.types import jsd
from tests.pair import LOGP, LOGQ, near
from tests.signals.models import models, one

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytest.importorskip("trl", minversion="1.16.0")

BETAS = pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])


def trl_per_token(student: States, teacher: States, beta: float) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    s, t = student.head, teacher.head
    divergence_N, _ = ChunkedDivergenceFunction.apply(
        *(student.hidden_NH, s.weight_VH, s.bias_V, teacher.hidden_NH, t.weight_VH, t.bias_V),
        *(beta, 1.0, s.scale, s.softcap, t.scale, t.softcap),
    )
    return divergence_N


def trl_gkd_loss(*args: Any, **kwargs: Any) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(*args, **kwargs)


def fp32(states: States) -> States:
    """TRL's kernel computes in fp32."""
    head = states.head
    leaves = [None if x is None else x.detach().float().requires_grad_() for x in (head.weight_VH, head.bias_V)]
    hidden_NH = states.hidden_NH.detach().float().requires_grad_()
    return States(hidden_NH, replace(head, weight_VH=leaves[0], bias_V=leaves[1]))


@BETAS
@pytest.mark.parametrize(
    "head",
    [
        {"bias": False, "scale": 1.0, "softcap": None},
        {"bias": True, "scale": 0.7, "softcap": None},
        {"bias": True, "scale": 0.7, "softcap": 5.0},
    ],
    ids=["bare", "bias and scale", "softcap"],
)
def test_the_signals_pass_agrees_with_the_chunked_kernel(beta: float, head: dict[str, Any]) -> None:
    m = models(**head)
    m = replace(m, student=fp32(m.student), teacher=fp32(m.teacher))
    value, _ = m.run(one(lambda tokens: tokens[jsd(beta)], jsd(beta)))
    theirs = (m.weights["opd"].float() * trl_per_token(m.student, m.teacher, beta)).sum() / m.kept["opd"]
    torch.testing.assert_close(value, theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(m.gradients(value), m.gradients(theirs), atol=1e-6, rtol=0)


@BETAS
def test_the_pass_agrees_with_the_loss_of_gkd(beta: float) -> None:
    """Float64, N = 11 tokens in one row, those of weight 0 labelled -100."""
    m = models()
    m = replace(m, weights={term: (weight_N != 0).double() for term, weight_N in m.weights.items()})
    value, _ = m.run(one(lambda tokens: tokens[jsd(beta)], jsd(beta)))
    logits = [states.head.logits(states.hidden_NH)[None] for states in (m.student, m.teacher)]
    labels_1N = torch.where(m.weights["opd"] == 0, -100, m.tokens.ids_N)[None]
    theirs = trl_gkd_loss(*logits, labels=labels_1N, beta=beta, num_items_in_batch=m.kept["opd"])
    torch.testing.assert_close(value, theirs, atol=1e-12, rtol=0)
    torch.testing.assert_close(m.gradients(value), m.gradients(theirs), atol=1e-12, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
def test_every_beta_at_two_temperatures(beta: float, temperature: float) -> None:
    """Temperature divides the logits of both, without a factor T^2."""
    ours, theirs = LOGP.clone().requires_grad_(), LOGP.clone().requires_grad_()
    value = d.jsd((ours / temperature).log_softmax(-1), (LOGQ / temperature).log_softmax(-1), beta)
    labels = torch.zeros(1, 1, dtype=torch.long)
    other = trl_gkd_loss(theirs[None, None], LOGQ[None, None], labels=labels, beta=beta, temperature=temperature)
    torch.testing.assert_close(value, other, atol=1e-8, rtol=0)
    (gradient_V,), (other_V,) = torch.autograd.grad(value, ours), torch.autograd.grad(other, theirs)
    torch.testing.assert_close(gradient_V, other_V, atol=1e-8, rtol=0)


def test_what_gkd_divides_by_without_labels() -> None:
    """2 rows of 3 tokens of the pair at beta 1: three times the KL per token."""
    p_23V, q_23V = LOGP.expand(2, 3, 5), LOGQ.expand(2, 3, 5)
    near(trl_gkd_loss(p_23V, q_23V, beta=1.0), 1.937449)
    near(d.reverse_kl(p_23V, q_23V).sum() / 2, 1.937449)
    near(trl_gkd_loss(p_23V, q_23V, labels=torch.zeros(2, 3, dtype=torch.long), beta=1.0), 0.645816)
