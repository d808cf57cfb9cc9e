"""EOPD: the golden term, its gate, its modes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lab.methods.base import TRAINED
from opd_lab.methods.eopd import EOPD
from opd_lab.types import ENTROPY_TEACHER, LOGP_STUDENT, Behavior
from tests.methods.by_hand import FACTS, batch_of, token_losses
from tests.pair import LOGQ, P, near, with_gradient

REVERSE = (0.481811, -0.267793, -0.096872, 0.004733, -0.121879)
TERM = (0.5, -0.371429, 0.15, 0.1, -0.378571)
BOTH = (0.981811, -0.639221, 0.053128, 0.104733, -0.500450)


def expected(method: Any, term: str | None = None) -> tuple[Tensor, Tensor]:
    """E over the vocabulary of one term, or of their sum, and its gradient."""

    def loss(logp: Tensor) -> Tensor:
        found = token_losses(method, logp, LOGQ[None], range(5))
        return P * (sum(found.values()) if term is None else found[term])

    return with_gradient(loss)


def test_the_forward_term() -> None:
    value, gradient_V = expected(EOPD(k=2), "forward")
    near(value, 1.520656)
    near(gradient_V, *TERM)


@pytest.mark.parametrize("base", ["sampled", "full"])
def test_with_its_base(base: str) -> None:
    near(expected(EOPD(k=2, base=base), TRAINED)[1], *REVERSE)
    near(expected(EOPD(k=2, base=base))[1], *BOTH)


@pytest.mark.parametrize("base", ["sampled", "full"])
def test_switch_replaces_the_base_where_the_gate_is_open(base: str) -> None:
    near(expected(EOPD(k=2, base=base, mode="switch"))[1], *TERM)
    near(expected(EOPD(k=2, base=base, mode="switch", tau=1.5))[1], *REVERSE)


def test_alpha_scales_the_forward_term_alone() -> None:
    near(expected(EOPD(k=2, alpha=0.0))[1], *REVERSE)
    near(expected(EOPD(k=2, alpha=2.0), "forward")[1], *(2 * x for x in TERM))


def test_the_gate_at_its_threshold() -> None:
    entropy_N = torch.tensor([0.79, 0.8, 0.81], dtype=torch.float64)
    assert EOPD().opened(entropy_N).tolist() == [False, True, True]
    assert EOPD(gate="above").opened(entropy_N).tolist() == [False, False, True]


def test_a_closed_gate_leaves_the_denominator_as_it_is() -> None:
    """Both terms are divided by the number of all tokens: their weights know no gate."""
    weights = EOPD().weights(batch_of(EOPD(), {LOGP_STUDENT: [[-1.0, -2.0], [-1.0]]}))
    assert {term: weight_BT.tolist() for term, weight_BT in weights.items()} == {
        TRAINED: [[1.0, 1.0], [1.0, 0.0]],
        "forward": [[1.0, 1.0], [1.0, 0.0]],
    }


def test_gate_fraction_where_the_diagnostics_recorded_the_entropy() -> None:
    batch = batch_of(EOPD(), {LOGP_STUDENT: [[-1.0, -2.0], [-1.0]]})
    assert EOPD().metrics(batch, {}) == {}
    seen = replace(batch, signals={ENTROPY_TEACHER: torch.tensor([[0.1, 0.9], [0.8, math.nan]])})
    assert EOPD().metrics(seen, {}) == {"eopd/gate_fraction": pytest.approx(2 / 3)}


def test_eopd_refuses() -> None:
    with pytest.raises(ValueError, match=r"method.tau must be above 0 nats, got 0"):
        EOPD(tau=0.0)
    with pytest.raises(ValueError, match=r"method.mode must be one of add, switch, got both"):
        EOPD(mode="both")
    with pytest.raises(ValueError, match=r"method.base must be one of sampled, full, got topk"):
        EOPD(base="topk")
    with pytest.raises(ValueError, match=r"method.k must be between 1 and the vocabulary size 151936, got 0"):
        EOPD(k=0).check(FACTS)
    tempered = replace(FACTS, behavior=Behavior(temperature=0.7))
    with pytest.raises(ValueError, match=r"needs tokens drawn from the current student"):
        EOPD().check(tempered)
    EOPD(base="full").check(tempered)
