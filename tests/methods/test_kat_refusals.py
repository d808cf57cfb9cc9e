"""KAT: what it refuses before the first token, and in which words."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from opd_lab.doctor import compatible
from opd_lab.methods.kat import KAT
from opd_lab.types import Behavior, topk_reverse_kl
from tests.methods.by_hand import FACTS
from tests.methods.traps import kat, trap

NEVER = (
    "method.window=64 and method.exempt_tokens=128 need at least 195 response tokens to cut anything, the limit is 48: "
    "this run would be plain OPD; use method=kat_lab or a longer limit"
)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"window": 0}, "method.window must be an integer >= 1 (tokens), got 0"),
        ({"consecutive": 0}, "method.consecutive must be >= 1 (windows), got 0"),
        ({"window_stride": 65}, "method.window_stride must be in [1, method.window=64], got 65"),
        (
            {"eta": 0.0},
            "method.eta must be in (0, 1], got 0; smaller cuts more; "
            "for no cut set method.threshold=fixed method.threshold_nats=0",
        ),
        ({"exempt_tokens": -1}, "method.exempt_tokens must be >= 0, got -1"),
        ({"exempt_rule": "none"}, "method.exempt_rule must be one of kept, decision, got none"),
        ({"buffer_rollouts": 0}, "method.buffer_rollouts must be >= 1, got 0"),
        (
            {"min_buffer_rollouts": 5000},
            "method.min_buffer_rollouts must be <= method.buffer_rollouts=4096, got 5000: the cut would never start",
        ),
        ({"warmup_steps": -1}, "method.warmup_steps must be >= 0, got -1"),
        ({"threshold_nats": -0.1}, "method.threshold_nats must be >= 0, got -0.1"),
        ({"keep": "pre_post"}, "method.keep=pre_post needs method.stop=posthoc"),
        ({"support": "top"}, "method.support must be one of student_top, teacher_top, full, got top"),
    ],
)
def test_what_no_run_can_have(keys: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as refused:
        KAT(**keys)
    assert str(refused.value) == text


@pytest.mark.parametrize(
    ("keys", "facts", "text"),
    [
        ({}, {"max_tokens": 48}, NEVER),
        (
            {"top_k": 0},
            {"vocabulary": 128},
            "method.top_k must be in [1, 128] for this vocabulary, got 0; use method.support=full",
        ),
        ({}, {"steps": 50}, "method.warmup_steps=50 must be below steps=50: this run would be plain OPD"),
    ],
)
def test_what_this_run_cannot_have(keys: dict[str, Any], facts: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError) as refused:
        KAT(**keys).check(replace(FACTS, **{"max_tokens": 195} | facts))
    assert str(refused.value) == text


@pytest.mark.parametrize("exempt_rule", ["kept", "decision"])
@pytest.mark.parametrize("exempt", [0, 1, 5, 9, 12])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_shortest_rollout_that_can_be_cut(exempt_rule: str, exempt: int, stride: int) -> None:
    method = kat(exempt_tokens=exempt, exempt_rule=exempt_rule, window_stride=stride)
    assert int(trap([0.0] * method.shortest, method).trigger_B) == method.shortest - 1
    assert int(trap([0.0] * (method.shortest - 1), method).trigger_B) == -1


def parts(method: KAT, provides: set[str], supports: set[str]) -> Any:
    teacher = SimpleNamespace(provides=frozenset(provides), lm=None if provides == {"sampled"} else 1)
    return SimpleNamespace(method=method, teacher=teacher, engine=SimpleNamespace(supports=supports), reference=None)


def test_an_engine_that_cannot_stop_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stop a rollout.*rollout=torch, or method.stop=posthoc \(same gradient"):
        compatible(FACTS, parts(KAT(), {"full"}, set()))
    compatible(FACTS, parts(KAT(stop="posthoc"), {"full"}, set()))


def test_sampled_token_scores_are_refused() -> None:
    with pytest.raises(ValueError, match=r"KAT needs topk_reverse_kl\(k=64, support=student\).*only give sampled"):
        compatible(FACTS, parts(KAT(stop="posthoc"), {"sampled"}, {"stop"}))


def test_nothing_but_the_divergence_is_asked_for() -> None:
    assert KAT().needs().tokens == {topk_reverse_kl(64, "student")}
    assert not KAT().needs().batch  # online it comes with the rollouts
    assert KAT(stop="posthoc").behavior(Behavior(), 99, {}) == Behavior()
