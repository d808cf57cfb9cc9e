"""TrOPD on a step worked out by hand: regions, denominators, what it reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods import tropd as module
from opd_lab.methods.tropd import TrOPD
from opd_lab.types import (
    LOGP_STUDENT,
    LOGP_TEACHER,
    REVERSE_KL,
    TOTAL_VARIATION,
    Batch,
    Source,
    Tokens,
    TopK,
    topk,
)
from tests.methods.by_hand import Silent, batch_of, padded
from tests.methods.test_tropd import tropd
from tests.pair import near

# Rollout A: three tokens of the student. Rollout B: two of the teacher, then two of the student.
STUDENT = [[-0.2, -0.5, -0.3], [-1.0, -0.05, -0.7, -0.1]]
TEACHER = [[-0.1, -1.2, -4.3], [-0.4, -0.02, -1.4, -0.1]]
COIN = [[0.95, 0.40, 0.60], [0.0, 0.0, 0.50, 0.0]]
COVER = [[0.02, 0.30, 1.163571], [9.0, 9.0, 0.25, 0.01]]


@pytest.fixture
def coins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the worked example."""
    monkeypatch.setattr(module, "token_coins", lambda batch: padded(COIN))


def by_coin(method: TrOPD) -> Batch:
    """The worked example, after `consult`."""
    batch = batch_of(method, {LOGP_STUDENT: STUDENT, LOGP_TEACHER: TEACHER}, step=3)
    source_BT = batch.rollouts.source_BT.clone()
    source_BT[1, :2] = int(Source.TEACHER)
    batch = replace(batch, rollouts=replace(batch.rollouts, source_BT=source_BT), consulted={})
    return replace(batch, consulted=method.consult(Silent(), batch))


def tokens_in(method: TrOPD, batch: Batch) -> tuple[Tokens, Tensor]:
    """The seven tokens and their log-probs, the leaf; the support is one token that the teacher is sure of."""
    mask_BT = batch.rollouts.mask_BT
    logp_N, cover_N = padded(STUDENT)[mask_BT].requires_grad_(), padded(COVER)[mask_BT]
    zero_N1 = torch.zeros(7, 1, dtype=torch.float64)
    support = TopK(
        -cover_N[:, None], zero_N1, zero_N1 == 0, zero_N1.long(), zero_N1 + math.log(0.2), zero_N1 + math.log(0.1)
    )
    signals = {
        LOGP_STUDENT: logp_N,
        LOGP_TEACHER: padded(TEACHER)[mask_BT],
        topk(method.k, "teacher"): support,
        REVERSE_KL: cover_N,
    }
    zero_N = torch.zeros(7, dtype=torch.long)
    consulted = {name: value_BT[mask_BT] for name, value_BT in batch.consulted.items()}
    source_N = batch.rollouts.source_BT[mask_BT]
    return Tokens(zero_N, zero_N, zero_N, source_N, logp_N.detach(), signals, consulted), logp_N


