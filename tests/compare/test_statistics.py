"""What is said of accuracies: numbers worked out by hand, and whether intervals and p-values keep their promise.

The simulated runs are made so that the truth is known exactly: no share of correct rollouts needs to be clipped.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from opd_lab.compare import statistics as s

SIMULATIONS, PROBLEMS, ROLLOUTS = 500, 200, 4
BASE = 0.5  # accuracy of the first method


def simulated(
    generator: np.random.Generator, seeds: list[int], gains: list[float], spread: float
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Methods that share problems; each has its own strengths and seeds of standard deviation `spread`. Their shares
    of correct rollouts [simulations, S, P], and what each seed's accuracy is on all the problems there could be."""
    problem = generator.uniform(-0.2, 0.2, (SIMULATIONS, 1, PROBLEMS))
    correct, of_seed = [], []
    for S, gain in zip(seeds, gains):
        seed = generator.normal(0, spread, (SIMULATIONS, S, 1)) + BASE + gain
        own = generator.uniform(-0.05, 0.05, (SIMULATIONS, 1, PROBLEMS))
        rest = generator.uniform(-0.1, 0.1, (SIMULATIONS, S, PROBLEMS))
        correct.append(generator.binomial(ROLLOUTS, seed + problem + own + rest) / ROLLOUTS)
        of_seed.append(seed[..., 0])
    return correct, of_seed


@pytest.mark.parametrize("gain", [0.0, 0.05])
@pytest.mark.parametrize("spread", [0.0, 0.02])
@pytest.mark.parametrize("seeds", [[1, 1], [3, 3], [5, 5], [5, 3]])
def test_intervals_cover_in_92_to_98_percent_of_simulations(seeds, spread, gain):
    (a, b), (seed_a, seed_b) = simulated(np.random.default_rng(0), seeds, [gain, 0.0], spread)
    one = seeds[0] == 1  # then the interval speaks of other problems, for this very seed
    mean, difference = s.accuracy(a), s.difference(a, b)
    truth = (seed_a.mean(1), seed_a.mean(1) - seed_b.mean(1)) if one else (BASE + gain, gain)
    for found, true in zip((mean, difference), truth):
        assert found.speaks_of == ("problems" if one else "problems and seeds")
        low, high = found.interval()
        assert 0.92 <= ((low <= true) & (true <= high)).mean() <= 0.98


@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (3, 0.0), (3, 0.02), (5, 0.02)])
def test_false_alarms_after_holm_are_at_most_5_percent_family_wise(seeds, spread):
    """Nine methods that are no better than the baseline. 500 simulations at 5 % give more alarms than the limit once in
    forty times."""
    (base, *others), _ = simulated(np.random.default_rng(0), [seeds] * 10, [0.0] * 10, spread)
    p_MR = np.array([s.difference(other, base).p_value() for other in others])
    alarms = sum((s.holm(p_M) <= 0.05).any() for p_M in p_MR.T)
    assert alarms <= stats.binom.isf(0.025, SIMULATIONS, 0.05)
    single = (p_MR <= 0.05).any(0).sum()  # without Holm there are many: the simulation would notice
    assert single > 2 * stats.binom.isf(0.025, SIMULATIONS, 0.05)


def test_the_bootstrap_agrees_where_only_problems_vary_and_is_too_narrow_over_three_seeds_that_spread():
    (a, b), _ = simulated(np.random.default_rng(0), [1, 1], [0.05, 0.0], 0.0)
    low, high = s.difference(a[0], b[0]).interval()
    assert s.bootstrap(a[0], b[0]) == pytest.approx((low, high), abs=0.006)
    spread = np.random.default_rng(0).normal(0.5, 0.05, (SIMULATIONS, 3, 1)) + np.zeros((3, 20))
    drawn = np.array([s.bootstrap(y_SP, resamples=400) for y_SP in spread])
    low, high = s.accuracy(spread).interval()
    assert ((drawn[:, 0] <= 0.5) & (drawn[:, 1] >= 0.5)).mean() < 0.85
    assert 0.92 <= ((low <= 0.5) & (high >= 0.5)).mean() <= 0.98


def test_what_is_said_to_separate_does_so_four_times_in_five():
    generator = np.random.default_rng(0)
    (many_a, many_b), _ = simulated(generator, [40, 40], [0.03, 0.0], 0.02)
    enough = s.needed(many_a[0], many_b[0], alpha=0.05)
    assert 3 <= enough.seeds <= 30
    (a, b), _ = simulated(generator, [int(enough.seeds)] * 2, [0.03, 0.0], 0.02)
    seen = float(s.difference(many_a[0], many_b[0]).value)
    assert 0.7 <= (s.difference(a, b).p_value() <= 0.05).mean() <= 0.9, f"planned for {seen:.3f} at 0.03"
    fewer = s.needed(many_a[0][:1], many_b[0][:1], alpha=0.05)
    assert math.isnan(fewer.seeds)
    assert math.isfinite(fewer.problems)


