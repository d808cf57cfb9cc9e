"""Verdicts on differences of accuracy: GV7 of the specification of rock tokens, and laws."""

import numpy as np
import pytest

from opd_lab.analyze.verdicts import (
    NEUTRAL,
    STRONG_PILLAR,
    STRONG_STUMBLING,
    benjamini_hochberg,
    bonferroni,
    bootstrap_p,
    sign_test,
    verdict,
)

GV7 = [  # problems, lost, gained, exact p
    (4, 2, 0, 0.125),
    (10, 3, 1, 0.424437086),
    (200, 6, 1, 0.066974596),
    (500, 4, 0, 0.036046747),
    (500, 5, 0, 0.013140966),
    (500, 17, 5, 0.010503718),
    (500, 21, 15, 0.357630999),
    (10, 0, 0, 1.0),
]


def changes(problems: int, lost: int, gained: int) -> list[int]:
    return [-1] * lost + [1] * gained + [0] * (problems - lost - gained)


@pytest.mark.parametrize(("problems", "lost", "gained", "p"), GV7)
def test_gv7_exact_p(problems, lost, gained, p):
    assert bootstrap_p(changes(problems, lost, gained)) == pytest.approx(p, abs=6e-10)


@pytest.mark.parametrize(("problems", "lost", "gained", "p"), GV7[1:7])
def test_gv7_resampling_estimates_it(problems, lost, gained, p):
    change_P = np.array(changes(problems, lost, gained))
    drawn_R = np.random.default_rng(0).choice(change_P, size=(10_000, problems)).sum(1)
    tails = ((drawn_R >= 0).mean(), (drawn_R <= 0).mean())
    error = 2 * np.sqrt(p / 2 * (1 - p / 2) / 10_000)
    assert 2 * min(tails) == pytest.approx(p, abs=4 * error)


def test_gv7_verdicts():
    assert verdict(changes(500, 4, 0), 1, 0.01)[0] == NEUTRAL  # significant, and less than eps
    assert verdict(changes(500, 5, 0), 1, 0.01)[0] == STRONG_PILLAR  # exactly eps, whatever 0.56 - 0.57 may be
    assert verdict(changes(500, 0, 5), 1, 0.01)[0] == STRONG_STUMBLING
    assert verdict(changes(500, 21, 15), 1, 0.01)[0] == NEUTRAL


def test_several_rollouts_per_problem_count_as_one_problem():
    """Two problems that lose both of two rollouts: the sums of two draws from (-2, -2) are -4, always."""
    assert bootstrap_p([-2, -2]) == 0
    assert bootstrap_p([-2, 1]) == pytest.approx(2 * 0.25)  # -4, -1, -1, 2: P(sum >= 0) = 1/4


def test_gv7_sign_tests():
    assert [sign_test(*pair) for pair in ((10, 0), (7, 0), (0, 6), (3, 0))] == [0.001953125, 0.015625, 0.03125, 0.25]
    assert sign_test(0, 0) == sign_test(3, 3) == 1


def test_gv7_many_tokens():
    p_S = [0.001, 0.008, 0.039, 0.041, 0.042, 0.060, 0.074, 0.205]
    assert benjamini_hochberg(p_S, 0.05) == [True, True, *[False] * 6]
    assert bonferroni(p_S) == [True, *[False] * 7]
    assert benjamini_hochberg(p_S[::-1], 0.05) == [*[False] * 6, True, True]
