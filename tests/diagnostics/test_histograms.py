"""Bins that all runs share: every number in one of them, addition exact."""

from __future__ import annotations

import pytest
import torch

from opd_lab.bins import BINS, edges
from opd_lab.diagnostics.histograms import count, merge


@pytest.mark.parametrize("bins", BINS)
def test_every_number_lands_in_exactly_one_bin_and_nan_in_none(bins: str) -> None:
    values_N = torch.cat(
        [
            torch.randn(1000, generator=torch.Generator().manual_seed(0)).double().mul(3).exp(),
            torch.tensor([0.0, -0.0, -1e-12, -5.0, 1e300, -1e300, torch.inf, -torch.inf, *edges(bins)]).double(),
        ]
    )
    found = count(torch.cat([values_N, torch.full((7,), torch.nan).double()]), bins)
    assert int(found.counts_K.sum()) == len(values_N)
    naive = [
        int(((values_N > low) & (values_N <= high)).sum())
        for low, high in zip([-torch.inf, *edges(bins)], [*edges(bins), torch.inf])
    ]
    naive[0] += int((values_N == -torch.inf).sum())
    assert found.counts_K.tolist() == naive


@pytest.mark.parametrize("bins", BINS)
def test_edges_rise(bins: str) -> None:
    assert all(a < b for a, b in zip(edges(bins), edges(bins)[1:]))


def test_a_kl_of_zero_and_the_negatives_of_rounding_are_in_the_first_bin() -> None:
    assert count(torch.tensor([0.0, -1e-9, 1e-7, 1e-6]).double(), "kl_nats").counts_K[0] == 4
    assert 40 < edges("kl_nats")[-1] <= 50
    assert count(torch.tensor([60.0, torch.inf]), "kl_nats").counts_K[-1] == 2


def test_gaps_of_opposite_sign_are_mirror_images() -> None:
    gap_N = torch.randn(500, generator=torch.Generator().manual_seed(1))
    forth, back = count(gap_N, "gap_nats").counts_K, count(-gap_N, "gap_nats").counts_K
    assert torch.equal(forth, back.flip(0))


def test_counting_bins_hold_whole_numbers() -> None:
    # bins: <= 0, 1, 2, 3-4, 5-8, ...
    assert count(torch.tensor([0, 1, 2, 3, 4, 5, 8]), "count").counts_K[:6].tolist() == [1, 1, 1, 2, 2, 0]


def test_the_sum_of_two_histograms_is_the_histogram_of_both() -> None:
    one_N, other_N = torch.rand(100), torch.rand(50)
    merged = merge(count(one_N, "kl_nats"), count(other_N, "kl_nats"))
    assert torch.equal(merged.counts_K, count(torch.cat([one_N, other_N]), "kl_nats").counts_K)


def test_what_cannot_be_added_or_named_is_refused() -> None:
    with pytest.raises(ValueError, match="got kl_nats and gap_nats"):
        merge(count(torch.zeros(1), "kl_nats"), count(torch.zeros(1), "gap_nats"))
    with pytest.raises(ValueError, match=r"must be one of kl_nats, .*, got klnats"):
        count(torch.zeros(1), "klnats")
