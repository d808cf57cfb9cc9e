"""The set of rock tokens that is chosen during the run: what it counts, when it changes, when it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lab.methods.rock_tokens import RockTokens
from opd_lab.types import REVERSE_KL, Source
from tests.methods.by_hand import FACTS
from tests.methods.rocks import IDS, KL, batch_of, consulted, gv3, objective, rocks, weights_of


def near(got: Tensor, *wanted: float) -> None:
    torch.testing.assert_close(got.flatten(), torch.tensor(wanted, dtype=torch.float64), atol=1e-12, rtol=0)


def online(**keys: Any) -> RockTokens:
    return RockTokens(**{"source": "online", "online_k": 1, "online_warmup": 1, "online_refresh": 1} | keys)


def after(method: RockTokens, *batches: Any) -> dict[str, Any]:
    state = method.init_state()
    for batch in batches:
        state = method.update(state, batch)
    return state


def test_online_counts_every_token_also_frozen_ones() -> None:
    first, second = batch_of(IDS[:1], KL[:1]), batch_of(IDS[1:], KL[1:])
    state = after(online(), first, second)
    assert state["count_V"].tolist() == [0, 0, 1, 2, 0, 1, 0, 3, 0, 1]
    near(state["kl_sum_V"][[2, 3, 5, 7, 9]], 0, 0.15, 1.5, 1.2, 2.0)
    near(state["kl_square_sum_V"][[2, 3, 5, 7, 9]], 0, 0.0125, 2.25, 0.56, 4.0)
    assert {state[name].dtype for name in ("count_V", "kl_sum_V", "kl_square_sum_V")} == {torch.float64}


def test_online_decay_forgets() -> None:
    state = after(online(online_decay=0.5), batch_of([[7, 3]], [[0.4, 0.2]]), batch_of([[7, 5]], [[0.1, 0.2]]))
    near(state["count_V"][[3, 5, 7]], 0.5, 1, 1.5)
    near(state["kl_sum_V"][[3, 5, 7]], 0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({}, [7]),  # rock score among 7, 3 and 2, which were seen twice
        ({"min_count": 1, "online_k": 2}, [9, 5]),
        ({"exclude_most_frequent": 1}, [3]),
        ({"online_score": "frequency", "online_k": 3}, [7, 3, 2]),
        ({"online_score": "mean_kl"}, [7]),
        ({"online_score": "lower_bound", "online_k": 2}, [3, 7]),
    ],
)
def test_online_sets(keys: dict[str, Any], wanted: list[int]) -> None:
    ids, kl = [*IDS[:1], [3, 7, 9, 7, 3, 2]], [*KL[:1], [0.05, 0.60, 2.00, 0, 0.15, 0.10]]  # GV2
    state = after(online(**keys), batch_of(ids, kl))
    assert state["ids"].tolist() == wanted
    method = online(**keys)
    hit_BT = torch.isin(gv3().rollouts.response_BT, torch.tensor(wanted)) & gv3().rollouts.mask_BT
    assert torch.equal(consulted(method, gv3(), state).consulted["frozen"], hit_BT)


def test_online_waits_then_refreshes_on_time_and_lets_types_leave() -> None:
    method = online(online_warmup=3, online_refresh=2)
    early, late = batch_of([[7, 7, 3, 3]], [[1.0, 1, 0.1, 0.1]]), batch_of([[7, 7, 3, 3]], [[0.0, 0, 9, 9]])
    state, sets, likeness = method.init_state(), [], []
    for batch in (early, early, early, late, late, late):
        sets.append(state["ids"].tolist())
        state = method.update(state, batch)
        likeness.append(state["jaccard"])
    assert sets == [[], [], [], [7], [7], [3]]  # the set of step t was made after step t - 1
    assert [math.isnan(x) for x in likeness] == [True] * 4 + [False] * 2
    assert likeness[-1] == 0
    assert weights_of(method, early).sum() == 4  # without a set nothing is frozen
    assert method.metrics(consulted(method, early, state), {})["rock_tokens/set_jaccard_fraction"] == 0


def test_online_refuses_a_set_that_leaves_nothing() -> None:
    with pytest.raises(ValueError) as refused:
        after(online(online_k=5), gv3())
    assert str(refused.value) == (
        "method.online_k must be smaller than the 5 observed token types, got 5: nothing would be left to train on"
    )
    with pytest.raises(ValueError, match="smaller than the 151936 token types of the vocabulary, got 200000"):
        online(online_k=200000).check(FACTS)
    online().check(FACTS)


def test_online_survives_a_step_without_tokens() -> None:
    empty = batch_of([[1]], [[0.0]])
    empty = replace(
        empty, rollouts=replace(empty.rollouts, source_BT=torch.full_like(empty.rollouts.source_BT, Source.PADDING))
    )
    method = online(online_warmup=2)
    assert after(method, empty)["count_V"].tolist() == []
    assert objective(method, empty) == 0


def test_only_online_remembers() -> None:
    assert rocks().init_state() == {} and rocks().update({}, gv3()) == {}
    assert rocks().needs().batch == frozenset()
    assert rocks(window="high_run").needs().batch == {REVERSE_KL}
