"""What several prompts begin with is read once, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from opd_lab.rollout.reader import Reader, owners
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.types import Behavior, Rollouts
from tests.tiny import make

ROW, FORK = [3, 4, 5, 6, 7, 8, 9], [3, 4, 5, 9]
NESTED = [ROW[:2], FORK, ROW, [10, 11], ROW[:5], ROW, [3]]


def decode(lm, prompts: list[list[int]], decode_rows: int, teacher=None, **how) -> Rollouts:
    rows_B = torch.arange(len(prompts))
    engine = TorchEngine(10, decode_rows)
    generator = torch.Generator().manual_seed(3)
    return engine.sample(
        lm, prompts, behavior=Behavior(**how), group_B=rows_B, uid_B=rows_B, generator=generator, teacher=teacher
    )


def test_who_begins_with_whom() -> None:
    """[3, 4], [3, 4, 5] and [3] open both the row and its fork: either may read them."""
    owner = owners(NESTED)
    assert owner[3] == 3 and owner[4] in (2, 5) and owner[2] == owner[5] in (2, 5)
    assert owner[1] == 1 and all(NESTED[owner[b]][: len(NESTED[b])] == NESTED[b] for b in range(len(NESTED)))
    assert owner[owner[0]] == owner[0] and owner[owner[6]] == owner[6]
    assert len(set(owner)) == 3
    assert owners([[1], [2, 1], [1, 2]]) == [2, 1, 2]


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma2_softcap"])
def test_tokens_and_scores_are_those_of_prompts_read_alone(kind: str) -> None:
    """Gemma's first layer looks back three tokens only: a gap in the cache would shift its window."""
    lm = make(kind, **({"sliding_window": 3} if kind == "gemma2_softcap" else {}))
    alone, together = decode(lm, NESTED, decode_rows=1), decode(lm, NESTED, decode_rows=64)
    assert torch.equal(alone.ids_BL, together.ids_BL) and torch.equal(alone.stopped_B, together.stopped_B)
    for name in ("logp_BT", "entropy_BT", "behavior_logp_BT"):
        torch.testing.assert_close(getattr(alone, name), getattr(together, name), atol=1e-5, rtol=0, equal_nan=True)
    assert alone.extra["shared"].tolist() == [0] * 7
    shared = together.extra["shared"].tolist()
    assert sorted(shared) == [0, 0, 0, 1, 2, 5, 7] and shared[1] == shared[3] == 0 and shared[4] == 5


def test_so_does_a_teacher_that_writes_beside_it() -> None:
    student, teacher = make(seed=0), make(seed=1)
    alone, together = (decode(student, NESTED, rows, teacher, teacher_first=4) for rows in (1, 64))
    assert torch.equal(alone.ids_BL, together.ids_BL) and torch.equal(alone.source_BT, together.source_BT)


def test_the_tokens_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prompts of 7 columns at most where seven rows would be 49, then a token of each row."""
    lm, seen = make(), []
    body = lm.body.forward

    def counting(*args, **kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))
        return body(*args, **kwargs)

    monkeypatch.setattr(lm.body, "forward", counting)
    with torch.no_grad():
        reader = Reader(lm, NESTED, 2)
        first_RV = reader.read(None)
        reader.read(torch.full((7, 1), 12))
        reader.keep(torch.tensor([0, 4]))
        last_RV = reader.read(torch.full((2, 1), 13))
        assert seen == [(3, 7), (7, 1), (2, 1)]
        for row, ids in enumerate(NESTED):
            whole_V = lm.module(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(first_RV[row], whole_V, atol=1e-5, rtol=0)
        for row, ids in enumerate((NESTED[0], NESTED[4])):
            whole_V = lm.module(input_ids=torch.tensor([[*ids, 12, 13]])).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(last_RV[row], whole_V, atol=1e-5, rtol=0)
