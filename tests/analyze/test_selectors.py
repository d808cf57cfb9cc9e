"""Selectors of rock tokens: the golden vectors GV2, GV4, GV5 and GV8 of the specification, and their laws."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from opd_lab.analyze.selectors import (
    QUADRANTS,
    context_consistency,
    empirical_bayes,
    matched_control,
    persistently_high,
    quadrants,
    recalcitrant,
    shares,
)
from opd_lab.methods.base import quantile
from opd_lab.methods.rock_scores import SCORES, TypeTable, rock_score, student_t_quantile, tabulate, top

IDS = torch.tensor([7, 3, 7, 5, 2, 3, 7, 9, 7, 3, 2])
KL = torch.tensor([0.40, 0.10, 0.20, 1.50, 0, 0.05, 0.60, 2.00, 0, 0.15, 0.10], dtype=torch.float64)


def table(scale: float = 1.0, times: int = 1) -> TypeTable:
    return tabulate(IDS.repeat(times), scale * KL.repeat(times))


def near(got: Tensor | float, *wanted: float, atol: float = 6e-10) -> None:
    expected = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(got).double().flatten(), expected, atol=atol, rtol=0)


def test_gv2_rock_scores_add_up_to_the_loss_of_the_corpus() -> None:
    near(rock_score(table())[[9, 5, 7, 3, 2]], 2.0, 1.5, 1.2, 0.30, 0.10)
    near(rock_score(table()).sum(), 5.1)
    assert rock_score(table()).sum() == pytest.approx(KL.sum().item(), abs=1e-15)
    assert top(rock_score(table()), table(), 10).tolist() == [9, 5, 7, 3, 2]


def test_gv2_the_first_type_what_it_holds_and_how_hard_it_is() -> None:
    found = top(rock_score(table()), table(), 1, min_count=2)
    assert found.tolist() == [7]
    held = shares(table(), found)
    near(torch.tensor([held.kl, held.tokens, held.enrichment]), 0.235294, 0.363636, 0.647059, atol=6e-7)
    found = top(rock_score(table()), table(), 1, min_count=2, exclude_most_frequent=1)
    assert found.tolist() == [3]
    near(shares(table(), found).enrichment, 0.215686, atol=6e-7)


def test_gv2_lower_bounds() -> None:
    bound_V = SCORES["lower_bound"](table())
    near(bound_V[[7, 3, 2]], -0.003817913, 0.015707277, -0.265687576)
    assert bound_V[[5, 9, 0]].tolist() == [-math.inf] * 3  # seen once, or never
    assert top(bound_V, table(), 5).tolist() == [3, 7, 2]
    near((table().count_V * bound_V.clamp(min=0))[[7, 3]], 0, 3 * 0.015707277, atol=2e-9)


def test_gv2_empirical_bayes() -> None:
    found = empirical_bayes(table())
    for got, wanted in ((found.prior_mean, 0.463636364), (found.within, 0.035), (found.between, 0.792090909)):
        assert got == pytest.approx(wanted, abs=6e-10)
    near(found.mean_V[[7, 9]], 0.301787893, 1.934985711)
    near(found.lower_V[[7, 9]], 0.148768783, 1.633843129)


def test_the_other_scores_and_ties() -> None:
    assert top(SCORES["mean_kl"](table()), table(), 2).tolist() == [9, 5]
    assert top(SCORES["frequency"](table()), table(), 4).tolist() == [7, 3, 2, 5]  # 5 and 9 tie: the lower id
    assert top(SCORES["frequency"](table()), table(), 9, min_count=3).tolist() == [7, 3]
    assert len(top(SCORES["mean_kl"](tabulate(IDS, KL, 64)), tabulate(IDS, KL, 64), 64)) == 5  # only what was seen


def test_scale_and_repetition_do_not_change_the_ranking() -> None:
    for other in (table(scale=3.7), table(times=2)):
        assert top(rock_score(other), other, 5).tolist() == [9, 5, 7, 3, 2]


def test_coverage_only_grows_and_all_types_are_as_hard_as_the_corpus() -> None:
    ranked = top(rock_score(table()), table(), 5)
    held = [shares(table(), ranked[:k]).kl for k in range(1, 6)]
    assert held == sorted(held)
    assert shares(table(), ranked).enrichment == pytest.approx(1)


def test_students_t_against_scipy() -> None:
    df_N = torch.tensor([1, 1.5, 2, 3, 7, 30, 1000, 1e6], dtype=torch.float64)
    near(student_t_quantile(df_N), *stats.t.ppf(0.95, df_N.numpy()).tolist(), atol=1e-8)


CONTEXTS = torch.tensor([(1, 0), (0.8, 0.6), (0, 1), (-1, 0)], dtype=torch.float64)


@pytest.mark.parametrize(
    ("gamma", "eta", "ccr"), [(0.5, 0.5, 0.125), (0.5, 0.3, 0.375), (0.5, 0, 0.5), (1.1, 0.3, 0), (-1, 0.3, 0.5)]
)
def test_gv4_context_consistency(gamma: float, eta: float, ccr: float) -> None:
    """rho is 1/3, 2/3, 1/3, 0 at gamma 0.5; gamma -1 calls any two contexts alike, so that all of O_PH counts."""
    assert context_consistency(CONTEXTS, 8, gamma=gamma, eta=eta) == ccr
    wanted = {0.125: 0.4, 0.375: 1.2, 0.5: 1.6, 0: 0}[ccr]
    assert 3.2 * context_consistency(CONTEXTS, 8, gamma=gamma, eta=eta) == pytest.approx(wanted)


def test_gv4_a_lone_occurrence_is_like_no_other() -> None:
    assert context_consistency(CONTEXTS[:1], 8, gamma=0.5, eta=0.3) == 0
    assert context_consistency(CONTEXTS[:0], 8, gamma=0.5, eta=0.3) == 0


BEFORE = torch.tensor([0.01, 0.02, 0.05, 0.10, 0.20, 0.30, 0.40, 0.50, 0.80, 1.20], dtype=torch.float64)
AFTER = torch.tensor([0.02, 0.02, 0.03, 0.12, 0.05, 0.35, 0.10, 0.55, 0.20, 1.30], dtype=torch.float64)


def test_gv5_quadrants() -> None:
    names = [QUADRANTS[i] for i in quadrants(BEFORE, AFTER).tolist()]
    assert [i for i, name in enumerate(names) if name == "regressed"] == [0, 3, 5, 7]
    assert [i for i, name in enumerate(names) if name == "easy"] == [1, 2, 4, 6]
    assert names[8:] == ["learned", "rock"]


def test_gv5_thresholds_are_interpolated() -> None:
    near(quantile(BEFORE, 80), 0.56)  # place 7.2 of 0..9
    near(quantile(BEFORE - AFTER, 20), -0.05)
    near(quantile(AFTER, 80), 0.39)


def test_an_improvement_that_ties_with_the_threshold_is_no_rock() -> None:
    assert quadrants(BEFORE, BEFORE - 1).tolist() == [3] * 8 + [1] * 2


def test_gv5_persistently_high() -> None:
    assert persistently_high(BEFORE, AFTER).nonzero().flatten().tolist() == [9]
    assert persistently_high(BEFORE, AFTER, 0, 0).all()


def test_recalcitrant_types_by_share_then_by_count() -> None:
    ids_N = torch.tensor([4] * 4 + [5] * 2 + [6] * 10 + [7])
    quadrant_N = torch.tensor([0, 1, 1, 1, 0, 3, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 0])  # rates 1/4, 1/2, 4/10, 1
    assert recalcitrant(ids_N, quadrant_N, min_count=2, pool=2).tolist() == [6, 5]
    assert recalcitrant(ids_N, quadrant_N, min_count=1, pool=1).tolist() == [7]


def test_gv8_a_control_matched_in_frequency() -> None:
    rocks, others = torch.tensor([1000, 300, 50]), torch.tensor([400, 60, 40, 10, 900])
    found = others[matched_control(rocks, others)]
    assert found.tolist() == [900, 400, 60]
    near((rocks.double().log10() - found.double().log10()).abs().sum(), 0.249877473)
