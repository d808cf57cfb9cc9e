"""TrOPD on one prefix: the golden numbers of its three terms, by enumeration of the sampled token and of its coin."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.tropd import TrOPD, acceptance
from opd_lab.types import LOGP_STUDENT, LOGP_TEACHER, Batch
from tests.methods.by_hand import batch_of, token_losses
from tests.pair import LOGP, LOGQ, P, Q, near, with_gradient

TRUST = (0.177252, -0.132106, 0.004892, 0.037919, -0.087957)
FKL = (0.35, -0.26, 0.105, 0.07, -0.265)
K1 = (0.481811, -0.267793, -0.096872, 0.004733, -0.121879)


def tropd(**keys: Any) -> TrOPD:
    return TrOPD(**{"k": 2, "prefix_steps": 10, "prefix_max_tokens": 8, "denominator": "regions"} | keys)


def step_of(method: TrOPD, logp_V: Tensor, logq_V: Tensor) -> Batch:
    """One rollout in which every token of the vocabulary was sampled once."""
    return batch_of(method, {LOGP_STUDENT: [logp_V.tolist()], LOGP_TEACHER: [logq_V.tolist()]})


def expectation(
    method: TrOPD,
    *terms: str,
    logp_V: Tensor = LOGP,
    logq_V: Tensor = LOGQ,
    who_V: Tensor | None = None,
    batch: Batch | None = None,
) -> tuple[Tensor, Tensor]:
    """E of some terms over tokens that p samples, and its gradient. With the denominator `regions` a weight is what
    stands before the loss in the equations."""
    batch = step_of(method, logp_V, logq_V) if batch is None else batch
    weights = method.weights(batch)
    consulted = {name: value_BT[0] for name, value_BT in batch.consulted.items()}
    who_V = logp_V.exp() if who_V is None else who_V

    def loss(logp_1V: Tensor) -> Tensor:
        found = token_losses(method, logp_1V, logq_V[None], range(len(logq_V)), consulted=consulted)
        return who_V * sum((weights[term][0] * found[term] for term in terms), torch.zeros_like(who_V))

    return with_gradient(loss, logp_V)


def cover(logp_V: Tensor, logq_V: Tensor, tail: str = "truncate") -> tuple[Tensor, Tensor]:
    """The forward KL of one outlier, and its gradient."""
    method = tropd(region="nothing", tail=tail)
    return with_gradient(lambda logp: token_losses(method, logp, logq_V[None])["outlier"], logp_V)


def test_acceptance() -> None:
    near(acceptance(LOGP - LOGQ), 0.2, 1, 1, 0.5, 1)
    reward_V = LOGQ - LOGP
    near(reward_V, -1.609438, 0.693147, 0, -0.693147, 1.791759)
    near(acceptance(-reward_V) * reward_V, -0.321888, 0.693147, 0, -0.346574, 1.791759)


def test_outliers_measure_the_total_variation() -> None:
    trust_V = step_of(tropd(region="expected"), LOGP, LOGQ).consulted["trust"][0]
    near((P * trust_V).sum(), 0.55)
    near(d.total_variation(LOGP.exp(), LOGQ.exp()), 0.45)


def test_the_trust_term() -> None:
    value, gradient_V = expectation(tropd(region="expected"), "trust")
    near(value, -0.032616)
    near(gradient_V, *TRUST)


def test_back_propagating_the_gap_itself_would_teach_nothing() -> None:
    _, gradient_V = with_gradient(lambda logp: P * (logp - LOGQ))
    near(gradient_V, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("tail", "value", "gradient"),
    [
        ("truncate", 0.814787, FKL),
        ("renormalise", 0.134362, (0, 0.228571, 0, 0, -0.228571)),
        ("bucket", 0.539899, (0.3, -0.2, 0.09, 0.06, -0.25)),
    ],
)
def test_the_forward_kl_of_an_outlier(tail: str, value: float, gradient: tuple[float, ...]) -> None:
    got, gradient_V = cover(LOGP, LOGQ, tail)
    near(got, value)
    near(gradient_V, *gradient)


def test_the_gradient_of_the_truncated_forward_kl_is_bounded() -> None:
    """p m - q on the support and p m outside it: in L1 at most twice the teacher's mass on its top k."""
    _, gradient_V = cover(LOGP, LOGQ)
    on_V, mass = torch.tensor([False, True, False, False, True]), 0.7
    torch.testing.assert_close(gradient_V, P * mass - Q * on_V)
    near(gradient_V.abs().sum(), 1.05)
    assert gradient_V.abs().sum() <= 2 * mass


def test_the_outlier_term() -> None:
    value, gradient_V = expectation(tropd(region="expected"), "outlier")
    near(value, 0.366654)
    near(gradient_V, 0.1575, -0.117, 0.04725, 0.0315, -0.11925)


def test_trust_and_outlier_by_enumeration_of_token_and_coin() -> None:
    whole, whole_V = expectation(tropd(region="expected"), "trust", "outlier")
    near(whole, 0.334038)
    near(whole_V, 0.334752, -0.249106, 0.052142, 0.069419, -0.207207)
    method, accepted_V = tropd(), acceptance(LOGP - LOGQ)
    batch = step_of(method, LOGP, LOGQ)
    value, gradient_V = torch.zeros(()), torch.zeros(5)
    for coin, chance_V in ((1.0, accepted_V), (0.0, 1 - accepted_V)):
        trust_BT = torch.full((1, 5), coin, dtype=torch.float64)
        fallen = replace(batch, consulted={**batch.consulted, "trust": trust_BT})
        part, part_V = expectation(method, "trust", "outlier", who_V=P * chance_V, batch=fallen)
        value, gradient_V = value + part, gradient_V + part_V
    near(value, 0.334038)
    torch.testing.assert_close(gradient_V, whole_V)


