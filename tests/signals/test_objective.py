"""The signals pass against the plain formula with all logits at once, and against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opd_lab.chunk import States
from opd_lab.signals import at
from tests.signals.models import LOSSES, SCORE, H, Loss, Models, N, models

HEADS = {
    "bare": {"bias": False, "scale": 1.0, "softcap": None},
    "scale": {"bias": False, "scale": 0.5, "softcap": None},
    "softcap": {"bias": False, "scale": 1.0, "softcap": 3.0},
    "all": {"bias": True, "scale": 0.7, "softcap": 5.0},
}
every_loss = pytest.mark.parametrize("loss", [*LOSSES.values(), SCORE], ids=[*LOSSES, "score"])
every_head = pytest.mark.parametrize("head", HEADS)


def same(got: Tensor | list[Tensor], wanted: Tensor | list[Tensor]) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@every_loss
def test_value_and_gradient_of_the_plain_formula(loss: Loss) -> None:
    m = models()
    value, _ = m.run(loss)
    plain = m.plain(loss)
    same(value, plain)
    same(m.gradients(value), m.gradients(plain))


@every_head
@pytest.mark.parametrize("loss", [LOSSES["reverse"], LOSSES["topk student forward bucket"], SCORE])
def test_every_property_of_a_head_is_honoured(head: str, loss: Loss) -> None:
    m = models(**HEADS[head])
    value, _ = m.run(loss)
    plain = m.plain(loss)
    same(value, plain)
    same(m.gradients(value), m.gradients(plain))


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    m = models(5, 7)
    leaves = tuple(leaf.detach().requires_grad_() for leaf in m.leaves)
    assert torch.autograd.gradcheck(lambda *moved: m.with_leaves(*moved).run(LOSSES[name], chunk=2)[0], leaves)


@every_head
def test_gradcheck_of_every_head(head: str) -> None:
    m = models(5, 7, **HEADS[head])
    leaves = tuple(leaf.detach().requires_grad_() for leaf in m.leaves)
    assert torch.autograd.gradcheck(lambda *moved: m.with_leaves(*moved).run(LOSSES["jsd"], chunk=2)[0], leaves)


@every_loss
@pytest.mark.parametrize("chunk", [1, 3])
def test_the_chunk_size_changes_nothing(loss: Loss, chunk: int) -> None:
    m = models()
    whole, cut = m.run(loss, chunk=1000)[0], m.run(loss, chunk=chunk)[0]
    same(cut, whole)
    same(m.gradients(cut), m.gradients(whole))


@every_loss
@pytest.mark.parametrize("parts", [2, 8])
def test_the_partition_into_micro_batches_changes_nothing(loss: Loss, parts: int) -> None:
    """One denominator, the whole step's: the micro-batches' scalars add up, whatever their lengths."""
    m = models()
    value = torch.stack([micro_batch(m, rows).run(loss, kept=m.kept)[0] for rows in torch.arange(N).chunk(parts)]).sum()
    whole = m.run(loss)[0]
    same(value, whole)
    same(m.gradients(value), m.gradients(whole))


def micro_batch(m: Models, rows: Tensor) -> Models:
    weights = {term: weight_N[rows] for term, weight_N in m.weights.items()}
    return Models(m.student.at(rows), m.teacher.at(rows), at(m.tokens, rows, {}), weights)


def test_backward_carries_the_incoming_gradient() -> None:
    m = models()
    value, _ = m.run(LOSSES["reverse"])
    same(m.gradients(-3 * value), [-3 * gradient for gradient in m.gradients(m.plain(LOSSES["reverse"]))])


@every_loss
def test_no_gradient_reaches_the_teacher(loss: Loss) -> None:
    m = models()
    head = m.teacher.head
    value, _ = m.run(loss)
    value.backward()
    assert head.bias_V is not None
    assert [leaf.grad for leaf in (m.teacher.hidden_NH, head.weight_VH, head.bias_V)] == [None] * 3
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in m.leaves)


def test_the_teacher_matters() -> None:
    m = models()
    other = replace(m, teacher=States(m.teacher.hidden_NH.flip(0), m.teacher.head))
    assert (m.run(LOSSES["reverse"])[0] - other.run(LOSSES["reverse"])[0]).abs() > 1e-3
    equal = replace(m, teacher=m.student)
    value, _ = equal.run(LOSSES["reverse"])
    same([value, *equal.gradients(value)], [torch.zeros_like(x) for x in (value, *m.leaves)])


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_costs_no_gradient(frozen: str) -> None:
    m = models()
    leaves = {"hidden": m.leaves[0], "weight": m.leaves[1], "bias": m.leaves[2]}
    leaves[frozen].requires_grad_(False)
    wanted = [leaf for name, leaf in leaves.items() if name != frozen]
    value, plain = m.run(LOSSES["reverse"])[0], m.plain(LOSSES["reverse"])
    same(list(torch.autograd.grad(value, wanted)), list(torch.autograd.grad(plain, wanted)))


def test_a_head_tied_to_the_embedding_adds_up_both_paths() -> None:
    m = models(bias=False)
    table_VH = m.leaves[1]
    mix_HH = torch.randn(H, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradient(objective: Callable[[Models], Tensor]) -> Tensor:
        tied = m.with_leaves(table_VH[m.tokens.ids_N] @ mix_HH, table_VH)
        return torch.autograd.grad(objective(tied), table_VH)[0]

    same(gradient(lambda tied: tied.run(LOSSES["reverse"])[0]), gradient(lambda tied: tied.plain(LOSSES["reverse"])))


def test_no_trained_token_gives_0_with_zero_gradients() -> None:
    m = models()
    m = replace(m, weights={term: torch.zeros(N, dtype=torch.float64) for term in m.weights})
    value, _ = m.run(LOSSES["reverse"])
    same([value, *m.gradients(value)], [torch.zeros_like(x) for x in (value, *m.leaves)])


def test_a_bfloat16_head_gets_its_gradient_added_up_in_fp32() -> None:
    """3000 tokens in 1500 chunks; a sum in bf16 would stop growing after some hundred, 14 % off."""
    m = models(3000, softcap=None, untrained=False)
    half = [leaf.detach().bfloat16().requires_grad_() for leaf in m.leaves]
    exact = m.with_leaves(*(leaf.detach().double().requires_grad_() for leaf in half))
    rough = m.with_leaves(*half)
    wanted = exact.gradients(exact.plain(LOSSES["forward"]))
    for got, gradient in zip(rough.gradients(rough.run(LOSSES["forward"], chunk=2)[0]), wanted):
        assert got.dtype == torch.bfloat16
        assert (got.double() - gradient).norm() < 0.01 * gradient.norm()
