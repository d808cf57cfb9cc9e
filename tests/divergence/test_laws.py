"""What holds for any two distributions, and the edges where such formulas break."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.chunk import Chunk, Head
from opd_lab.types import TopK, topk
from tests.pair import LOGP, LOGQ, near, with_gradient

Divergence = Callable[[Tensor, Tensor], Tensor]
INF = math.inf
BETAS = (0, 0.1, 0.5, 0.9, 1)
EXACT: dict[str, Divergence] = {
    "reverse": d.reverse_kl,
    "forward": d.forward_kl,
    **{f"jsd {beta}": lambda p, q, beta=beta: d.jsd(p, q, beta) for beta in BETAS},
}
SUPPORTS = ("student", "teacher", "union", "intersection")
logits = st.lists(st.floats(-20, 20), min_size=6, max_size=6).map(lambda x: torch.tensor(x, dtype=torch.float64))
by_name = pytest.mark.parametrize("name", EXACT)
repeatable = settings(deadline=None, derandomize=True)  # a busy machine fails nothing


def on(logp_V: Tensor, logq_V: Tensor, k: int, support: str) -> TopK:
    return Chunk(torch.zeros(1, dtype=torch.long), logp_V[None], logq_V[None])[topk(k, support)]


@by_name
@given(a=logits, b=logits, shift=st.floats(-50, 50))
@repeatable
def test_a_divergence(name: str, a: Tensor, b: Tensor, shift: float) -> None:
    """Never negative, 0 at equality, deaf to a shift of the logits."""
    value = EXACT[name](a.log_softmax(-1), b.log_softmax(-1))
    assert value >= -1e-12
    assert EXACT[name](a.log_softmax(-1), a.log_softmax(-1)).abs() < 1e-12
    near(EXACT[name]((a + shift).log_softmax(-1), (b - shift).log_softmax(-1)), float(value), tolerance=1e-9)


@by_name
@given(a=logits)
@repeatable
def test_equal_models_have_no_gradient(name: str, a: Tensor) -> None:
    _, gradient_V = with_gradient(lambda logp: EXACT[name](logp, a.log_softmax(-1)[None]), a)
    assert gradient_V.abs().max() < 1e-12


@given(a=logits, b=logits, beta=st.floats(0.01, 0.99))
@repeatable
def test_jsd_is_bounded_and_mirrored(a: Tensor, b: Tensor, beta: float) -> None:
    logp_V, logq_V = a.log_softmax(-1), b.log_softmax(-1)
    value = d.jsd(logp_V, logq_V, beta)
    assert value <= -beta * math.log(beta) - (1 - beta) * math.log(1 - beta) + 1e-12
    near(d.jsd(logq_V, logp_V, 1 - beta), float(value), tolerance=1e-9)


@pytest.mark.parametrize(("beta", "bound"), [(0.25, 0.562335), (0.5, math.log(2))])
def test_jsd_of_disjoint_models_is_its_bound(beta: float, bound: float) -> None:
    near(d.jsd(torch.tensor([0.0, -INF]), torch.tensor([-INF, 0.0]), beta), bound)


@given(a=logits, b=logits, beta=st.sampled_from([1e-6, 1 - 1e-6]))
@repeatable
def test_the_kls_are_the_limits_of_jsd(a: Tensor, b: Tensor, beta: float) -> None:
    logp_V, logq_V = (a / 9).log_softmax(-1), (b / 9).log_softmax(-1)
    limit = d.forward_kl(logp_V, logq_V) if beta < 0.5 else d.reverse_kl(logp_V, logq_V)
    near(d.jsd(logp_V, logq_V, beta) / min(beta, 1 - beta), float(limit), tolerance=1e-3)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("direction", ["reverse", "forward"])
@given(a=logits, b=logits, k=st.integers(1, 5))
@settings(repeatable, max_examples=50)
def test_the_bucket_is_a_divergence_below_the_exact_one(
    support: str, direction: str, a: Tensor, b: Tensor, k: int
) -> None:
    logp_V, logq_V = a.log_softmax(-1), b.log_softmax(-1)
    value = d.topk_kl(on(logp_V, logq_V, k, support), direction=direction, tail="bucket")
    exact = EXACT[direction](logp_V, logq_V)
    assert -1e-9 <= value <= exact * (1 + 1e-9) + 1e-9


def test_a_confident_students_rest_is_not_lost_in_rounding() -> None:
    """Outside the teacher's two likeliest tokens the student has a mass of 4e-11, the teacher .3."""
    logits_V = torch.tensor([25.0, 22.0, 0.0, 0.0, 0.0])
    logq_V = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1]).log()
    value, gradient_V = with_gradient(
        lambda logp: d.topk_kl(on(logp[0], logq_V, 2, "teacher"), direction="forward", tail="bucket"), logits_V
    )
    first = 1 / (1 + math.exp(-3))
    near(value, 0.5 * math.log(0.5 / first) + 0.2 * math.log(0.2 / (1 - first)) + 0.3 * (math.log(0.1 / first) + 25))
    near(gradient_V, first - 0.5, 1 - first - 0.2, -0.1, -0.1, -0.1)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("tail", d.TAILS)