def test_nothing_separates_equal_methods():
    y_SP = np.array([[1.0, 0.5, 0.0], [0.5, 0.5, 0.25]])
    assert s.needed(y_SP, y_SP, alpha=0.05) == s.Needed(math.inf, math.inf)


def test_one_seed_by_hand():
    found = s.accuracy(np.array([[1.0, 0.5, 0.75, 0.75]]))
    assert found.value == 0.75
    half = 3.182446 * math.sqrt(2 * 0.25**2 / 3 / 4)  # t(3), variance of the mean of four
    assert found.interval() == pytest.approx((0.75 - half, 0.75 + half))
    assert found.speaks_of == "problems"


def test_two_seeds_by_hand():
    found = s.accuracy(np.array([[1.0, 0.5], [0.5, 0.0]]))  # seeds .75, .25; problems .75, .25; nothing is left over
    assert (found.problems, found.seeds) == (0.0625, 0.0625)
    assert found.half_width() == pytest.approx(12.706205 * math.sqrt(0.125))  # t(1)
    crossed = s.accuracy(np.array([[1.0, 0.0], [0.0, 1.0]]))  # equal seeds, equal problems
    assert (crossed.value, crossed.problems, crossed.seeds) == (0.5, 0.0, 0.0)


def test_a_paired_difference_by_hand():
    found = s.difference(np.array([[1.0, 1.0, 0.0, 0.0]]), np.array([[1.0, 0.0, 0.0, 0.0]]))
    assert (found.value, found.standard_error) == (0.25, 0.25)
    assert found.p_value() == pytest.approx(0.391002, abs=1e-6)  # of |t(3)| >= 1


def test_the_p_value_is_where_the_interval_ends():
    (a, b), _ = simulated(np.random.default_rng(1), [3, 2], [0.03, 0.0], 0.02)
    found = s.difference(a, b)
    p = found.p_value()
    assert p.min() < 0.05 < p.max()
    assert found.half_width(p) == pytest.approx(np.abs(found.value), abs=1e-6)


def test_equal_rows_and_single_problems():
    y_SP = np.array([[1.0, 0.5], [0.5, 0.0]])
    same = s.difference(y_SP, y_SP)
    assert (same.value, same.p_value()) == (0.0, 1.0)
    shifted = s.difference(np.full((1, 5), 0.75), np.full((1, 5), 0.5))  # no spread at all: certain
    assert shifted.p_value() == s.SMALLEST_P
    lone = s.difference(y_SP[:, :1], np.zeros((2, 1)))  # one problem has no spread to learn from
    assert math.isnan(lone.half_width())
    assert math.isnan(lone.p_value())


def test_the_probability_of_improvement_by_hand():
    a_SP = np.array([[1.0, 0.5, 0.0]])
    b_SP = np.array([[0.5, 0.5, 0.5], [0.0, 1.0, 0.0]])
    found = s.improvement(a_SP, b_SP)  # wins and half ties of two pairs: 2, 1/2, 1/2
    assert found.value == pytest.approx((2 + 0.5 + 0.5) / 6)
    assert s.improvement(b_SP, a_SP).value == pytest.approx(1 - found.value)
    assert s.improvement(b_SP, b_SP).value == 0.5


def test_holm_by_hand():
    assert s.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert s.holm([0.01, 0.04, 0.03], comparisons=6) == pytest.approx([0.06, 0.16, 0.15])
    assert s.holm([0.5, 0.9]).tolist() == [1.0, 1.0]


def test_numbers_that_are_not_of_problems_have_a_t_interval_over_the_seeds_that_have_one() -> None:
    found = s.over_seeds(np.array([[1.0, 4.0, 2.0], [3.0, np.nan, 2.0], [5.0, np.nan, 2.0]]))
    assert found.value.tolist() == [3.0, 4.0, 2.0]
    low_N, high_N = found.interval()
    half = 4.302653 * 2 / math.sqrt(3)  # t(2), standard deviation 2
    assert (low_N[0], high_N[0]) == pytest.approx((3 - half, 3 + half))
    assert np.isnan(low_N[1])  # one seed
    assert (low_N[2], high_N[2]) == (2.0, 2.0)
