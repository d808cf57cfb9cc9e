"""Nothing of shape [N, V] ever exists: every tensor the pass makes is watched."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opd_lab.chunk import measure
from opd_lab.types import ENTROPY_TEACHER, RANK_TEACHER, REVERSE_KL, overlap
from tests.signals.models import LOSSES, models

V, CHUNK = 211, 8  # V is no other dimension, so that a last dimension of V means a vocabulary
RECORD = frozenset({REVERSE_KL, ENTROPY_TEACHER, RANK_TEACHER, overlap(4)})


class Watch(TorchDispatchMode):
    """The most rows of a tensor as wide as the vocabulary, and how many such rows were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}  # id of a living tensor: its rows
        self.most_rows = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == V:
                self._born(tensor, tensor.numel() // V)
        return out

    def _born(self, tensor: torch.Tensor, rows: int) -> None:
        if id(tensor) not in self.alive:  # an in-place operation returns a tensor that is known
            weakref.finalize(tensor, self.alive.pop, id(tensor))
        self.alive[id(tensor)] = rows
        self.most_rows = max(self.most_rows, rows)
        self.peak = max(self.peak, sum(self.alive.values()))


def watched(n: int, loss: str) -> Watch:
    m = models(n, V)
    with Watch() as watch:
        value, _ = m.run(LOSSES[loss], chunk=CHUNK, record=RECORD)
        value.backward()
    return watch


@pytest.mark.parametrize("loss", ["reverse", "jsd", "k2", "two terms", "topk union forward bucket"])
def test_no_tensor_holds_more_than_a_chunk_of_distributions(loss: str) -> None:
    assert watched(64, loss).most_rows == CHUNK


@pytest.mark.parametrize("loss", ["reverse", "topk union forward bucket"])
def test_the_peak_does_not_grow_with_the_number_of_tokens(loss: str) -> None:
    assert watched(640, loss).peak == watched(64, loss).peak


def test_measuring_keeps_to_the_chunk_too() -> None:
    m = models(64, V)
    with Watch() as watch:
        measure(RECORD, m.tokens.ids_N, m.student, m.teacher, chunk=CHUNK)
    assert watch.most_rows == CHUNK


def test_the_watch_sees_the_plain_formula_fail() -> None:
    m = models(64, V)
    with Watch() as watch:
        m.plain(LOSSES["reverse"]).backward()
    assert watch.most_rows == 64
