"""SKD, fixed epsilon, temperature warm-up, fixed prefixes, random cuts: golden numbers, laws, error texts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.base import TRAINED
from opd_lab.methods.blends import nearest_in_ball, replaced_outside
from opd_lab.methods.own_rollouts import FixedPrefix, RandomCut, TemperatureWarmup
from opd_lab.methods.skd import SKD
from opd_lab.methods.trb import TRB
from opd_lab.rollout.torch_engine import filtered
from opd_lab.types import ENDLESS, Batch, Behavior
from tests.methods.by_hand import FACTS
from tests.pair import LOGP, LOGQ, near
from tests.tiny import rollouts

P1, Q1 = LOGP[None], LOGQ[None]


@pytest.mark.parametrize(
    ("tau", "mu"),
    [
        (1.0, (0.075 + 0.0, 0.5, 0.1125, 0.0375, 0.275)),
        (0.5, (0.026316, 0.621053, 0.059211, 0.006579, 0.286842)),
    ],
)
def test_skd_by_hand(tau: float, mu: tuple[float, ...]) -> None:
    logmu_RV, columns = replaced_outside(P1, Q1, 2, tau)
    near(logmu_RV.exp()[0], *mu)
    near(columns["replaced"], 0.75)  # the teacher's two likeliest hold .25 of the student
    near(columns["deviation"], float(d.reverse_kl(logmu_RV, P1)))
    near(columns["gain"], float(d.reverse_kl(P1, Q1) - d.reverse_kl(logmu_RV, Q1)))


def test_skd_is_a_proposal_and_its_replacement() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 200_000
    proposal_N = torch.multinomial(LOGP.exp(), n, replacement=True, generator=generator)
    again_N = torch.multinomial((2 * LOGQ).softmax(-1), n, replacement=True, generator=generator)
    inside_N = (proposal_N == 1) | (proposal_N == 4)
    share_V = torch.bincount(torch.where(inside_N, proposal_N, again_N), minlength=5) / n
    torch.testing.assert_close(share_V.double(), replaced_outside(P1, Q1, 2, 0.5)[0].exp()[0], atol=0.005, rtol=0)


def test_skd_lets_everything_pass_at_the_whole_vocabulary() -> None:
    for k in (5, 10**9):
        logmu_RV, columns = replaced_outside(P1, Q1, k, 0.2)
        assert torch.equal(logmu_RV, P1) and columns["replaced"] == 0
    gone = torch.full((1, 1), -torch.inf, dtype=torch.float64)
    logmu_RV, _ = replaced_outside(torch.cat([P1, gone], 1), torch.cat([Q1, gone], 1), 2, 0.5)
    near(logmu_RV.exp()[0], 0.026316, 0.621053, 0.059211, 0.006579, 0.286842, 0.0)


def test_skd_blends_with_its_own_settings() -> None:
    mix = SKD(teacher_k=2, teacher_temperature=0.5).behavior(Behavior(), 3, {}).mix
    assert mix is not None and torch.equal(mix(P1, Q1)[0], replaced_outside(P1, Q1, 2, 0.5)[0])


def test_fixed_epsilon_by_hand() -> None:
    logmu_RV, columns = nearest_in_ball(P1, Q1, 0.02, 60)
    near(columns["beta"], 0.177818)
    near(logmu_RV.exp()[0], 0.413177, 0.248894, 0.165024, 0.097258, 0.075647)
    near(d.reverse_kl(logmu_RV, Q1), 0.444335)
    near(nearest_in_ball(P1, Q1, 0.2, 60)[1]["beta"], 0.547321)
    fixed = TRB(schedule="constant", initial_budget_nats=0.01)
    assert fixed.behavior(Behavior(), 10**6, {}).asks == {"blend"}


def test_temperature_by_hand() -> None:
    warm = TemperatureWarmup(initial_temperature=0.9, warmup_steps=15)
    for step, tau in ((0, 0.9), (5, 0.933333), (15, 1.0), (20, 1.0)):
        assert warm.temperature(step) == pytest.approx(tau, abs=1e-6)
        assert warm.behavior(Behavior(top_k=4), step, {}) == Behavior(warm.temperature(step), top_k=4)
    near(filtered(P1, warm.behavior(Behavior(), 0, {})).exp()[0], 0.535219, 0.193364, 0.140461, 0.089516, 0.041440)
    assert warm.behavior(Behavior(), 15, {}).plain
    assert warm.metrics(batch([[4, 1]], step=6), {}) == pytest.approx(
        {"temperature_warmup/temperature_ratio": 0.933333}
    )
    with pytest.raises(ValueError, match=r"ends at temperature 1; set rollout\.temperature=1, got 0\.7"):
        warm.check(replace(FACTS, behavior=Behavior(temperature=0.7)))


def batch(responses: list[list[int]], step: int = 0, seed: int = 0) -> Batch:
    some = rollouts([[3]] * len(responses), responses)
    return Batch(replace(some, uid_B=torch.arange(len(responses)) + 50), {}, step=step, seed=seed)


def test_a_fixed_prefix_is_a_limit() -> None:
    assert FixedPrefix().behavior(Behavior(), 0, {}) == Behavior(limit=1024)
    assert FixedPrefix(prefix_tokens=ENDLESS).behavior(Behavior(), 0, {}).plain
    found = FixedPrefix(prefix_tokens=3).metrics(batch([[4, 4, 4], [4, 4, 1], [4, 1]]), {})
    assert found == {"fixed_prefix/limited_fraction": pytest.approx(1 / 3)}


def kept(cut: RandomCut, some: Batch) -> Tensor:
    return cut.weights(some)[TRAINED].sum(1).long()


def test_random_cuts_keep_a_uniform_share() -> None:
    lengths = [1 + n % 10 for n in range(4000)]
    some = batch([[4] * n for n in lengths])
    kept_B = kept(RandomCut(), some)
    assert (kept_B >= 1).all() and (kept_B <= torch.tensor(lengths)).all()
    ten_N = kept_B[torch.tensor(lengths) == 10]
    share_K = torch.bincount(ten_N, minlength=11)[1:] / len(ten_N)
    torch.testing.assert_close(share_K, torch.full((10,), 0.1), atol=5 * math.sqrt(0.09 / 400), rtol=0)
    half_B = kept(RandomCut(probability=0.5), some) < torch.tensor(lengths)
    assert float(half_B.double().mean()) == pytest.approx(0.5 * sum(1 - 1 / n for n in lengths) / 4000, abs=0.04)
    assert torch.equal(kept(RandomCut(probability=0.0), some), torch.tensor(lengths))


def test_random_cuts_belong_to_seed_and_rollout() -> None:
    some = batch([[4] * 9] * 40)
    kept_B = kept(RandomCut(), some)
    order_B = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    turned = replace(some, rollouts=some.rollouts.rows(order_B))
    assert torch.equal(kept(RandomCut(), turned), kept_B[order_B])
    assert not torch.equal(kept(RandomCut(), replace(some, seed=1)), kept_B)
    weights = RandomCut().weights(some)
    assert RandomCut().metrics(some, weights) == {
        "random_cut/kept_fraction": pytest.approx(float(kept_B.sum()) / 360),
        "random_cut/kept_mean_tokens": pytest.approx(float(kept_B.double().mean())),
    }


@pytest.mark.parametrize(
    ("cls", "keys", "words"),
    [
        (SKD, {"teacher_k": 0}, "method.teacher_k must be >= 1, got 0"),
        (SKD, {"teacher_temperature": 0.0}, "method.teacher_temperature must be > 0, got 0"),
        (SKD, {"support": "sampled"}, "method.support must be student or full, got sampled"),
        (TemperatureWarmup, {"initial_temperature": 0.0}, "initial_temperature must be > 0, got 0; 1 is plain OPD"),
        (
            TemperatureWarmup,
            {"warmup_steps": 0},
            "warmup_steps must be >= 1, got 0; for none set initial_temperature=1",
        ),
        (FixedPrefix, {"prefix_tokens": 0}, "method.prefix_tokens must be >= 1, got 0"),
        (RandomCut, {"probability": 1.5}, r"method.probability must be in \[0, 1\], got 1.5"),
    ],
)
def test_values_that_are_refused(cls: Any, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cls(**keys)


def test_skd_blends_the_models_own_distributions_only() -> None:
    with pytest.raises(ValueError, match=r"SKD blends the untempered distributions; set rollout\.temperature=1"):
        SKD().check(replace(FACTS, behavior=Behavior(temperature=0.7)))
