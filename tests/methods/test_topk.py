"""Top-k: the golden pair through the method, where gradient descent goes under each tail, the empty intersection."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lab.chunk import Chunk
from opd_lab.methods.base import TRAINED
from opd_lab.methods.topk import TopKDistillation
from opd_lab.types import LOGP_STUDENT, overlap, topk
from tests.methods.by_hand import FACTS, batch_of, token_losses, tokens_of
from tests.pair import LOGP, LOGQ, near, with_gradient

TAILS = ("bucket", "renormalise", "truncate")
VALUES = {  # k = 2: bucket, renormalise, truncate
    ("student", "reverse"): (0.512842, 0.615084, 0.666090),
    ("student", "forward"): (0.371728, 0.569102, 0.116315),
    ("teacher", "reverse"): (0.459001, 0.116750, -0.228217),
    ("teacher", "forward"): (0.539899, 0.134362, 0.814787),
    ("union", "reverse"): (0.632287, 0.833207, 0.576502),
    ("union", "forward"): (0.609214, 0.752765, 0.653843),
    ("intersection", "reverse"): (0.091516, 0.0, -0.138629),
    ("intersection", "forward"): (0.104650, 0.0, 0.277259),
}
GRADIENTS = {
    ("student", "reverse", "bucket"): (0.548298, -0.241198, -0.153550, -0.102367, -0.051183),
    ("student", "reverse", "truncate"): (0.621674, -0.211847, -0.204913, -0.136609, -0.068304),
    ("student", "forward", "bucket"): (0.4, -0.2, -0.1, -0.066667, -0.033333),
    ("teacher", "reverse", "bucket"): (0.228645, -0.230430, 0.068594, 0.045729, -0.112538),
    ("teacher", "forward", "bucket"): (0.3, -0.2, 0.09, 0.06, -0.25),
    ("teacher", "forward", "truncate"): (0.35, -0.26, 0.105, 0.07, -0.265),
    ("union", "reverse", "bucket"): (0.488575, -0.265087, -0.061372, -0.040914, -0.121202),
    ("intersection", "reverse", "bucket"): (0.098083, -0.156933, 0.029425, 0.019617, 0.009808),
}
REVERSE = (0.645816, (0.481811, -0.267793, -0.096872, 0.004733, -0.121879))


def of_pair(logits_V: Tensor = LOGP, **keys: Any) -> tuple[Tensor, Tensor]:
    method = TopKDistillation(**keys)
    return with_gradient(lambda logp_NV: token_losses(method, logp_NV, LOGQ[None])[TRAINED], logits_V)


@pytest.mark.parametrize(("column", "tail"), [*enumerate(TAILS)])
@pytest.mark.parametrize(("support", "direction"), VALUES)
def test_values(support: str, direction: str, column: int, tail: str) -> None:
    near(of_pair(k=2, support=support, direction=direction, tail=tail)[0], VALUES[support, direction][column])


@pytest.mark.parametrize(("support", "direction", "tail"), GRADIENTS)
def test_gradients(support: str, direction: str, tail: str) -> None:
    got_V = of_pair(k=2, support=support, direction=direction, tail=tail)[1]
    near(got_V, *GRADIENTS[support, direction, tail])


def test_detached_weights_have_another_gradient() -> None:
    near(of_pair(k=2, form="detached_weights")[1], 0.673820, -0.388353, -0.142733, -0.095156, -0.047578)


@pytest.mark.parametrize("k", [5, 6, 10**9])
@pytest.mark.parametrize("support", ["student", "teacher", "union", "intersection"])
@pytest.mark.parametrize("tail", TAILS)
def test_the_whole_vocabulary_is_reverse_kl_under_every_tail(tail: str, support: str, k: int) -> None:
    value, gradient_V = of_pair(k=k, support=support, tail=tail)
    near(value, REVERSE[0])
    near(gradient_V, *REVERSE[1])
    near(of_pair(k=k, support=support, form="detached_weights")[1], *REVERSE[1])


def descend(**keys: Any) -> tuple[float, float]:
    """Student mass on S = {1, 4}, and the loss, where plain gradient descent comes to rest. S is the teacher's."""
    logits_V = LOGP.clone()
    value = torch.tensor(math.nan)
    for _ in range(20000):
        value, gradient_V = of_pair(logits_V, k=2, support="teacher", **keys)
        if gradient_V.abs().max() < 1e-8:
            break
        logits_V = logits_V - 2.0 * gradient_V
    p_V = logits_V.softmax(-1)
    return float(p_V[1] + p_V[4]), float(value)


@pytest.mark.parametrize(
    ("tail", "mass", "value"), [("bucket", 0.7, 0.0), ("renormalise", 0.212245, 0.0), ("truncate", 0.257516, -0.257516)]
)
def test_where_gradient_descent_goes(tail: str, mass: float, value: float) -> None:
    assert descend(tail=tail) == pytest.approx((mass, value), abs=2e-5 if tail == "renormalise" else 1e-6)


def test_truncated_forward_kl_goes_below_zero_with_all_mass_on_the_support() -> None:
    rest_V = torch.tensor([1e-9, 4 / 7, 1e-9, 1e-9, 3 / 7], dtype=torch.float64).log()
    value, gradient_V = of_pair(rest_V, k=2, support="teacher", direction="forward", tail="truncate")
    near(value, 0.7 * math.log(0.7))
    near(value, -0.249672)
    assert gradient_V.abs().max() < 1e-8


