"""Behaviors in which the teacher takes part: who wrote which token, under which distribution, and what it cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.chunk import measure
from opd_lab.methods.coins import uniform
from opd_lab.models import LM
from opd_lab.rollout.torch_engine import TorchEngine, filtered
from opd_lab.types import (
    ENDLESS,
    ENTROPY_STUDENT,
    LOGP_STUDENT,
    LOGP_TEACHER,
    REVERSE_KL,
    Behavior,
    Rollouts,
    Signal,
    Source,
    StopRule,
)
from tests.tiny import make

PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11], [3, 3], [12, 13, 14, 15], [16], [5, 4, 3]]
STOPS = frozenset({1, 5, 8})
LIMIT = 12
STUDENT, TEACHER = (replace(make(seed=seed), stop_ids=STOPS) for seed in (0, 1))


def sample(
    behavior: Behavior, student: LM = STUDENT, teacher: LM | None = TEACHER, rows: int = 64, seed: int = 0
) -> Rollouts:
    every_B = torch.arange(len(PROMPTS))
    engine = TorchEngine(LIMIT, rows, seed=seed)
    return engine.sample(
        student,
        PROMPTS,
        behavior=behavior,
        group_B=every_B // 2,
        uid_B=every_B + 100,
        generator=torch.Generator().manual_seed(0),
        teacher=teacher,
    )


PLAIN = sample(Behavior(), teacher=None)
TEACHERS = sample(Behavior(), student=TEACHER, teacher=None)


def half(logp_RV: Tensor, logq_RV: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The arithmetic mean of both, and how much the teacher has on id 3."""
    return torch.logaddexp(logp_RV, logq_RV) - torch.tensor(2.0).log(), {"on_three": logq_RV[:, 3].exp()}


def first(tokens: list[int]) -> Behavior:
    return Behavior(teacher_first=lambda seed, uid_B, group_B: torch.tensor(tokens))


def when(kept: int, trigger: int) -> Behavior:
    """Cut every rollout to `kept` tokens once it has `trigger`."""

    def cut(d_RT: Tensor) -> Tensor:
        return torch.full((len(d_RT),), kept if d_RT.shape[1] == trigger else -1)

    return Behavior(stop=StopRule(d.reverse_kl, cut))


BEHAVIORS = {
    "mix": Behavior(mix=half),
    "teacher": Behavior(teacher_first=ENDLESS),
    "prefix": first([0, 3, 5, 1, 12, 2, 4]),
    "coin": Behavior(teacher_first=lambda seed, uid_B, group_B: ENDLESS * (uniform(seed, group_B) < 0.5)),
    "shared": Behavior(teacher_first=4, teacher_draws="group"),
    "stop": when(2, 4),
    "cap": Behavior(limit=lambda seed, uid_B, group_B: 1 + uid_B % 5),
    "filtered": Behavior(temperature=0.7, top_p=0.9, mix=half),
}


def ids(rollouts: Rollouts) -> list[list[int]]:
    return [ids_T[on_T].tolist() for ids_T, on_T in zip(rollouts.response_BT, rollouts.mask_BT)]


def scored(rollouts: Rollouts, *signals: Signal) -> dict[Signal, Tensor]:
    """What teacher-forced passes say of the tokens."""
    with torch.no_grad():
        states = (STUDENT.states(rollouts), TEACHER.states(rollouts))
    return measure(frozenset(signals), rollouts.response_BT[rollouts.mask_BT], *states, chunk=64)


