"""Veto as its released code has it: one position late, averaged per prompt. Against the modules' own logits."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.veto import Veto
from opd_lab.models import LM
from opd_lab.parts import _states_of
from opd_lab.step import Models, accumulate_gradient, whole_batch
from opd_lab.teacher.local import LocalTeacher
from tests.tiny import make, rollouts

PROMPTS, RESPONSES = [[3, 4, 5], [7]], [[8, 9, 1], [9]]
CODE = Veto(divergence="reverse", beta0=1.2, align="token", aggregation="sequence_mean")


def student() -> LM:
    return make("llama", seed=0)


def run(method: Veto, lm: LM, extra: int = 0, micro_batch: int = 2, chunk: int = 3) -> tuple[float, Tensor]:
    """The objective, and the gradient of the head."""
    models = Models(_states_of(lm), LocalTeacher(make("llama", seed=1)))
    how = {"micro_batch": micro_batch, "chunk": chunk}
    some = rollouts(PROMPTS, RESPONSES, extra=extra)
    some = replace(some, uid_B=torch.arange(2), group_B=torch.arange(2))
    batch, views = whole_batch(method, some, models, state={}, step=0, seed=0, **how)
    lm.module.zero_grad()
    found = accumulate_gradient(method, batch, method.weights(batch), models.student, views, **how)
    grad = lm.module.lm_head.weight.grad
    assert isinstance(grad, Tensor)
    return found.objective, grad.clone()


def by_hand(lm: LM, first: int) -> Tensor:
    """Mean over rollouts of the mean over positions prompt + first, ..., prompt + first + length - 1."""
    teacher, means = make("llama", seed=1), []
    for prompt, response in zip(PROMPTS, RESPONSES):
        ids_1L = torch.tensor([prompt + response])
        here = slice(len(prompt) + first, len(prompt) + first + len(response))
        logp_TV, logq_TV = (m.module(input_ids=ids_1L).logits[0, here].log_softmax(-1) for m in (lm, teacher))
        target_TV = (logq_TV.detach() + 1.2 * logp_TV.detach()).log_softmax(-1)
        means.append(d.reverse_kl(logp_TV, target_TV).mean())
    return torch.stack(means).mean()


@pytest.mark.parametrize(("method", "first"), [(CODE, 0), (replace(CODE, align="predict"), -1)])
def test_value_and_gradient_are_those_of_the_modules_logits(method: Veto, first: int) -> None:
    """The position of the stop token is in, that of the last prompt token is out; or the other way round."""
    lm = student()
    wanted = by_hand(lm, first)
    lm.module.zero_grad()
    wanted.backward()
    wanted_VH = lm.module.lm_head.weight.grad.clone()  # pyright: ignore
    value, grad_VH = run(method, lm)
    assert value == pytest.approx(float(wanted.detach()), abs=1e-5)
    torch.testing.assert_close(grad_VH, wanted_VH, atol=1e-5, rtol=1e-4)
    padded, padded_VH = run(method, lm, extra=2, micro_batch=1, chunk=1)
    assert padded == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(padded_VH, grad_VH, atol=1e-6, rtol=1e-4)


def test_one_position_later_is_another_loss() -> None:
    lm = student()
    assert abs(float(by_hand(lm, 0).detach()) - float(by_hand(lm, -1).detach())) > 1e-3
    assert CODE.conventions()["align"] == "token" and CODE.conventions()["denominator"] == "rollouts"


def test_its_settings_warn_once_they_are_used() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Veto(beta0=1.2)
