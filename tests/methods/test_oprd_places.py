"""OPRD's places: which states of which tokens are compared, through model, step and pass; and no LM head on the way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lab.chunk import Head, layers_of
from opd_lab.methods.oprd import Oprd, supervised
from opd_lab.models import LM
from opd_lab.step import Models, accumulate_gradient, whole_batch
from opd_lab.teacher.local import LocalTeacher
from opd_lab.types import Rollouts
from tests.tiny import make, rollouts

RAGGED = ([[3, 4, 5, 6], [7]], [[8, 1], [9, 10, 11]])


def two_blocks(**fields: Any) -> Oprd:
    return Oprd(layers=((1, 1), (2, 2)), **fields)


# G2: two rollouts, two blocks, all absolute positions ------------------------------------------------------------


def table(*rows: tuple[float, float]) -> Tensor:
    """States of ids 1, 2, ...; id 0 is padding, which must not be read."""
    return torch.cat([torch.full((1, 2), 1e6), torch.tensor(rows, dtype=torch.float)])


TABLES = {
    "student": (
        table((0, 0), (1, 0), (2, 1), (0, 2), (1, 1), (3, 0), (1, 2)),
        table((1, 1), (0, 1), (1, 1), (2, 0), (0, 0), (0, 2), (2, 2)),
    ),
    "teacher": (
        table((0, 1), (1, 1), (0, 1), (0, 0), (2, 1), (1, 0), (1, 0)),
        table((1, 0), (0, 3), (1, 2), (2, 2), (0, 1), (0, 1), (2, 0)),
    ),
}


class TableModel(torch.nn.Module):
    """Each block's state is looked up by the token alone, so that every position is known by hand."""

    def __init__(self, blocks: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.blocks = torch.nn.ParameterList(blocks)
        self.base_model = self.forward

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        states = [block[input_ids] for block in self.blocks]
        return SimpleNamespace(hidden_states=(None, *states), last_hidden_state=states[-1])

    def get_output_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.zeros(8, 2))


def table_model(owner: str) -> LM:
    module: Any = TableModel(TABLES[owner])
    return LM(module, None, owner, owner, frozenset({1}), 8)  # type: ignore[arg-type]


def value_of(method: Oprd, given: Rollouts, student: LM, teacher: LM) -> float:
    def states(part: Rollouts, signals: frozenset) -> Any:
        return student.states(part, layers_of("student", signals))

    batch, views = whole_batch(
        method, given, Models(states, LocalTeacher(teacher)), state={}, step=0, seed=0, micro_batch=1, chunk=2
    )
    found = accumulate_gradient(method, batch, method.weights(batch), states, views, micro_batch=1, chunk=2)
    return found.objective


G2 = {
    "predict": {"last_k": (1.4375, 1.5), "all": (1.375, 1.4375), "first_k": (1.25, 1.25), "last": (1.625, 1.625)},
    "token": {"last_k": (1.625, 1.5), "all": (1.625, 1.4375), "first_k": (1.8125, 1.75), "last": (1.25, 1.25)},
}


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("positions", G2["token"])
@pytest.mark.parametrize("align", G2)
def test_places_and_averages(align: str, positions: str, extra: int) -> None:
    given = rollouts([[1, 2], [6]], [[3, 4, 5], [7]], extra)
    for aggregation, wanted in zip(("sequence_mean", "token_mean"), G2[align][positions]):
        method = two_blocks(k=2, align=align, positions=positions, aggregation=aggregation)
        assert value_of(method, given, table_model("student"), table_model("teacher")) == pytest.approx(wanted)


def test_supervised_tokens_are_counted_among_the_generated_ones() -> None:
    mask_BT = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()  # the first was given
    rows = {
        "last_k": [[0, 0, 1, 1, 0], [1, 0, 0, 0, 0], [0] * 5],
        "first_k": [[0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0] * 5],
        "last": [[0, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0] * 5],
    }
    for positions, wanted in rows.items():
        assert supervised(mask_BT, positions, 2).long().tolist() == wanted
    assert torch.equal(supervised(mask_BT, "all", 2), mask_BT)


# the LM head is left alone -----------------------------------------------------------------------------------------


def test_it_trains_without_any_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """No loss on tokens and nothing recorded: neither model's head is run, and none gets a gradient."""

    def refuse(*_: Any) -> None:
        raise AssertionError("an LM head was run")

    student, teacher = make("llama"), make("llama", seed=1)
    monkeypatch.setattr(Head, "logits", refuse)
    for lm in (student, teacher):
        monkeypatch.setattr(lm.module.lm_head, "forward", refuse)
    assert value_of(two_blocks(), rollouts(*RAGGED), student, teacher) > 0
    gradients = {name: p.grad for name, p in student.module.named_parameters()}
    assert gradients.pop("lm_head.weight") is None
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients.values())
    assert [p.grad for p in teacher.module.parameters()] == [None] * len(gradients) + [None]
