"""Coins owned by a token: the published sequence, uniformity, independence of keys, and what must not change them."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from opd_lab.methods.coins import _mix, token_coins, uniform
from opd_lab.types import Batch
from tests.methods.rocks import batch_of


def test_splitmix64_as_published() -> None:
    """The generator's first outputs from state 1234567, as its authors and others print them."""
    golden = 0x9E3779B97F4A7C15
    for i, wanted in enumerate((6457827717110365317, 3203168211198807973, 9817491932198370423)):
        state = (1234567 + i * golden) % 2**64
        signed = state - 2**64 if state >> 63 else state
        assert int(_mix(torch.tensor(signed))) % 2**64 == wanted


def test_numbers_lie_in_the_unit_interval_and_are_uniform() -> None:
    coin_N = uniform(0, 7, torch.arange(1000)[:, None], torch.arange(100)).flatten()
    assert coin_N.min() >= 0 and coin_N.max() < 1
    counts = torch.histc(coin_N.float(), 100, 0, 1).numpy()
    assert 0.001 < stats.chisquare(counts).pvalue < 0.999


@pytest.mark.parametrize("key", range(4))
def test_neighbouring_keys_give_independent_numbers(key: int) -> None:
    keys: list[Tensor] = [torch.full((50_000,), 3) for _ in range(4)]
    keys[key] = torch.arange(50_000)
    coin_N = uniform(*keys)
    counts = torch.bincount((coin_N[:-1] * 8).long() * 8 + (coin_N[1:] * 8).long(), minlength=64).numpy()
    assert 0.001 < stats.chisquare(counts).pvalue < 0.999  # pairs are uniform on the square


def test_every_key_and_its_place_matters() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0), (-1, 0), (2**62, 0)]
    assert len({float(uniform(*k)) for k in keys}) == len(keys)


def test_a_coin_belongs_to_its_token() -> None:
    batch = batch_of([[1, 2, 3], [4, 5], [6]], seed=5, step=2)
    coin_BT = token_coins(batch)
    assert coin_BT[1, 1] == uniform(5, 2, 1, 1)
    order = torch.tensor([2, 0, 1])
    mixed = Batch(batch.rollouts.rows(order), {}, step=2, seed=5)
    assert torch.equal(token_coins(mixed), coin_BT[order])
    assert torch.equal(token_coins(batch_of([[1, 2, 3], [4, 5], [6, 7, 8, 9]], seed=5, step=2))[:, :3], coin_BT)
    for other in (batch_of([[1, 2, 3], [4, 5], [6]], seed=6, step=2), batch_of([[1, 2, 3], [4, 5], [6]], seed=5)):
        assert not torch.isclose(token_coins(other), coin_BT).any()