@pytest.mark.parametrize("k", [5, 99])
def test_the_whole_vocabulary_is_exact(support: str, direction: str, tail: str, k: int) -> None:
    def exact(logp_NV: Tensor) -> Tensor:
        return EXACT[direction](logp_NV, LOGQ[None])

    def on_support(logp_NV: Tensor) -> Tensor:
        return d.topk_kl(on(logp_NV[0], LOGQ, k, support), direction=direction, tail=tail)

    for got, wanted in zip(with_gradient(on_support), with_gradient(exact)):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("tail", d.TAILS)
def test_an_empty_intersection_says_nothing(direction: str, tail: str) -> None:
    """Top-1 of the student is token 0, of the teacher token 1."""
    value, gradient_V = with_gradient(
        lambda logp: d.topk_kl(on(logp[0], LOGQ, 1, "intersection"), direction=direction, tail=tail)
    )
    near(value, 0.0)
    near(gradient_V, 0.0, 0.0, 0.0, 0.0, 0.0)


@by_name
def test_tokens_that_neither_model_can_say_change_nothing(name: str) -> None:
    """A padded vocabulary: logits of -inf on both sides."""
    dead = torch.tensor([-INF, -INF], dtype=torch.float64)
    value, gradient_V = with_gradient(
        lambda logp: EXACT[name](logp, torch.cat([LOGQ, dead])[None]), torch.cat([LOGP, dead])
    )
    small, small_gradient_V = with_gradient(lambda logp: EXACT[name](logp, LOGQ[None]))
    torch.testing.assert_close(value, small)
    torch.testing.assert_close(gradient_V, torch.cat([small_gradient_V, torch.zeros(2, dtype=torch.float64)]))


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("tail", d.TAILS)
def test_topk_keeps_finite_gradients_beside_dead_tokens(support: str, direction: str, tail: str) -> None:
    dead = torch.tensor([-INF, -INF], dtype=torch.float64)
    value, gradient_V = with_gradient(
        lambda logp: d.topk_kl(on(logp[0], torch.cat([LOGQ, dead]), 6, support), direction=direction, tail=tail),
        torch.cat([LOGP, dead]),
    )
    near(value, 0.645816 if direction == "reverse" else 0.619186)
    assert gradient_V.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "expected"), [("reverse", 60.0), ("forward", 60.0), ("jsd 0.5", math.log(2))])
def test_low_temperature(dtype: torch.dtype, name: str, expected: float) -> None:
    """At T .05 the logits are 60 0 -60 20 -20 and 0 60 20 -60 40: each model is certain, of another token."""
    student_V = torch.tensor([3, 0, -3, 1, -1], dtype=dtype) / 0.05
    logq_NV = (torch.tensor([[0, 3, 1, -3, 2]], dtype=dtype) / 0.05).log_softmax(-1)
    value, gradient_V = with_gradient(lambda logp: EXACT[name](logp, logq_NV), student_V)
    near(value, expected, tolerance=1e-5)
    assert gradient_V.isfinite().all()


def test_bfloat16_models_are_compared_in_fp32() -> None:
    """Log-softmax in bf16 would give distributions that do not sum to 1, and negative divergences."""
    head = Head(torch.eye(5, dtype=torch.bfloat16))
    student_NV, teacher_NV = head.logits(LOGP[None].bfloat16()), head.logits(LOGQ[None].bfloat16())
    chunk = Chunk(torch.zeros(1, dtype=torch.long), student_NV, teacher_NV)
    assert chunk.logp_NV.dtype == torch.float32
    near(chunk.logp_NV.exp().sum(-1), 1.0)
    exact = d.jsd(LOGP.bfloat16().double().log_softmax(-1), LOGQ.bfloat16().double().log_softmax(-1), 0.5)
    near(d.jsd(chunk.logp_NV, chunk.logq_NV, 0.5), float(exact))
    near(d.jsd(chunk.logp_NV, chunk.logp_NV, 0.5), 0.0, tolerance=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_heads_give_the_logits_of_their_weights(dtype: torch.dtype) -> None:
    """Logits rounded to bf16 are off by up to .06 at 20."""
    generator = torch.Generator().manual_seed(0)
    hidden_NH, weight_VH = (torch.randn(n, 64, generator=generator).to(dtype) for n in (16, 500))
    other_NH = (hidden_NH.double() + 0.05 * torch.randn(16, 64, generator=generator)).to(dtype)
    head, exact = Head(weight_VH), Head(weight_VH.double())
    rough = [head.log_probs(h_NH) for h_NH in (hidden_NH, other_NH)]
    fine = [exact.log_probs(h_NH.double()) for h_NH in (hidden_NH, other_NH)]
    assert rough[0].dtype == torch.float32
    torch.testing.assert_close(rough[0].double(), fine[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(d.reverse_kl(*rough).double(), d.reverse_kl(*fine), atol=1e-5, rtol=1e-4)


def test_a_head_s_gradient_is_that_of_a_linear_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (5, 4), (5,))]
    ours, theirs = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
    made = Head(ours[1], ours[2]).logits(ours[0]), torch.nn.functional.linear(*theirs)
    torch.testing.assert_close(*made)
    found = [torch.autograd.grad(value.square().sum(), some) for value, some in zip(made, (ours, theirs))]
    torch.testing.assert_close(*found)