def test_the_forward_kl_as_a_reward() -> None:
    _, gradient_V = expectation(tropd(region="expected", outlier="fkl_reward"), "outlier")
    near(gradient_V, 0.142588, -0.073331, -0.054998, 0.004074, -0.018333)
    _, everywhere_V = expectation(tropd(region="nothing", outlier="fkl_reward"), "outlier")
    near(everywhere_V, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("estimator", ["sampled", "exact"])
def test_trust_everywhere_is_reverse_kl(estimator: str) -> None:
    value, gradient_V = expectation(tropd(region="everything", trust_estimator=estimator), "trust")
    near(value, 0.645816)
    near(gradient_V, *K1)


def test_the_exact_trust_term_is_the_reverse_kl_of_the_prefix() -> None:
    """Where the sampled one has R of the token: weighted by P, of mean .55, the gradient is .55 times plain OPD's."""
    _, gradient_V = expectation(tropd(region="expected", trust_estimator="exact"), "trust")
    near(gradient_V, *(0.55 * g for g in K1), tolerance=2e-6)


def test_guidance_on_tokens_of_the_teacher() -> None:
    def loss(logp_1V: Tensor) -> Tensor:
        return Q * token_losses(tropd(region="everything"), logp_1V, LOGQ[None], range(5))["guidance"]

    value, gradient_V = with_gradient(loss)
    near(value, 0.619186)
    near(gradient_V, 0.4, -0.2, 0, 0.05, -0.25)


def test_the_forward_kl_may_be_negative_and_still_teaches() -> None:
    p, q = (torch.tensor(x, dtype=torch.float64) for x in ((0.45, 0.45, 0.05, 0.05), (0.3, 0.3, 0.2, 0.2)))
    value, gradient_V = cover(p.log(), q.log())
    near(value, -0.243279)
    assert value > 0.6 * math.log(0.6) and gradient_V.abs().sum() > 0.1
    value, gradient_V = cover(q.log(), q.log())
    near(value, 0)
    near(gradient_V, -0.12, -0.12, 0.12, 0.12)


@pytest.mark.parametrize(("a", "value"), [(1e-2, 3.506671), (1e-4, 7.190807), (1e-6, 10.874943), (5e-10, 16.955665)])
def test_the_forward_kl_diverges_where_the_student_has_no_mass_with_a_bounded_gradient(a: float, value: float) -> None:
    p, q = (torch.tensor(x, dtype=torch.float64) for x in ((0.6 * a, 0.4 * a, 1 - a), (0.5, 0.3, 0.2)))
    got, gradient_V = cover(p.log(), q.log())
    near(got, value)
    assert gradient_V.abs().sum() <= 1.6
    if a == 5e-10:
        near(gradient_V, -0.5, -0.3, 0.8)


@pytest.mark.parametrize(
    ("delta", "trust", "outlier", "both", "everywhere", "reverse"),
    [(0.1, -0.009482, -0.01, -0.019482, -0.1, -1.667344), (0.01, None, None, -0.0001995, -0.01, -0.159669)],
)
def test_next_to_a_confident_teacher_it_pulls_like_the_square(
    delta: float, trust: float | None, outlier: float | None, both: float, everywhere: float, reverse: float
) -> None:
    p, q = (torch.tensor([1 - x, x], dtype=torch.float64) for x in (delta, 1e-9))

    def first(method: TrOPD, *terms: str) -> Tensor:
        return expectation(method, *terms, logp_V=p.log(), logq_V=q.log())[1][0]

    near(first(tropd(region="expected"), "trust", "outlier"), both)
    near(first(tropd(region="nothing"), "outlier"), everywhere)
    near(first(tropd(region="everything", trust_estimator="exact"), "trust"), reverse)
    if trust is not None and outlier is not None:
        near(first(tropd(region="expected"), "trust"), trust)
        near(first(tropd(region="expected"), "outlier"), outlier)


@pytest.mark.parametrize(
    ("threshold", "outlier", "gradient"),
    [
        (-1.386294, "mask", (0.079451, -0.106849, 0.023835, 0.085205, -0.081643)),
        (-1.386294, "clip", (0.426025, -0.245478, -0.080137, 0.015890, -0.116300)),
        (-0.5, "mask", (0.114109, -0.092986, 0.034233, 0.022822, -0.078177)),
        (-0.5, "clip", (0.214109, -0.152986, -0.010767, 0.042822, -0.093177)),
    ],
)
def test_static_thresholds(threshold: float, outlier: str, gradient: tuple[float, ...]) -> None:
    method = tropd(region="threshold", threshold_nats=threshold, outlier=outlier)
    near(expectation(method, "trust", "outlier")[1], *gradient)


@pytest.mark.parametrize("region", ["expected", "threshold", "everything", "nothing"])
def test_a_constant_added_to_logits_changes_nothing(region: str) -> None:
    method = tropd(region=region)
    _, gradient_V = expectation(method, "trust", "outlier", batch=step_of(method, LOGP, LOGQ))
    batch = step_of(method, (LOGP + 3).log_softmax(-1), (LOGQ - 7).log_softmax(-1))
    _, moved_V = expectation(method, "trust", "outlier", logp_V=LOGP + 3, who_V=P, batch=batch)
    torch.testing.assert_close(moved_V, gradient_V)