def objective(method: TrOPD, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of the worked example, with its gradient to the sampled tokens' log-probs."""
    tokens, logp_N = tokens_in(method, batch)
    mask_BT, total = batch.rollouts.mask_BT, torch.zeros((), dtype=torch.float64)
    losses = method.losses(tokens)
    for term, weight_BT in method.weights(batch).items():
        total = total + d.weighted_mean(losses[term], weight_BT[mask_BT], (weight_BT != 0).sum())
    (gradient_N,) = torch.autograd.grad(total, logp_N)
    return total.detach(), gradient_N


GUIDED = (-0.000142857, -0.000142857)
CASES: list[tuple[Mapping[str, Any], float, tuple[float, ...]]] = [
    ({}, 0.287743, (-0.0142857, 0.1, 0, *GUIDED, 0, 0)),
    ({"denominator": "regions"}, 0.9071005, (-0.0333333, 0.2333333, 0, -0.0005, -0.0005, 0, 0)),
    ({"guidance_weight": 0.0}, 0.402714, (-0.02, 0.14, 0, 0, 0, 0, 0)),
    ({"region": "expected"}, 0.298321, (-0.0142857, 0.0496585, 0.0104661, *GUIDED, 0.0496585, 0)),
    (
        {"region": "expected", "denominator": "regions"},
        0.607057,
        (-0.02, 0.0695219, 0.0146525, -0.0005, -0.0005, 0.0695219, 0),
    ),
    ({"outlier": "fkl_reward"}, 0.287743, (-0.0142857, 0.1, 0.1662244, *GUIDED, 0.0357143, 0)),
    ({"region": "everything", "guidance_weight": 0.0}, 1.06, (-0.02, 0.14, 0.8, 0, 0, 0.14, 0)),
    ({"region": "threshold", "outlier": "mask"}, 0.185804, (-0.0142857, 0.1, 0, *GUIDED, 0.1, 0)),
    ({"region": "threshold", "outlier": "clip"}, 0.383846, (-0.0142857, 0.1, 0.1980421, *GUIDED, 0.1, 0)),
    ({"region": "threshold"}, 0.352029, (-0.0142857, 0.1, 0, *GUIDED, 0.1, 0)),
]


@pytest.mark.usefixtures("coins")
@pytest.mark.parametrize(("settings", "value", "gradient"), CASES, ids=lambda x: str(x)[:40])
def test_the_worked_example(settings: Mapping[str, Any], value: float, gradient: tuple[float, ...]) -> None:
    method = tropd(**{"denominator": "tokens", **settings})
    got, gradient_N = objective(method, by_coin(method))
    near(got, value)
    near(gradient_N, *gradient)


@pytest.mark.usefixtures("coins")
def test_who_is_in_which_region() -> None:
    batch = by_coin(tropd())
    near(by_coin(tropd(region="expected")).consulted["trust"][0, :3], 1, 0.496585, 0.018316)
    near(by_coin(tropd(region="expected")).consulted["trust"][1], 0, 0, 0.496585, 1)
    weights = tropd().weights(batch)
    assert weights["trust"].tolist() == [[1, 1, 0, 0], [0, 0, 0, 1]]
    assert weights["outlier"].tolist() == [[0, 0, 1, 0], [0, 0, 1, 0]]
    assert weights["guidance"].tolist() == [[0, 0, 0, 0], [0.001, 0.001, 0, 0]]


@pytest.mark.usefixtures("coins")
def test_expected_is_the_mean_over_coins() -> None:
    method = tropd(denominator="tokens")
    batch, expected = by_coin(method), by_coin(tropd(region="expected")).consulted["trust"]
    places = [(0, 0), (0, 1), (0, 2), (1, 2), (1, 3)]
    value, gradient_N = torch.zeros((), dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    for fallen in product((0.0, 1.0), repeat=5):
        trust_BT, chance = torch.zeros_like(expected), 1.0
        for place, coin in zip(places, fallen):
            trust_BT[place], accepted = coin, float(expected[place])
            chance *= accepted if coin else 1 - accepted
        part, part_N = objective(method, replace(batch, consulted={**batch.consulted, "trust": trust_BT}))
        value, gradient_N = value + chance * part, gradient_N + chance * part_N
    whole, whole_N = objective(
        tropd(denominator="tokens", region="expected"), by_coin(tropd(region="expected", denominator="tokens"))
    )
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(gradient_N, whole_N)


@pytest.mark.usefixtures("coins")
def test_a_step_without_any_student_token_is_supervised_learning() -> None:
    method = tropd(denominator="tokens")
    batch = by_coin(method)
    batch = replace(batch, rollouts=batch.rollouts.rows(torch.tensor([1])), consulted={})
    source_BT = batch.rollouts.source_BT.clone()
    source_BT[0, 2:] = int(Source.PADDING)
    batch = replace(batch, rollouts=replace(batch.rollouts, source_BT=source_BT))
    trust_BT = torch.zeros(1, 4, dtype=torch.float64)
    weights = method.weights(replace(batch, consulted={"trust": trust_BT}))
    assert {term: int((w != 0).sum()) for term, w in weights.items()} == {"trust": 0, "outlier": 0, "guidance": 2}
    assert weights["guidance"].tolist() == [[0.001, 0.001, 0, 0]]


@pytest.mark.usefixtures("coins")
def test_metrics_of_the_worked_example() -> None:
    method = tropd(denominator="tokens")
    batch = by_coin(method)
    tally = method.tally(tokens_in(method, batch)[0])
    signals = {LOGP_STUDENT: padded(STUDENT), LOGP_TEACHER: padded(TEACHER), TOTAL_VARIATION: padded(COVER)}
    seen = method.metrics(replace(batch, signals=signals, tallies=tally, step=4), {})
    scalars = {name: value for name, value in seen.items() if not isinstance(value, Tensor)}
    assert scalars == pytest.approx(
        {
            "tropd/outlier_fraction": 0.4,
            "tropd/trust_probability_mean_fraction": 0.6022973,
            "tropd/below_threshold_fraction": 0.2,
            "tropd/gap_trust_mean_nats": 0.2,
            "tropd/gap_trust_p99_nats": 0.686,
            "tropd/gap_outlier_mean_nats": 2.35,
            "tropd/gap_outlier_p99_nats": 3.967,
            "tropd/total_variation_mean_fraction": 0.3487142,
            "tropd/fkl_outlier_mean_nats": 0.7067855,
            "tropd/fkl_negative_fraction": 0.0,
            "tropd/student_mass_on_teacher_topk_fraction": 0.8,
            "tropd/teacher_topk_mass_fraction": 0.9,
            "tropd/prefix_max_tokens": 6,  # 4 (1 + cos(.3 pi)) = 6.351
            "tropd/teacher_token_fraction": 2 / 7,
            "tropd/full_teacher_rollout_fraction": 0.0,
        },
        abs=1e-6,
    )
    near(torch.as_tensor(seen["tropd/gap_outlier_nats"]), 4.0, 0.7)
    assert "tropd/gap_trust_mean_nats" not in tropd(region="expected").metrics(by_coin(tropd(region="expected")), {})
