"""How alike are two texts? One number in [0, 1] per pair, all pairs at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

FILL = -1  # no symbol


def edit(left: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> Tensor:
    """1 - Levenshtein distance / the longer length, for each pair of sequences of symbols; 1 where both are empty."""
    left_P, right_P = (torch.tensor([len(text) for text in texts], dtype=torch.long) for texts in (left, right))
    longer_P = torch.maximum(left_P, right_P)
    distance_P = levenshtein(*_numbered(left, right), left_P, right_P)
    return 1 - distance_P.double() / longer_P.clamp(min=1)


def levenshtein(left_PI: Tensor, right_PJ: Tensor, left_P: Tensor, right_P: Tensor) -> Tensor:
    """Insertions, deletions and substitutions from one sequence of numbers to the other, given their lengths.

    Row i of the usual table holds the distances of the first i symbols on the left to the first j on the right. A row
    follows from the one before at once: the cheapest way along the row, min over k <= j of row[k] + j - k, is a running
    minimum of row[k] - k.
    """
    j_J = torch.arange(right_PJ.shape[1] + 1, dtype=torch.int32)
    row_PJ = j_J.expand(len(left_PI), -1)
    distance_P = right_P.int()  # from nothing
    for i in range(left_PI.shape[1]):
        substituted_PJ = row_PJ[:, :-1] + (left_PI[:, i, None] != right_PJ)
        first_PJ = torch.cat([row_PJ[:, :1] + 1, torch.minimum(row_PJ[:, 1:] + 1, substituted_PJ)], 1)
        row_PJ = (first_PJ - j_J).cummin(1).values + j_J
        distance_P = torch.where(left_P == i + 1, row_PJ.gather(1, right_P[:, None])[:, 0], distance_P)
    return distance_P


def rouge1(left: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> Tensor:
    """F1 of the symbols that both have, each counted as often as both have it, whatever their case."""
    return torch.tensor([_rouge1(*pair) for pair in zip(left, right, strict=True)], dtype=torch.float64)


def _rouge1(left: Sequence[str], right: Sequence[str]) -> float:
    if not left and not right:
        return 1.0
    counts = [Counter(symbol.lower() for symbol in text) for text in (left, right)]
    return 2 * (counts[0] & counts[1]).total() / (len(left) + len(right))


def _numbered(left: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """A number for each symbol, in rectangles."""
    numbers: dict[str, int] = {}
    rectangles = []
    for texts in (left, right):
        width = max(map(len, texts), default=0)
        rows = [[numbers.setdefault(symbol, len(numbers)) for symbol in text] for text in texts]
        padded = [row + [FILL] * (width - len(row)) for row in rows]
        rectangles.append(torch.tensor(padded, dtype=torch.int32).reshape(len(texts), width))
    return rectangles[0], rectangles[1]
