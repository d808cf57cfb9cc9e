"""The teacher's prefixes of TrOPD: how long, whose, until when; and what TrOPD refuses."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from opd_lab.doctor import compatible
from opd_lab.methods.tropd import TrOPD
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.types import Behavior, Rollouts, Source
from tests.methods.by_hand import FACTS
from tests.methods.test_tropd import tropd
from tests.tiny import make

STOPS = frozenset({1, 5, 8})
STUDENT, TEACHER = (replace(make(seed=seed), stop_ids=STOPS) for seed in (0, 1))
PROMPTS = [[3, 4, 5], [3, 4, 5], [3, 4, 5], [9, 10], [9, 10], [9, 10], [2], [2], [2]]
LIMIT = 12


def rollouts_of(method: TrOPD, step: int = 0, uid: int = 0, seed: int = 0) -> Rollouts:
    """Three rollouts of each of three prompts."""
    rows_B = torch.arange(len(PROMPTS))
    return TorchEngine(LIMIT, 64, seed=seed).sample(
        STUDENT,
        PROMPTS,
        behavior=method.behavior(Behavior(), step, {}),
        group_B=rows_B // 3,
        uid_B=rows_B + uid,
        generator=torch.Generator().manual_seed(1),
        teacher=TEACHER,
    )


def by_teacher(rollouts: Rollouts) -> list[int]:
    return (rollouts.source_BT == Source.TEACHER).sum(1).tolist()


def lengths(method: TrOPD, uids: int, step: int = 0) -> list[int]:
    first = method.behavior(Behavior(), step, {}).teacher_first
    assert not isinstance(first, int)
    return first(0, torch.arange(uids), torch.arange(uids) // 3).tolist()


def test_the_cosine_of_the_paper() -> None:
    method = tropd(prefix_steps=200, prefix_max_tokens=8096)
    found = [method.longest_prefix(t) for t in (0, 1, 50, 100, 150, 199, 200, 300)]
    assert found == pytest.approx([8096, 8095.500608, 6910.368250, 4048, 1185.631750, 0.499392, 0, 0], abs=1e-6)


def test_the_cosine_rounded_down() -> None:
    method = tropd(prefix_steps=10, prefix_max_tokens=64)
    behaviors = [method.behavior(Behavior(), t, {}) for t in range(11)]
    assert [b.teacher_first for b in behaviors] == [64, 62, 57, 50, 41, 32, 22, 13, 6, 1, 0]
    assert behaviors[-1].plain and not behaviors[-2].plain


def test_a_cap_lets_the_teacher_write_what_it_may_and_stop() -> None:
    rollouts = rollouts_of(tropd(prefix_max_tokens=4))
    length_B, written = rollouts.length_B.tolist(), by_teacher(rollouts)
    assert max(length_B) <= LIMIT
    assert all(t == min(4, n) for t, n in zip(written, length_B))  # fewer only where the teacher stopped
    ended = [b for b, (t, n) in enumerate(zip(written, length_B)) if t == n]
    assert 0 < len(ended) < len(PROMPTS)
    for b in ended:
        assert int(rollouts.response_BT[b, length_B[b] - 1]) in STOPS
        assert not (rollouts.source_BT[b] == Source.STUDENT).any()


def test_the_prefix_counts_in_the_response_limit() -> None:
    rollouts = rollouts_of(tropd(prefix_max_tokens=LIMIT))
    assert by_teacher(rollouts) == rollouts.length_B.tolist() and int(rollouts.length_B.max()) <= LIMIT


def test_a_teacher_token_is_generated_and_knows_who_drew_it() -> None:
    rollouts = rollouts_of(tropd(prefix_max_tokens=4))
    teacher_BT = rollouts.source_BT == Source.TEACHER
    assert rollouts.mask_BT[teacher_BT].all()
    assert not torch.isclose(rollouts.behavior_logp_BT, rollouts.logp_BT)[teacher_BT].all()
    student_BT = rollouts.mask_BT & ~teacher_BT
    assert torch.equal(rollouts.behavior_logp_BT[student_BT], rollouts.logp_BT[student_BT])


@pytest.mark.parametrize("draw", ["per_rollout", "per_prompt"])
def test_rollouts_of_a_prompt_share_the_teachers_tokens_if_asked(draw: str) -> None:
    rollouts = rollouts_of(tropd(prefix_max_tokens=4, prefix_draw=draw))
    heads = [tuple(ids_T[:4].tolist()) for ids_T in rollouts.response_BT]
    kinds = [len(set(heads[b : b + 3])) for b in (0, 3, 6)]
    assert kinds == [1, 1, 1] if draw == "per_prompt" else max(kinds) > 1


def test_uniform_lengths_are_uniform() -> None:
    found = torch.tensor(lengths(tropd(prefix_length="uniform"), 9000))
    counts_K = torch.bincount(found, minlength=9)
    assert len(counts_K) == 9 and ((counts_K - 1000).abs() < 4 * 1000**0.5).all()


def test_uniform_lengths_belong_to_rollouts_or_prompts_and_change_with_the_step() -> None:
    own, shared = tropd(prefix_length="uniform"), tropd(prefix_length="uniform", prefix_draw="per_prompt")
    assert lengths(own, 30) == lengths(own, 60)[:30] and lengths(own, 30) != lengths(own, 30, step=1)
    of_prompts = lengths(shared, 30)
    assert all(len(set(of_prompts[b : b + 3])) == 1 for b in range(0, 30, 3)) and len(set(of_prompts)) > 1
    assert by_teacher(rollouts_of(own)) == by_teacher(rollouts_of(own))


def test_without_a_prefix_the_student_writes_and_nothing_is_asked() -> None:
    for method in (tropd(prefix_schedule="none"), tropd(prefix_max_tokens=0)):
        assert method.behavior(Behavior(), 0, {}).plain and not method.asks()
        assert method.not_zero_at_teacher is None
    assert tropd().asks().keys() == {"teacher_tokens"} == tropd().behavior(Behavior(), 0, {}).asks


def test_an_engine_that_cannot_begin_with_teacher_tokens() -> None:
    parts = cast(Any, SimpleNamespace(method=tropd(), engine=SimpleNamespace(supports=frozenset())))
    with pytest.raises(ValueError, match=r"use rollout=torch, or method.prefix_schedule=none"):
        compatible(FACTS, parts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"region": "trusted"}, "method.region must be one of speculative, expected, threshold, everything, nothing"),
        ({"outlier": "drop"}, "method.outlier must be one of fkl, fkl_reward, clip, mask, got drop"),
        ({"region": "nothing", "outlier": "mask"}, "method.region=nothing with method.outlier=mask trains nothing"),
        (
            {"threshold_nats": 0.5},
            "method.threshold_nats must be < 0, got 0.5: it is a floor for log p_teacher - log p_student",
        ),
        ({"threshold_nats": 0.0}, "method.threshold_nats must be < 0, got 0: "),
        ({"k": 0}, "method.k must be >= 1, got 0"),
        ({"tail": "cut"}, "method.tail must be one of bucket, renormalise, truncate, got cut"),
        ({"trust_estimator": "k3"}, "method.trust_estimator must be one of sampled, exact, got k3"),
        ({"guidance_weight": -0.1}, "method.guidance_weight must be >= 0, got -0.1"),
        ({"prefix_schedule": "linear"}, "method.prefix_schedule must be one of cosine, none, got linear"),
        (
            {"prefix_steps": 0},
            "method.prefix_steps must be >= 1, got 0; for no prefix set method.prefix_schedule=none",
        ),
        ({"prefix_length": "whole"}, "method.prefix_length must be one of cap, uniform, got whole"),
        ({"prefix_draw": "once"}, "method.prefix_draw must be one of per_rollout, per_prompt, got once"),
        ({"denominator": "terms"}, "method.denominator must be one of tokens, regions, got terms"),
    ],
)
def test_settings_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        tropd(**settings)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("tokens", [600, -1])
def test_a_prefix_longer_than_a_response_is_refused(tokens: int) -> None:
    facts = replace(FACTS, max_tokens=512)
    with pytest.raises(ValueError) as error:
        tropd(prefix_max_tokens=tokens).check(facts)
    assert str(error.value) == f"method.prefix_max_tokens must be in [0, rollout.max_tokens=512], got {tokens}"
    tropd(prefix_max_tokens=512).check(facts)


@pytest.mark.parametrize("filters", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"suppressed": (3,)}])
def test_tokens_must_be_the_students_own(filters: dict[str, Any]) -> None:
    assumption = "the trust probability assumes tokens drawn from the student itself; set rollout.temperature=1"
    with pytest.raises(ValueError, match=assumption):
        tropd().check(replace(FACTS, behavior=Behavior(**filters)))
    with pytest.raises(ValueError, match=r"one update per rollout"):
        tropd().check(replace(FACTS, updates_per_rollout=2))


def test_a_support_larger_than_the_vocabulary_is_all_of_it() -> None:
    assert tropd(k=10**6).bind(FACTS).conventions()["topk_k"] == "151936"


def test_conventions_tell_the_variants_apart() -> None:
    tags = [
        tropd(**settings).conventions()
        for settings in ({}, {"outlier": "mask"}, {"region": "nothing"}, {"region": "everything"})
    ]
    divergences = ["reverse_kl+forward_kl", "reverse_kl+masked", "forward_kl", "reverse_kl"]
    assert [t["divergence"] for t in tags] == divergences
    assert [t["estimator"] for t in tags] == ["k1_score+top2", "k1_score", "top2", "k1_score"]
