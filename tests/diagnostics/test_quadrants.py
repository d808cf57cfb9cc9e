"""Easy, learned, rock, regressed: the golden vector of the definition, windows, restart."""

from __future__ import annotations

import json

import pytest
import torch

from opd_lab.diagnostics.quadrants import Quadrants

FIRST = [0.01, 0.02, 0.05, 0.10, 0.20, 0.30, 0.40, 0.50, 0.80, 1.20]
LAST = [0.02, 0.02, 0.03, 0.12, 0.05, 0.35, 0.10, 0.55, 0.20, 1.30]


def quadrants(vocabulary: int = 10, windows: int = 2) -> Quadrants:
    return Quadrants(vocabulary, windows=windows, high=0.8, improvement=0.2)


def window(of: Quadrants, means: list[float], counts: list[int] | None = None) -> None:
    count_V = torch.tensor(counts or [1] * len(means)).double()
    of.add(count_V, torch.tensor(means).double() * count_V)


def named(of: Quadrants, vocabulary: int = 10) -> list[str | None]:
    return [row["quadrant"] for row in of.columns(list(range(vocabulary)))]


def test_the_golden_vector() -> None:
    """tau 0.56, delta -0.05 (linear quantiles)."""
    of = quadrants(windows=1)
    window(of, FIRST)
    assert named(of) == [None] * 10
    window(of, LAST)
    assert named(of) == [
        *("regressed", "easy", "easy", "regressed", "easy", "regressed", "easy", "regressed", "learned", "rock"),
    ]
    assert of.columns([9, 8]) == [
        {"quadrant": "rock", "kl_first_mean_nats": pytest.approx(1.2), "kl_last_mean_nats": pytest.approx(1.3)},
        {"quadrant": "learned", "kl_first_mean_nats": pytest.approx(0.8), "kl_last_mean_nats": pytest.approx(0.2)},
    ]


def test_a_type_is_judged_by_its_own_first_and_last_windows_weighted_by_its_tokens() -> None:
    of = quadrants(vocabulary=2)
    for mean, count, other in (
        (4.0, 1, 1),
        (1.0, 3, 0),
        (9.0, 5, 0),
        (8.0, 1, 0),
        (2.0, 1, 1),
        (3.0, 3, 0),
        (6.0, 0, 0),
    ):
        window(of, [mean, 0.5], [count, other])
    first, second = of.columns([0, 1])
    assert (first["kl_first_mean_nats"], first["kl_last_mean_nats"]) == (7 / 4, 11 / 4)
    assert second == {"quadrant": None, "kl_first_mean_nats": None, "kl_last_mean_nats": None}  # two windows, not four


def test_restored_it_goes_on_exactly() -> None:
    whole, first = quadrants(), quadrants()
    for seed in range(6):
        means = torch.rand(10, generator=torch.Generator().manual_seed(seed)).tolist()
        window(whole, means)
        if seed < 3:
            window(first, means)
    second = quadrants()
    state = {name: value.clone() for name, value in first.state_dict().items()}
    second.load_state_dict(state)
    window(first, [9.0] * 10)  # does not reach into the copy
    for seed in range(3, 6):
        window(second, torch.rand(10, generator=torch.Generator().manual_seed(seed)).tolist())
    assert json.dumps(second.columns(list(range(10)))) == json.dumps(whole.columns(list(range(10))))
    with pytest.raises(ValueError, match=r"\(2, 10\), this run \(1, 10\)"):
        quadrants(windows=1).load_state_dict(state)