def test_a_negative_value_keeps_its_gradient() -> None:
    """Student (.6, .4), teacher (.9, .1), k 1: -.243279, and d/dz = p (1 - p) (log p - log q + 1)."""
    method = TopKDistillation(k=1, tail="truncate")
    logits_V, logq_V = (torch.tensor(x, dtype=torch.float64).log() for x in ([0.6, 0.4], [0.9, 0.1]))
    value, gradient_V = with_gradient(lambda logp: token_losses(method, logp, logq_V[None])[TRAINED], logits_V)
    near(value, -0.243279)
    slope = 0.24 * (math.log(0.6 / 0.9) + 1)
    near(gradient_V, slope, -slope)


def test_an_empty_intersection_has_no_weight_and_is_counted() -> None:
    """Three tokens, one without a shared top token."""
    method = TopKDistillation(k=1, support="intersection")
    batch = batch_of(method, {overlap(1): [[1.0, 0.0], [1.0]]})
    weights = method.weights(batch)
    assert weights[TRAINED].tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert method.metrics(batch, weights) == {"overlap/empty_fraction": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("tail", "negative"), [("bucket", {}), ("truncate", {"topk/truncated_negative_fraction": 0.5})]
)
def test_the_mass_on_the_support_is_reported(tail: str, negative: dict[str, float]) -> None:
    """The pair, S = {1, 4}: p .25, q .7, truncated -.228; then the models swapped, S = {0, 1}: .5, .7, above 0."""
    method = TopKDistillation(k=2, support="teacher", tail=tail)
    logp_NV, logq_NV = torch.stack([LOGP, LOGQ]), torch.stack([LOGQ, LOGP])
    tokens = tokens_of(method, logp_NV, logq_NV, [0, 0])
    batch = replace(batch_of(method, {LOGP_STUDENT: [[-1.0, -1.0]]}), tallies=method.tally(tokens))
    assert method.losses(tokens)[TRAINED][1] > 0
    wanted = {"topk/student_mass_fraction": (0.25 + 0.5) / 2, "topk/teacher_mass_fraction": 0.7} | negative
    assert method.metrics(batch, {}) == pytest.approx(wanted)


@pytest.mark.parametrize("form", ["direct", "detached_weights"])
def test_an_empty_intersection_costs_nothing(form: str) -> None:
    value, gradient_V = of_pair(k=1, support="intersection", form=form)
    assert Chunk(torch.tensor([0]), LOGP[None], LOGQ[None])[overlap(1)] == 0, "likeliest: token 0 and token 1"
    assert value == 0
    assert (gradient_V == 0).all()


@pytest.mark.parametrize("form", ["direct", "detached_weights"])
def test_a_token_that_both_models_exclude_is_nothing(form: str) -> None:
    p_V, q_V = (torch.tensor(x, dtype=torch.float64).log() for x in ([0.6, 0.4, 0.0], [0.9, 0.1, 0.0]))
    method = TopKDistillation(k=3, form=form)
    _, gradient_V = with_gradient(lambda logp: token_losses(method, logp, q_V[None])[TRAINED], p_V)
    slope = 0.24 * (math.log(0.6 / 0.9) - math.log(0.4 / 0.1))
    near(gradient_V, slope, -slope, 0.0)


def test_only_the_intersection_looks_at_the_step_before() -> None:
    assert TopKDistillation(k=3).needs().tokens == {topk(3, "student")}
    assert not TopKDistillation().needs().batch
    assert TopKDistillation(k=3, support="intersection").needs().batch == {overlap(3)}


def test_ranges() -> None:
    with pytest.raises(ValueError) as refused:
        TopKDistillation(k=0).check(FACTS)
    assert str(refused.value) == "method.k must be between 1 and the vocabulary size 151936, got 0"
    TopKDistillation(k=99).check(replace(FACTS, vocabulary=13))  # the whole vocabulary
    with pytest.raises(ValueError, match=r"method.tail must be one of bucket, renormalise, truncate, got drop"):
        TopKDistillation(tail="drop")
    with pytest.raises(
        ValueError, match=r"method.form detached_weights is a form of reverse KL, got direction forward"
    ):
        TopKDistillation(form="detached_weights", direction="forward")


def test_conventions_tell_the_tails_apart() -> None:
    tags = [TopKDistillation(tail=tail).conventions() for tail in TAILS]
    tags += [TopKDistillation(k=8).conventions(), TopKDistillation(form="detached_weights").conventions()]
    assert len({tuple(tag.items()) for tag in tags}) == len(tags)


def test_what_misleads_says_so() -> None:
    methods = {tail: TopKDistillation(tail=tail) for tail in TAILS}
    assert [method.status for method in methods.values()] == ["ship", "control", "control"]
    assert [tail for tail, method in methods.items() if method.not_zero_at_teacher] == ["truncate"]
    assert TopKDistillation(tail="truncate", form="detached_weights").not_zero_at_teacher is None


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("tail", TAILS)
def test_equal_models(tail: str, direction: str) -> None:
    """Truncated, the gradient is +-(p on S - p(S) p): the border moves though nothing is left to learn."""
    method = TopKDistillation(k=2, tail=tail, direction=direction)
    value, gradient_V = with_gradient(lambda logp: token_losses(method, logp, LOGP[None])[TRAINED])
    near(value, 0.0)
    border = torch.tensor([0.15, 0.06, -0.105, -0.07, -0.035], dtype=torch.float64)  # S = {0, 1}, p(S) = .7
    sign = {"reverse": 1, "forward": -1}[direction] if tail == "truncate" else 0
    near(gradient_V, *(sign * border).tolist())
