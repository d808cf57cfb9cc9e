"""Similarity of texts: numbers worked out by hand, and the plain recursion."""

import random
import time

import pytest
import torch

from opd_lab.methods.similarity import edit, levenshtein, rouge1

# left, right: edit over characters, edit over words, ROUGE-1
G1 = [
    ("kitten", "sitting", 0.571428571, 0, 0),
    ("x = 2 + 3", "x = 3 + 2", 0.777777778, 0.6, 1),
    ("so we add 38", "so we add 48", 0.916666667, 0.75, 0.75),
    ("so we add 38", "then add 38", 0.583333333, 0.5, 0.571428571),
    ("47 plus 38 is 85", "47 plus 38 is 75", 0.9375, 0.8, 0.8),
    ("a b a", "a a b", 0.6, 0.333333333, 1),
    ("", "", 1, 1, 1),
    ("a", "", 0, 0, 0),
]


@pytest.mark.parametrize("column", [0, 1, 2], ids=["edit of characters", "edit of words", "rouge1"])
def test_g1_by_hand_all_pairs_at_once(column: int) -> None:
    left, right = ([pair[side] if column == 0 else pair[side].split() for pair in G1] for side in (0, 1))
    got_P = (rouge1 if column == 2 else edit)(left, right)
    torch.testing.assert_close(
        got_P, torch.tensor([row[2 + column] for row in G1], dtype=torch.float64), atol=1e-8, rtol=0
    )


def recursion(a: str, b: str) -> int:
    """The textbook."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


@pytest.mark.parametrize("alphabet", ["ab", "abcdefgh ", "añ→😀"])
def test_it_is_the_plain_recursion(alphabet: str) -> None:
    draw = random.Random(len(alphabet))
    left, right = (["".join(draw.choices(alphabet, k=draw.randint(0, 14))) for _ in range(200)] for _ in range(2))
    expected = [1 - recursion(a, b) / max(len(a), len(b), 1) for a, b in zip(left, right)]
    torch.testing.assert_close(edit(left, right), torch.tensor(expected, dtype=torch.float64))


def test_laws() -> None:
    draw = random.Random(0)
    left, right = (["".join(draw.choices("abc ", k=draw.randint(0, 9))) for _ in range(100)] for _ in range(2))
    for phi, unit in ((edit, str), (edit, str.split), (rouge1, str.split)):
        a, b = [unit(text) for text in left], [unit(text) for text in right]
        torch.testing.assert_close(phi(a, b), phi(b, a))
        assert bool(((phi(a, b) >= 0) & (phi(a, b) <= 1)).all())
        torch.testing.assert_close(phi(a, a), torch.ones(100).double())
        torch.testing.assert_close(phi(a, b)[:1], phi(a[:1], b[:1]))


def test_words_count_whatever_their_case_in_rouge1_alone() -> None:
    pair = [["So", "we"]], [["so", "WE"]]
    assert float(rouge1(*pair)) == 1 and float(edit(*pair)) == 0


def test_no_pair_and_only_empty_texts() -> None:
    assert edit([], []).shape == rouge1([], []).shape == (0,)
    assert edit(["", ""], ["", ""]).tolist() == [1, 1]
    nothing = torch.zeros(1, 0, dtype=torch.long)
    assert levenshtein(nothing, torch.tensor([[4, 5]]), torch.tensor([0]), torch.tensor([2])).tolist() == [2]


def test_a_hundred_pairs_of_chunks_cost_less_than_the_recursion() -> None:
    draw = random.Random(1)
    left, right = (["".join(draw.choices("abcdefgh ", k=200)) for _ in range(100)] for _ in range(2))
    begin = time.perf_counter()
    edit(left, right)
    ours = time.perf_counter() - begin
    begin = time.perf_counter()
    for a, b in zip(left[:10], right[:10]):
        recursion(a, b)
    assert ours < 10 * (time.perf_counter() - begin)
