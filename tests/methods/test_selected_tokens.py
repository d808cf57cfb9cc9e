"""Selections by a quantile of the step, by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from opd_lab.methods.base import TRAINED
from opd_lab.methods.selected_tokens import TIP, EntropyTop, SuppressRare
from opd_lab.types import ENTROPY_STUDENT, ENTROPY_TEACHER, LOGP_STUDENT, REVERSE_KL, Behavior
from tests.methods.by_hand import FACTS, batch_of, token_losses
from tests.pair import LOGP, LOGQ, P, near, with_gradient

H = [[0.1, 1.2, 0.9], [0.2, 0.4]]  # sorted .1 .2 .4 .9 1.2


def kept(method: EntropyTop | TIP | SuppressRare, signals: Any) -> list[float]:
    batch = batch_of(method, signals)
    return method.weights(batch)[TRAINED][batch.rollouts.mask_BT].tolist()


@pytest.mark.parametrize(
    ("keep", "wanted"),
    [(0.2, [0, 1, 0, 0, 0]), (0.5, [0, 1, 1, 0, 1]), (0.6, [0, 1, 1, 0, 1]), (1.0, [1, 1, 1, 1, 1])],
)
def test_the_highest_share_of_the_step(keep: float, wanted: list[float]) -> None:
    """The quantile at 1 - .2 lies at place 3.2: .96. At 1 - .5 it is .4, which stays."""
    assert kept(EntropyTop(keep=keep), {ENTROPY_STUDENT: H}) == wanted
    assert kept(EntropyTop(keep=keep, owner="teacher"), {ENTROPY_TEACHER: H}) == wanted


def test_the_denominator_is_all_tokens_on_request() -> None:
    assert kept(EntropyTop(keep=0.5, denominator="all"), {ENTROPY_STUDENT: H}) == pytest.approx([0, 0.6, 0.6, 0, 0.6])


def test_equal_entropies_are_all_kept() -> None:
    assert kept(EntropyTop(), {ENTROPY_STUDENT: [[0.5, 0.5], [0.5]]}) == [1, 1, 1]


@pytest.mark.parametrize("base", ["sampled", "full"])
def test_its_loss_is_plain_opd(base: str) -> None:
    method = EntropyTop(base=base)
    _, gradient_V = with_gradient(lambda logp: P * token_losses(method, logp, LOGQ[None], range(5))[TRAINED])
    near(gradient_V, 0.481811, -0.267793, -0.096872, 0.004733, -0.121879)


def test_tip_keeps_what_is_high_in_either() -> None:
    """h = 1 .5 0 .25 and d = 0 .5 1 .25: s = 1 .75 1 .4375; the quantile at .5 lies halfway from .75 to 1."""
    signals = {ENTROPY_STUDENT: [[2.0, 1.0, 0.0], [0.5]], REVERSE_KL: [[0.0, 2.0, 4.0], [1.0]]}
    assert kept(TIP(), signals) == [1, 0, 1, 0]
    assert kept(TIP(rho=0.75), signals) == [1, 1, 1, 0]
    assert kept(TIP(rho=1.0), signals) == [1, 1, 1, 1]


def test_tip_where_the_models_agree() -> None:
    assert kept(TIP(), {ENTROPY_STUDENT: [[0.5, 1.0]], REVERSE_KL: [[0.0, 0.0]]}) == [0, 1]


def test_rare_tokens_are_pushed_down_and_divided_by_all() -> None:
    """log p -4 -1 -2 -3 -5: the quantile at .2 lies at place .8: -4.2, so only -5 is below. Coefficient 1/5 on it."""
    method = SuppressRare()
    assert kept(method, {LOGP_STUDENT: [[-4.0, -1.0], [-2.0, -3.0, -5.0]]}) == pytest.approx([0, 0, 0, 0, 0.2])
    loss_N = token_losses(method, LOGP[None], LOGQ[None], [4])[TRAINED]
    near(loss_N, math.log(0.05))  # minimised: the token's probability falls


def test_metrics() -> None:
    for method, signals, name, share in (
        (EntropyTop(keep=0.5), {ENTROPY_STUDENT: H}, "entropy_top20/kept_fraction", 0.6),
        (TIP(), {ENTROPY_STUDENT: H, REVERSE_KL: H}, "tip/kept_fraction", 0.6),
        (SuppressRare(), {LOGP_STUDENT: H}, "suppress_rare/pushed_fraction", 0.2),
    ):
        batch = batch_of(method, signals)
        assert method.metrics(batch, method.weights(batch)) == {name: pytest.approx(share)}


@pytest.mark.parametrize(("cls", "name"), [(EntropyTop, "keep"), (TIP, "rho")])
@pytest.mark.parametrize(("value", "hint"), [(20, "; did you mean 0.2?"), (0, ""), (-1, ""), (1000, "")])
def test_a_share_is_a_fraction(cls: Any, name: str, value: float, hint: str) -> None:
    with pytest.raises(ValueError) as refused:
        cls(**{name: float(value)})
    assert str(refused.value) == f"method.{name} is the fraction of tokens kept, in (0, 1], got {value}{hint}"


def test_refused() -> None:
    for keys, message in [
        ({"owner": "both"}, "method.owner must be one of student, teacher, got both"),
        ({"denominator": "half"}, "method.denominator must be one of kept, all, got half"),
        ({"base": "topk"}, "method.base must be one of sampled, full, got topk"),
    ]:
        with pytest.raises(ValueError, match=message):
            EntropyTop(**keys)
    with pytest.raises(ValueError, match=r"method.rare is the fraction of tokens pushed down, in \(0, 1\), got 1"):
        SuppressRare(rare=1.0)
    tempered = replace(FACTS, behavior=Behavior(top_p=0.9))
    with pytest.raises(ValueError, match="needs tokens drawn from the current student"):
        EntropyTop().check(tempered)
    EntropyTop(base="full").check(tempered)


def test_status_and_conventions() -> None:
    assert (EntropyTop.status, TIP.status, SuppressRare.status) == ("ship", "experimental", "control")
    assert EntropyTop().conventions()["denominator"] == "kept_tokens"
    assert EntropyTop(denominator="all").conventions()["denominator"] == "tokens"
    assert SuppressRare().conventions()["divergence"] == "none"
