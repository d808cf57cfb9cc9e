"""Hidden states of chosen blocks: from the right blocks and places, with exact gradients, and without any head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lab.chunk import Head, States, UndeclaredSignalError
from opd_lab.signals import objective
from opd_lab.types import REVERSE_KL, Tokens, hidden
from tests.signals.models import H, Models, N, models
from tests.tiny import HEADS, make, rollouts

KEY, OWN, THEIRS = (hidden(owner, (1, 3), "predict") for owner in ("", "student", "teacher"))
RAGGED = ([[3, 4, 5, 6], [7]], [[8, 1], [9, 10, 11]])


def mse(tokens: Tokens) -> Tensor:
    return (tokens[OWN] - tokens[THEIRS]).square().mean((1, 2))


LOSSES: dict[str, Callable[[Tokens], dict[str, Tensor]]] = {
    "hidden": lambda tokens: {"opd": mse(tokens)},
    "both": lambda tokens: {"opd": mse(tokens), "sft": tokens[REVERSE_KL]},
}
DECLARED = frozenset({OWN, THEIRS, REVERSE_KL})


def layered(n: int = N) -> tuple[Models, list[Tensor]]:
    """Models with two blocks' states each, and the leaves that a loss may reach."""
    m, generator = models(n), torch.Generator().manual_seed(5)
    own, theirs = (torch.randn(n, 2, H, generator=generator, dtype=torch.float64).requires_grad_() for _ in "st")
    m = replace(m, student=replace(m.student, layers={KEY: own}), teacher=replace(m.teacher, layers={KEY: theirs}))
    return m, [own, *m.leaves]


def run(m: Models, name: str, chunk: int = 3, **keys: Any) -> Any:
    losses = LOSSES[name]
    weights = {term: m.weights[term] for term in ("opd", "sft")[: 1 + (name == "both")]}
    return objective(losses, m.tokens, DECLARED, weights, m.kept, m.student, m.teacher, chunk=chunk, **keys)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    m, leaves = layered(5)

    def value(own: Tensor, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> Tensor:
        head = replace(m.student.head, weight_VH=weight_VH, bias_V=bias_V)
        return run(replace(m, student=States(hidden_NH, head, {KEY: own})), name, chunk=2)[0]

    assert torch.autograd.gradcheck(value, tuple(leaves), check_undefined_grad=False)


def test_value_and_gradient_of_the_plain_formula() -> None:
    m, (own, *_) = layered()
    error_N = (own - m.teacher.layers[KEY].detach()).square().mean((1, 2))
    plain = (m.weights["opd"] * error_N).sum() / m.kept["opd"]
    value, _ = run(m, "hidden")
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(torch.autograd.grad(value, own), torch.autograd.grad(plain, own))


def test_what_no_loss_looks_at_gets_no_gradient_and_is_never_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the head was projected")

    m, (own, *others) = layered()
    monkeypatch.setattr(Head, "logits", refuse)
    value, _ = run(m, "hidden")
    value.backward()
    assert own.grad is not None
    assert own.grad.abs().sum() > 0
    assert [leaf.grad for leaf in (*others, m.teacher.layers[KEY])] == [None] * 4


def test_tallies_add_up_over_the_trained_tokens_whatever_the_chunk() -> None:
    m, _ = layered()
    error_ND = (m.student.layers[KEY] - m.teacher.layers[KEY]).square().mean(1).detach()
    wanted_D = error_ND[m.weights["opd"] != 0].sum(0)

    def tally(tokens: Tokens) -> dict[str, Tensor]:
        return {"error_D": (tokens[OWN] - tokens[THEIRS]).square().mean(1).sum(0)}

    for chunk in (1, 4, 100):
        found = run(m, "hidden", chunk, tally=tally)[1].tallies["error_D"]
        assert not found.requires_grad
        torch.testing.assert_close(found, wanted_D)


def test_blocks_that_nobody_declared_are_refused() -> None:
    m, _ = layered()
    other = hidden("student", (2,), "predict")
    tokens = {"opd": m.weights["opd"]}
    with pytest.raises(UndeclaredSignalError, match="hidden"):
        objective(
            lambda t: {"opd": t[other].mean((1, 2))}, m.tokens, DECLARED, tokens, m.kept, m.student, m.teacher, chunk=3
        )


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("align", ["predict", "token"])
@pytest.mark.parametrize("kind", HEADS)
def test_states_of_blocks_are_those_of_each_rollout_alone(kind: str, align: str, extra: int) -> None:
    lm = make(kind)
    key = hidden("", (1, 2), align)
    states = lm.states(rollouts(*RAGGED, extra=extra), frozenset({key}))
    rows, logits = [], []
    for prompt, response in zip(*RAGGED):
        out = lm.module(input_ids=torch.tensor([prompt + response]), output_hidden_states=True)
        begin = len(prompt) - (align == "predict")
        inside = slice(begin, begin + len(response))
        rows.append(torch.stack([out.hidden_states[block][0, inside] for block in (1, 2)], 1))
        logits.append(out.logits[0, inside])
    torch.testing.assert_close(states.layers[key], torch.cat(rows), atol=1e-5, rtol=1e-4)
    # the last block's are taken after the final norm: the head reads them
    torch.testing.assert_close(states.head.logits(states.layers[key][:, 1]), torch.cat(logits), atol=1e-5, rtol=1e-4)


def test_both_alignments_at_once() -> None:
    lm = make()
    keys = [hidden("", (2,), align) for align in ("predict", "token")]
    states = lm.states(rollouts(*RAGGED), frozenset(keys))
    predict, token = (states.layers[key][:, 0] for key in keys)
    torch.testing.assert_close(predict, states.hidden_NH)
    torch.testing.assert_close(token[0], predict[1])  # what has read token 1 produces token 2
    torch.testing.assert_close(token[2:4], predict[3:5])
