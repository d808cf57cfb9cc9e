"""Rollouts that are the data's own: word for word, closed or cut, unknown to any sampler, and no model's business."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.chunk import measure
from opd_lab.methods.opd import OPD
from opd_lab.models import LM
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.step import Models, whole_batch
from opd_lab.teacher.local import LocalTeacher
from opd_lab.types import ENDLESS, ENTROPY_STUDENT, LOGP_STUDENT, Behavior, Needs, Rollouts, Source, StopRule
from tests.tiny import make

PROMPTS = [[3, 4, 5], [6], [7, 8], [9, 10, 11, 12]]
SOLUTIONS = [[13, 14, 1], [15, 1], [3, 4, 5, 6, 7, 8, 1], [16, 1]]  # 1 ends a response
LIMIT = 5
STUDENT, TEACHER = make(seed=0), make(seed=1)
COIN = torch.tensor([0, ENDLESS, ENDLESS, 0])
GIVEN_B = COIN > 0


def sample(behavior: Behavior, student: LM = STUDENT, solutions: Any = SOLUTIONS) -> Rollouts:
    every_B = torch.arange(len(PROMPTS))
    return TorchEngine(LIMIT, 2).sample(
        student, PROMPTS, behavior=behavior, group_B=every_B // 2, uid_B=every_B + 100,
        generator=torch.Generator().manual_seed(0), teacher=TEACHER, solutions=solutions,
    )  # fmt: skip


def coin(seed: int, uid_B: Tensor, group_B: Tensor) -> Tensor:
    return COIN


def test_the_solutions_stand_there_word_for_word_and_too_long_ones_are_cut_without_an_end() -> None:
    rollouts = sample(Behavior(dataset=ENDLESS, temperature=0.1, suppressed=(13,)))  # filters are for who samples
    assert rollouts.response_BT.tolist() == [[13, 14, 1, 0, 0], [15, 1, 0, 0, 0], [3, 4, 5, 6, 7], [16, 1, 0, 0, 0]]
    assert rollouts.source_BT.tolist() == [[5, 5, 5, 0, 0], [5, 5, 0, 0, 0], [5] * 5, [5, 5, 0, 0, 0]]
    assert rollouts.attention_BL[:, 4:].tolist() == (rollouts.source_BT != Source.PADDING).tolist()
    assert rollouts.stopped_B.tolist() == [True, True, False, True]
    assert rollouts.mask_BT.sum() == 12 and rollouts.uid_B.tolist() == [100, 101, 102, 103]
    for value_BT in (rollouts.behavior_logp_BT, rollouts.logp_BT, rollouts.entropy_BT):
        assert value_BT.isnan().all()  # nobody sampled them, so a missing score is missing
    assert sample(Behavior(dataset=ENDLESS, limit=2)).length_B.tolist() == [2, 2, 2, 2]


def test_nobody_decodes_them() -> None:
    def never(*args: Any, **how: Any) -> Any:
        raise AssertionError("no model was to be asked")

    silent = make()
    silent.module.base_model.forward = never
    assert sample(Behavior(dataset=ENDLESS), silent).length_B.tolist() == [3, 2, 5, 2]


@pytest.mark.parametrize(
    "others",
    [
        Behavior(),
        Behavior(teacher_first=2),
        Behavior(stop=StopRule(d.reverse_kl, lambda score_RT: torch.full((len(score_RT),), -1))),
    ],
    ids=["student", "prefix", "stop"],
)
def test_the_other_rollouts_are_those_of_a_run_without_any(others: Behavior) -> None:
    alone, mixed = sample(others, solutions=None), sample(replace(others, dataset=coin))
    rows_R = (~GIVEN_B).nonzero()[:, 0]
    wide = torch.nn.functional.pad
    for field in fields(alone):
        if field.name not in ("extra", "reward_B"):
            one, two = getattr(alone, field.name)[rows_R], getattr(mixed, field.name)[rows_R]
            one = wide(one, (0, two.shape[-1] - one.shape[-1]), value=torch.nan if one.is_floating_point() else 0)
            assert torch.equal(one.nan_to_num(9), two.nan_to_num(9)), field.name
    given = mixed.rows(GIVEN_B)
    assert torch.equal(given.source_BT == Source.DATASET, given.mask_BT)
    assert given.length_B.tolist() == given.generated_B.tolist() == [2, 5]
    if others.helped:
        assert given.extra["teacher_decoded"].tolist() == [0, 0]
        assert (mixed.extra["teacher_decoded"][rows_R] > 0).all()


def test_what_a_method_reads_of_them_is_computed_and_not_missing() -> None:
    class Reads(OPD):
        def needs(self) -> Needs:
            return Needs(batch=frozenset({LOGP_STUDENT, ENTROPY_STUDENT}))

    rollouts = sample(Behavior(dataset=coin))
    models = Models(lambda part, signals: STUDENT.states(part), LocalTeacher(TEACHER))
    batch, _ = whole_batch(Reads(), rollouts, models, state={}, step=0, seed=0, micro_batch=3, chunk=4)
    mask_BT = rollouts.mask_BT
    with torch.no_grad():
        states = STUDENT.states(rollouts)
    seen = measure(frozenset({LOGP_STUDENT}), rollouts.response_BT[mask_BT], states, None, chunk=99)
    torch.testing.assert_close(batch[LOGP_STUDENT][mask_BT], seen[LOGP_STUDENT], atol=1e-5, rtol=0)
    assert batch[ENTROPY_STUDENT][mask_BT].isfinite().all() and batch[LOGP_STUDENT][~mask_BT].isnan().all()


def test_what_such_a_behavior_asks() -> None:
    for behavior in (Behavior(dataset=ENDLESS), Behavior(dataset=coin)):
        assert behavior.asks == {"dataset"} and not behavior.helped and not behavior.plain
    assert Behavior(dataset=coin, teacher_first=1).helped and not Behavior().helped
    with pytest.raises(AssertionError, match="needs the data's solutions"):
        sample(Behavior(dataset=coin), solutions=None)


def test_a_text_as_a_response_is_closed_by_the_end_that_is_written() -> None:
    assert STUDENT.response("a b b") == [3, 4, 4, 1]
    assert replace(STUDENT, stop_ids=frozenset({7, 1})).response("a") == [3, 1]
    assert replace(STUDENT, stop_ids=frozenset({7, 5})).response("a") == [3, 5]