def same(one: Rollouts, other: Rollouts) -> None:
    for name in ("ids_BL", "attention_BL", "source_BT", "behavior_logp_BT", "logp_BT", "entropy_BT", "stopped_B"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=0, rtol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("name", BEHAVIORS)
def test_log_probs_equal_teacher_forced_passes(name: str) -> None:
    """Both caches hold what the models would have read in one go; logp and entropy are the student's on every token."""
    behavior = BEHAVIORS[name]
    rollouts = sample(behavior, rows=3)
    mask_BT = rollouts.mask_BT
    seen = scored(rollouts, LOGP_STUDENT, LOGP_TEACHER, ENTROPY_STUDENT)
    torch.testing.assert_close(rollouts.logp_BT[mask_BT], seen[LOGP_STUDENT], atol=1e-4, rtol=0)
    torch.testing.assert_close(rollouts.entropy_BT[mask_BT], seen[ENTROPY_STUDENT], atol=1e-4, rtol=0)
    expected_N = seen[LOGP_STUDENT]
    source_N = rollouts.source_BT[mask_BT]
    if behavior.mix:
        assert (source_N == Source.BLEND).all()
        with torch.no_grad():
            p_NV, q_NV = (lm.states(rollouts).logits().log_softmax(-1) for lm in (STUDENT, TEACHER))
        mu_NV = filtered(half(p_NV, q_NV)[0], behavior)
        expected_N = mu_NV.gather(-1, rollouts.response_BT[mask_BT][:, None])[:, 0]
        torch.testing.assert_close(rollouts.extra["on_three"][mask_BT], q_NV[:, 3].exp(), atol=1e-4, rtol=0)
    expected_N = torch.where(source_N == Source.TEACHER, seen[LOGP_TEACHER], expected_N)
    torch.testing.assert_close(rollouts.behavior_logp_BT[mask_BT], expected_N, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("name", BEHAVIORS)
def test_batching_changes_nothing(name: str, rows: int) -> None:
    together, split = sample(BEHAVIORS[name]), sample(BEHAVIORS[name], rows=rows)
    assert torch.equal(together.ids_BL, split.ids_BL) and torch.equal(together.source_BT, split.source_BT)
    torch.testing.assert_close(together.behavior_logp_BT, split.behavior_logp_BT, atol=1e-5, rtol=0, equal_nan=True)
    assert together.extra.keys() == split.extra.keys()
    for column, value in together.extra.items():
        torch.testing.assert_close(value, split.extra[column], atol=1e-5, rtol=0, equal_nan=True)


def test_a_blend_that_is_the_student_or_the_teacher_gives_their_rollouts_bit_for_bit() -> None:
    as_student = sample(Behavior(mix=lambda logp_RV, logq_RV: (logp_RV, {})))
    same(replace(as_student, source_BT=PLAIN.source_BT), PLAIN)
    as_teacher = sample(Behavior(mix=lambda logp_RV, logq_RV: (logq_RV, {})))
    assert torch.equal(as_teacher.ids_BL, TEACHERS.ids_BL)
    on = TEACHERS.mask_BT
    assert torch.equal(as_teacher.behavior_logp_BT[on], TEACHERS.behavior_logp_BT[on])
    assert ids(PLAIN) != ids(TEACHERS)


def test_the_teacher_writes_whole_rollouts() -> None:
    rollouts = sample(Behavior(teacher_first=ENDLESS))
    assert torch.equal(rollouts.ids_BL, TEACHERS.ids_BL) and torch.equal(rollouts.stopped_B, TEACHERS.stopped_B)
    assert (rollouts.source_BT[rollouts.mask_BT] == Source.TEACHER).all()
    assert torch.equal(rollouts.behavior_logp_BT[rollouts.mask_BT], TEACHERS.logp_BT[TEACHERS.mask_BT])


def test_nothing_asked_of_the_teacher_is_plain() -> None:
    same(sample(first([0] * 7)), PLAIN)
    same(sample(Behavior(limit=LIMIT + 3)), PLAIN)
    same(sample(Behavior(stop=StopRule(d.reverse_kl, lambda d_RT: torch.full((len(d_RT),), -1)))), PLAIN)


def test_a_prefix_is_the_teachers_beginning_and_counts() -> None:
    tokens = [0, 3, 5, 1, 12, 2, 4]
    rollouts = sample(first(tokens))
    for row, own, theirs, n, source_T in zip(ids(rollouts), ids(PLAIN), ids(TEACHERS), tokens, rollouts.source_BT):
        assert row[:n] == theirs[:n] and len(row) <= LIMIT
        assert source_T.tolist()[: len(row)] == ([Source.TEACHER] * n + [Source.STUDENT] * LIMIT)[: len(row)]
        if len(theirs) <= n and theirs[-1] in STOPS:
            assert row == theirs  # the teacher stopped, so nobody goes on
        if n == 0:
            assert row == own
    decoded_B = torch.tensor(tokens).minimum(rollouts.length_B)
    assert torch.equal(rollouts.extra["teacher_decoded"], decoded_B)
    assert torch.equal((rollouts.source_BT == Source.TEACHER).sum(1), decoded_B)


def test_a_coin_per_prompt_is_a_pure_function_of_seed_and_group() -> None:
    def teachers(seed: int) -> list[bool]:
        return (sample(BEHAVIORS["coin"], seed=seed).source_BT[:, 0] == Source.TEACHER).tolist()

    for seed in range(4):
        coins = [float(uniform(seed, group)) < 0.5 for group in range(4)]
        assert teachers(seed) == [coins[row // 2] for row in range(7)]
    assert len({tuple(teachers(seed)) for seed in range(4)}) > 1


def test_rollouts_of_a_prompt_may_share_what_the_teacher_wrote() -> None:
    every_B, prompts = torch.arange(4), [[3, 4]] * 4
    keys: dict[str, Any] = {"group_B": every_B // 2, "uid_B": every_B, "teacher": TEACHER}
    found = {}
    for draws in ("rollout", "group"):
        generator = torch.Generator().manual_seed(3)
        behavior = Behavior(teacher_first=4, teacher_draws=draws, suppressed=tuple(STOPS))
        found[draws] = ids(
            TorchEngine(LIMIT, 3).sample(STUDENT, prompts, behavior=behavior, generator=generator, **keys)
        )
    a, b, c, e = found["group"]
    assert a[:4] == b[:4] and c[:4] == e[:4] and a[:4] != c[:4] and a[4:] != b[4:]
    assert found["rollout"][0] == a and found["rollout"][1][:4] != b[:4]


def test_limits_per_rollout() -> None:
    rollouts = sample(BEHAVIORS["cap"])
    limits = [1 + uid % 5 for uid in rollouts.uid_B.tolist()]
    assert ids(rollouts) == [row[:n] for row, n in zip(ids(PLAIN), limits)]
    ended = [len(row) <= n and row[-1] in STOPS for row, n in zip(ids(PLAIN), limits)]
    assert rollouts.stopped_B.tolist() == ended
    assert "teacher_decoded" not in rollouts.extra


def test_a_stop_rule_cuts_and_what_it_cut_still_counts() -> None:
    rollouts = sample(when(2, 4))
    lengths = [len(row) for row in ids(PLAIN)]
    cut = [n >= 4 for n in lengths]
    assert any(cut) and not all(cut)
    assert ids(rollouts) == [row[:2] if c else row for row, c in zip(ids(PLAIN), cut)]
    assert rollouts.generated_B.tolist() == [4 if c else n for c, n in zip(cut, lengths)]
    assert rollouts.cut_B.tolist() == cut and not rollouts.stopped_B[rollouts.cut_B].any()
    assert torch.equal(rollouts.extra["teacher_decoded"], rollouts.generated_B)
    off_BT = ~rollouts.mask_BT
    for value_BT in (rollouts.behavior_logp_BT, rollouts.logp_BT, rollouts.entropy_BT):
        assert value_BT[off_BT].isnan().all()
    assert not rollouts.attention_BL[:, -rollouts.source_BT.shape[1] :][off_BT].any()


def test_a_stop_rule_sees_the_divergence_of_every_token_so_far() -> None:
    seen: list[Tensor] = []

    def cut(d_RT: Tensor) -> Tensor:
        seen.append(d_RT.clone())
        return torch.full((len(d_RT),), -1)

    rollouts = sample(Behavior(stop=StopRule(d.reverse_kl, cut), temperature=0.6, top_p=0.9))
    score_BT, mask_BT = rollouts.extra["stop_score"], rollouts.mask_BT
    torch.testing.assert_close(score_BT[mask_BT], scored(rollouts, REVERSE_KL)[REVERSE_KL], atol=1e-4, rtol=0)
    assert torch.equal(score_BT.isnan(), ~mask_BT)
    assert [d_RT.shape[1] for d_RT in seen] == list(range(1, int(rollouts.length_B.max()) + 1))
    last_R = rollouts.length_B.argmax()
    torch.testing.assert_close(seen[-1][-1], score_BT[last_R, : seen[-1].shape[1]], atol=0, rtol=0)


def test_a_rollout_may_be_cut_to_nothing() -> None:
    rollouts = sample(when(0, 1))
    assert rollouts.length_B.tolist() == [0] * 7 and rollouts.generated_B.tolist() == [1] * 7
    assert rollouts.cut_B.all() and not rollouts.mask_BT.any()


def test_the_teacher_reads_no_more_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    forward = TEACHER.body.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(TEACHER.body, "forward", counting)
    for plain in (Behavior(), Behavior(temperature=0.9), Behavior(limit=3), first([0] * 7)):
        sample(plain)
    assert calls == []
    sample(first([0, 0, 0, 0, 2, 0, 1]))
    assert calls == [(2, 4), (2, 1)]  # two rows that need it, two tokens


def test_rows_and_extra_columns_stay_together() -> None:
    rollouts = sample(when(2, 4))
    some = rollouts.rows(torch.tensor([3, 1]))
    assert torch.equal(some.generated_B, rollouts.generated_B[[3, 1]])
    both = (some.extra["stop_score"], rollouts.extra["stop_score"][[3, 1]])
    torch.testing.assert_close(*both, atol=0, rtol=0, equal_nan=True)


def test_what_a_behavior_asks_and_whether_it_is_plain() -> None:
    assert Behavior().plain and not Behavior().asks
    for behavior, asked in (
        (Behavior(temperature=0.9), set()),
        (Behavior(limit=5), set()),
        (Behavior(teacher_first=1), {"teacher_tokens"}),
        (Behavior(mix=half), {"blend"}),
        (when(1, 1), {"stop"}),
    ):
        assert not behavior.plain and behavior.asks == asked
    with pytest.raises(AssertionError, match="need the teacher"):
        sample(Behavior(mix=half), teacher=None)
