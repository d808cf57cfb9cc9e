"""The likeliest tokens of a large vocabulary, searched in groups, are those of a search over all."""

from __future__ import annotations

import math

import pytest
import torch

from opd_lab import divergence as d
from opd_lab.divergence import GROUP, likeliest


@pytest.mark.parametrize("vocabulary", [5, GROUP * 40, GROUP * 40 + 1])
@pytest.mark.parametrize("k", [1, 7, 19])
def test_they_are_the_same(vocabulary: int, k: int) -> None:
    logp_NV = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(k)).double()
    logp_NV[0, :3] += 9  # several in one group
    logp_NV[1] = torch.arange(vocabulary) % vocabulary  # all of them in the last
    found_NK, expected_NK = likeliest(logp_NV, k), logp_NV.topk(min(k, vocabulary)).indices
    assert torch.equal(found_NK.sort(-1).values, expected_NK.sort(-1).values)


def test_a_token_without_mass_counts_nothing_whatever_its_value() -> None:
    logp_NV = torch.tensor([[0.0, -math.inf], [math.log(0.5), math.log(0.5)]])
    assert d.entropy(logp_NV).tolist() == pytest.approx([0.0, math.log(2)])
    assert d.reverse_kl(logp_NV[:1], logp_NV[1:]).item() == pytest.approx(math.log(2))
    assert d.reverse_kl(logp_NV[1:], logp_NV[:1]).item() == math.inf
    known = d.entropy(logp_NV, logp_NV.exp())
    assert torch.equal(known, d.entropy(logp_NV))


def test_equal_tokens_are_as_many_as_are_asked_for() -> None:
    logp_NV = torch.tensor([[0.1, 0.3, 0.3, 0.3], [0.4, 0.3, 0.2, 0.1]]).log()
    found_NK = likeliest(logp_NV, 2)
    assert found_NK.shape == (2, 2)
    assert set(found_NK[0].tolist()) < {1, 2, 3}
    assert set(found_NK[1].tolist()) == {0, 1}
