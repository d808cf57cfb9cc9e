"""FiRe-OPD: the golden vectors G1 to G6 of its specification, worked out by hand, its laws and its edges."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lab.chunk import Chunk
from opd_lab.divergence import weighted_mean
from opd_lab.methods.base import quantile
from opd_lab.methods.fire_opd import FireOPD, places
from opd_lab.types import (
    ENTROPY_STUDENT,
    ENTROPY_TEACHER,
    LOGP_OLD,
    LOGP_STUDENT,
    LOGP_TEACHER,
    REVERSE_KL,
    Batch,
    Behavior,
    Facts,
    Rollouts,
    Tokens,
)

MASK = [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
LOGP_T = [[-0.1, -0.2, -0.3, 0], [-1, -2, -0.5, -0.5], [-0.4, -0.4, 0, 0], [-0.05, -0.05, -0.1, -0.2]]
LOGP_T += [[-3, -0.1, -0.1, -0.1]]
LOGP_S = [[-0.2, -0.1, -0.6, 0], [-0.5, -0.5, -0.5, -0.5], [-0.3, -0.9, 0, 0], [-0.05, -0.25, -0.1, -0.1]]
LOGP_S += [[-0.2, -0.1, -0.3, -0.1]]
H_T = [[0.1, 0.4, 0.2, 9], [1.2, 0.8, 0.3, 0.1], [0.5, 0.5, 9, 9], [0, 0.1, 0.2, 0.3], [0.6, 0, 0, 0.1]]
H_S = [[0.3, 0.2, 1, 9], [0.9, 0.7, 0.2, 0.1], [0.2, 1.1, 9, 9], [0.1, 0.6, 0.1, 0.2], [0.4, 0.1, 0.5, 0]]

NEUTRAL = dict(FireOPD.neutral or {})


def batch_of(mask: Any, logp_t: Any, h_t: Any, h_s: Any, logp_s: Any = None, group: Any = None) -> Batch:
    """A step without prompts. What stands outside the mask is handed over as it is: it must not matter."""
    mask_BT = torch.as_tensor(mask, dtype=torch.bool)
    b, t = mask_BT.shape

    def values(rows: Any) -> Tensor:
        return torch.as_tensor(rows, dtype=torch.float64)

    logp_BT = values(logp_t if logp_s is None else logp_s)
    rollouts = Rollouts(
        ids_BL=torch.zeros(b, t, dtype=torch.long),
        attention_BL=mask_BT,
        source_BT=mask_BT.to(torch.int8) * 2,
        behavior_logp_BT=logp_BT,
        logp_BT=logp_BT,
        entropy_BT=values(h_s),
        stopped_B=torch.ones(b, dtype=torch.bool),
        uid_B=torch.arange(b),
        group_B=torch.arange(b) if group is None else torch.as_tensor(group),
        reward_B=torch.full((b,), math.nan),
    )
    return Batch(
        rollouts, {LOGP_TEACHER: values(logp_t), ENTROPY_TEACHER: values(h_t), ENTROPY_STUDENT: rollouts.entropy_BT}
    )


def input_g(group: Any = None) -> Batch:
    return batch_of(MASK, LOGP_T, H_T, H_S, LOGP_S, group)


def weights_of(batch: Batch, **keys: Any) -> Tensor:
    return FireOPD(**keys).weights(batch)["opd"]


def scores_only(score_N: Any) -> Batch:
    """One-token rollouts with the given scores and no entropy."""
    score_B1 = torch.as_tensor(score_N, dtype=torch.float64)[:, None]
    return batch_of(torch.ones_like(score_B1), score_B1, torch.zeros_like(score_B1), torch.zeros_like(score_B1))


def objective(**keys: Any) -> float:
    """Weighted mean of the gap: the value of (e) at ratio 1."""
    batch = input_g()
    weight_BT = weights_of(batch, **keys)
    gap_BT = batch.rollouts.logp_BT - batch[LOGP_TEACHER]
    return weighted_mean(gap_BT, weight_BT, (weight_BT != 0).sum()).item()


def tokens_of(logp_S: Tensor, logp_T: Tensor, logp_old: Tensor) -> Tokens:
    whole_N, real_N = torch.zeros(len(logp_S), dtype=torch.long), logp_old
    signals = {LOGP_STUDENT: logp_S, LOGP_OLD: logp_old, LOGP_TEACHER: logp_T}
    return Tokens(whole_N, whole_N, whole_N, whole_N, real_N, signals)


def near(got: Tensor, *wanted: float, atol: float = 5e-8) -> None:
    torch.testing.assert_close(got.double().flatten(), torch.tensor(wanted, dtype=torch.float64), atol=atol, rtol=0)


def test_g1_the_filter_drops_one_of_five_and_the_weights_average_to_one() -> None:
    weight_BT = weights_of(input_g())
    near(weight_BT[0], 1.0540541, 0.5559846, 1.3899614, 0)
    near(weight_BT[1], 0, 0, 0, 0)
    near(weight_BT[3], 1.0909091, 1.5584416, 0.7272727, 0.6233766)
    near(weight_BT[4], 0.7176080, 0.9568106, 1.5946844, 0.7308970)
    near(weight_BT.sum(1), 3, 0, 2, 4, 4)


def test_g1_scores_and_threshold() -> None:
    report = FireOPD().metrics(input_g(), FireOPD().weights(input_g()))
    near(torch.as_tensor(report["fire_opd/score_nats"]), -0.2, -1, -0.4, -0.1, -0.825, atol=1e-12)
    assert report["fire_opd/score_threshold_nats"] == pytest.approx(-0.86, abs=1e-12)
    assert report["fire_opd/kept_fraction"] == 0.8
    assert report["fire_opd/kept_tokens_fraction"] == pytest.approx(13 / 17)


G2 = {
    ("rollout", "rollout"): (0.0323026, -0.0181219, 0.1487799, 0.0909687),
    ("rollout", "batch"): (0.0644316, 0.0172749, 0.1727796, 0.1188020),
    ("batch", "rollout"): (0.0873585, 0.0276674, 0.1874000, 0.1246409),
    ("batch", "batch"): (0.0752860, 0.0136228, 0.1637868, 0.1011811),
}


@pytest.mark.parametrize("scopes", G2)
def test_g2_objectives(scopes: tuple[str, str]) -> None:
    keys = {"entropy_max_scope": scopes[0], "weight_norm_scope": scopes[1]}
    got = [objective(skip_percentile=skip, aggregation=a, **keys) for skip in (20, 0) for a in A]
    assert got == pytest.approx(G2[scopes], abs=5e-8)


A = ("token_mean", "sequence_mean")


def test_g2_dropped_tokens_leave_the_denominator() -> None:
    assert objective() * 13 / 17 == pytest.approx(0.0247020, abs=5e-8)  # what multiplying by 0 would give


def test_g2_official_code_never_drops_anything() -> None:
    keys = {"filter_scope": "rollout", "aggregation": "sequence_mean"}
    assert objective(**keys) == pytest.approx(0.0909687, abs=5e-8)
    assert bool((weights_of(input_g(), **keys) != 0).any(1).all())


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"alpha": 0, "beta": 0}, 0.1384615),
        ({"alpha": 0, "beta": 0, "skip_percentile": 0}, 0.2235294),
        ({"alpha": 0, "beta": 1}, 0.1495497),
        ({"alpha": 1, "beta": 0}, 0.0368257),
        ({"alpha": 2, "beta": 1}, -0.0185208),
        ({"token_mode": "hard"}, -0.1857143),
        ({"rollout_mode": "soft"}, 0.0139856),
        ({"rollout_mode": "soft", "token_mode": "hard"}, -0.1111111),
    ],
)
def test_g3_ablations(keys: dict[str, Any], wanted: float) -> None:
    assert objective(**keys) == pytest.approx(wanted, abs=5e-8)


def test_g3_group_scope() -> None:
    batch = input_g(group=[0, 0, 1, 1, 1])
    kept_B = weights_of(batch, filter_scope="group").sum(1) > 0
    assert kept_B.tolist() == [True, False, True, True, False]
    method = FireOPD(filter_scope="group")  # the metric is the mean of tau over rollouts: (2 (-.84) + 3 (-.655)) / 5
    got = method.metrics(batch, method.weights(batch))["fire_opd/score_threshold_nats"]
    assert got == pytest.approx((-0.84 * 2 - 0.655 * 3) / 5, abs=1e-12)


def test_g4_the_sampled_loss_has_the_gradient_of_the_reverse_kl_in_expectation() -> None:
    logits_V = torch.tensor([0.2, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    logq_V = torch.tensor([0.0, 0.7, 0.1], dtype=torch.float64).log_softmax(0)
    logp_V = logits_V.log_softmax(0)
    p_V = logp_V.detach().exp()
    loss_V = FireOPD().losses(tokens_of(logp_V, logq_V, logp_V.detach()))["opd"]
    near((p_V * loss_V).sum(), 0.3330620)  # at ratio 1 its value is the gap, so its expectation is the KL
    wanted = (-0.0622669, -0.2177010, 0.2799679)
    near(torch.autograd.grad((p_V * loss_V).sum(), logits_V, retain_graph=True)[0], *wanted)
    near(torch.autograd.grad((p_V * logp_V).sum(), logits_V)[0], 0, 0, 0)  # what the bare gap would teach: nothing
    chunk = Chunk(torch.tensor([0]), logits_V[None], logq_V[None])
    full_N = FireOPD(token_loss="full").losses(replace(tokens_of(logp_V, logq_V, logp_V), signals=chunk))["opd"]
    near(full_N, 0.3330620)
    near(torch.autograd.grad(full_N.sum(), logits_V)[0], *wanted)


def test_g5_clip() -> None:
    gap_N = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.5], dtype=torch.float64)
    ratio_N = torch.tensor([1.3, 1.3, 0.7, 0.7, 1.0], dtype=torch.float64)
    logp_N = torch.full((5,), -1.0, dtype=torch.float64, requires_grad=True)
    loss_N = FireOPD().losses(tokens_of(logp_N, logp_N.detach() - gap_N, logp_N.detach() - ratio_N.log()))["opd"]
    near(loss_N, 0.65, -0.6, 0.4, -0.35, 0.5)
    (slope_N,) = torch.autograd.grad(loss_N.sum(), logp_N)
    near(slope_N / ratio_N, 0.5, 0, 0, -0.5, 0.5)  # d logp = d ratio / ratio


def test_the_ratio_is_held_where_its_exponential_would_overflow() -> None:
    logp_N = torch.tensor([-1.0, -90.0], dtype=torch.float64, requires_grad=True)
    loss_N = FireOPD().losses(tokens_of(logp_N, torch.zeros(2), torch.tensor([-800.0, -1.0])))["opd"]
    assert torch.isfinite(loss_N).all() and torch.isfinite(torch.autograd.grad(loss_N.sum(), logp_N)[0]).all()


def test_g6_edges() -> None:
    assert weights_of(scores_only([-3.0])).tolist() == [[1.0]]
    assert weights_of(scores_only([-1, -1, -1, -0.5])).flatten().tolist() == [1, 1, 1, 1]  # ties at tau stay
    near(weights_of(batch_of([[1, 1]], [[-1, -1]], [[0, 0]], [[0.4, 0.2]])), 1.1428571, 0.8571429)
    raw_BT = torch.tensor([[2.0, 2.0, 1.0, 3.0]])
    assert places(raw_BT).tolist() == [[1, 2, 3, 0]]  # the earlier position first on ties


def test_g6_a_rollout_without_tokens_takes_no_part() -> None:
    def with_empty(rows: Any) -> Any:
        return [*rows, [0, 0, 0, 0]]

    batch = batch_of(with_empty(MASK), with_empty(LOGP_T), with_empty(H_T), with_empty(H_S))
    for mode in ("hard", "soft"):
        weight_BT = weights_of(batch, rollout_mode=mode)
        torch.testing.assert_close(weight_BT[:5], weights_of(input_g(), rollout_mode=mode))
        near(weight_BT[5], 0, 0, 0, 0)
    report = FireOPD().metrics(batch, FireOPD().weights(batch))
    assert report["fire_opd/score_threshold_nats"] == pytest.approx(-0.86, abs=1e-12)


@pytest.mark.parametrize("percent", [5, 10, 20, 30, 60])
def test_the_filter_drops_exactly_the_share_asked_for(percent: int) -> None:
    for n in range(2, 601):
        score_N = -torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        assert int((score_N < quantile(score_N, percent)).sum()) == -(-percent * (n - 1) // 100), n
    dropped = [int((weights_of(scores_only(torch.arange(n)), skip_percentile=percent) == 0).sum()) for n in (26, 91)]
    assert dropped == [-(-percent * (n - 1) // 100) for n in (26, 91)]


def test_a_whole_position_of_the_quantile_stays_whole() -> None:
    value_N = torch.tensor([-1.0] * 7 + [0.0] + [1.0] * 93, dtype=torch.float64)
    assert quantile(value_N, 7) == 0  # 0.07 * 100 is above 7 in floating point


@pytest.mark.parametrize(("n", "dropped"), [(5, 1), (16, 3), (64, 13), (1024, 205)])
def test_dropped_of(n: int, dropped: int) -> None:
    assert int((weights_of(scores_only(-torch.arange(n) - 1)) == 0).sum()) == dropped


def test_kept_sets_are_nested_and_blind_to_a_constant() -> None:
    batch, kept_before_B = input_g(), torch.ones(5, dtype=torch.bool)
    shifted = replace(batch, signals={**batch.signals, LOGP_TEACHER: batch[LOGP_TEACHER] - 7})
    for percent in (0, 10, 20, 30, 50, 70, 90):
        kept_B = weights_of(batch, skip_percentile=percent).sum(1) > 0
        assert not bool((kept_B & ~kept_before_B).any())
        assert kept_B.tolist() == (weights_of(shifted, skip_percentile=percent).sum(1) > 0).tolist()
        kept_before_B = kept_B


@pytest.mark.parametrize("max_scope", ["rollout", "batch"])
@pytest.mark.parametrize("signal", [ENTROPY_TEACHER, ENTROPY_STUDENT])
def test_the_unit_of_entropy_does_not_matter(signal: Any, max_scope: str) -> None:
    batch = input_g()
    bits = replace(batch, signals={**batch.signals, signal: batch[signal] / math.log(2)})
    torch.testing.assert_close(
        weights_of(bits, entropy_max_scope=max_scope), weights_of(batch, entropy_max_scope=max_scope)
    )


@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (4, 0), (2, 3)])
def test_weights_average_to_one_and_are_bounded(alpha: float, beta: float) -> None:
    weight_BT, mask_BT = weights_of(input_g(), alpha=alpha, beta=beta, skip_percentile=0), input_g().rollouts.mask_BT
    near(weight_BT.sum(1) / mask_BT.sum(1), 1, 1, 1, 1, 1, atol=1e-12)
    bound = (1 + alpha) * (1 + beta)
    assert 1 / bound <= weight_BT[mask_BT].min() and weight_BT[mask_BT].max() <= bound


def test_constant_entropies_weigh_every_token_once() -> None:
    near(weights_of(batch_of([[1, 1, 1]], [[-1, -2, -3]], [[0.3] * 3], [[0.8] * 3])), 1, 1, 1, atol=1e-12)


def test_neutral_is_every_token_once_under_any_other_keys() -> None:
    for keys in ({}, {"filter_scope": "group", "entropy_max_scope": "batch"}, {"weight_norm_scope": "batch"}):
        weight_BT = weights_of(input_g(), **(keys | NEUTRAL))
        torch.testing.assert_close(weight_BT, input_g().rollouts.mask_BT.double(), atol=0, rtol=0)


def test_no_verdict_and_no_student_score_enters() -> None:
    batch = input_g()
    noisy = replace(batch.rollouts, reward_B=torch.tensor([0.0, 1, 0, 1, 1]), logp_BT=torch.randn(5, 4))
    assert torch.equal(weights_of(batch), weights_of(replace(batch, rollouts=noisy)))


def test_hard_tokens_count_a_whole_share_exactly() -> None:
    mask_BT = torch.ones(1, 100)
    batch = batch_of(mask_BT, -mask_BT, mask_BT, torch.rand(1, 100))
    for percent in (1, 7, 55, 100):  # 0.55 * 100 is above 55 in floating point
        assert weights_of(batch, token_mode="hard", hard_token_fraction=percent / 100).sum() == percent


def test_metrics_by_hand() -> None:
    batch = input_g()
    rollouts = replace(batch.rollouts, reward_B=torch.tensor([1.0, 0, 0, 1, 1]))
    kl_BT = torch.arange(20.0).reshape(5, 4)
    batch = replace(batch, rollouts=rollouts, signals={**batch.signals, REVERSE_KL: kl_BT})
    report = FireOPD().metrics(batch, FireOPD().weights(batch))
    wanted = {
        "kept_length_mean_tokens": 13 / 4,
        "dropped_length_mean_tokens": 4,
        "kept_reward_mean_fraction": 0.75,
        "dropped_reward_mean_fraction": 0,
        "score_correct_auc_fraction": 5 / 6,  # correct -.2 -.1 -.825, wrong -1 -.4: all pairs but one
        "kl_kept_mean_nats": (0 + 1 + 2 + 8 + 9 + 12 + 13 + 14 + 15 + 16 + 17 + 18 + 19) / 13,
        "weight_mean_ratio": 1,
        "weight_min_ratio": 0.5559846,
        "weight_max_ratio": 1.5946844,
        "teacher_confidence_mean_fraction": (0.75 + 0 + 0.5 + 0 + 0 + 1 + 2 / 3 + 1 / 3 + 0 + 0 + 1 + 1 + 5 / 6) / 13,
        "student_confusion_mean_fraction": (1.5 + 2 / 11 + 1 + 10 / 6 + 2) / 13,
    }
    assert {name: report[f"fire_opd/{name}"] for name in wanted} == pytest.approx(wanted, abs=1e-6)
    # the largest of 13 pulls (5 %, rounded up) is row 4, token 0: .7176 * 2.8
    pulls = (FireOPD().weights(batch)["opd"] * (rollouts.logp_BT - batch[LOGP_TEACHER])).abs()
    share = 0.7176080 * 2.8 / pulls.sum().item()
    assert report["fire_opd/weighted_gap_top5pct_share_fraction"] == pytest.approx(share, abs=1e-6)


def test_a_metric_without_a_side_is_nan_and_named() -> None:
    method, batch = FireOPD(skip_percentile=0), input_g()
    report = method.metrics(batch, method.weights(batch))
    for name in ("dropped_length_mean_tokens", "dropped_reward_mean_fraction", "score_correct_auc_fraction"):
        assert math.isnan(float(report[f"fire_opd/{name}"]))
    assert set(report) == set(FireOPD().metrics(batch, FireOPD().weights(batch)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"skip_percentile": 100}, "method.skip_percentile must be in [0, 100), got 100; use 0 to keep every rollout"),
        ({"alpha": -1}, "method.alpha must be in [0, 10], got -1; negative values would favour unsure teachers"),
        ({"beta": -1}, "method.beta must be in [0, 10], got -1"),
        ({"clip_ratio": 0}, "method.clip_ratio must be in (0, 1), got 0"),
        ({"hard_token_fraction": 0}, "method.hard_token_fraction must be in (0, 1], got 0"),
        ({"filter_scope": "token"}, "method.filter_scope must be one of batch, group, rollout, got token"),
        ({"entropy_max_scope": "token"}, "method.entropy_max_scope must be one of rollout, batch, got token"),
        ({"weight_norm_scope": "group"}, "method.weight_norm_scope must be one of rollout, batch, got group"),
        ({"aggregation": "sum"}, "method.aggregation must be one of token_mean, sequence_mean, got sum"),
        ({"token_loss": "k3"}, "method.token_loss must be one of sampled, full, got k3"),
        ({"rollout_mode": "none"}, "method.rollout_mode must be one of hard, soft, got none"),
        ({"token_mode": "none"}, "method.token_mode must be one of soft, hard, got none"),
    ],
)
def test_ranges(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        FireOPD(**keys)
    assert str(refused.value) == message


FACTS = Facts(
    **{"steps": 1, "max_tokens": 8, "updates_per_rollout": 1, "vocabulary": 9, "graded": False, "tokenizer": "w"},
    **{"data": "d", "teacher": "t", "engine": "e", "behavior": Behavior(), "per_prompt": 1},
)


def test_refused_before_the_first_token() -> None:
    with pytest.raises(ValueError) as refused:
        FireOPD(filter_scope="group").check(FACTS)
    assert str(refused.value) == (
        "method.filter_scope=group compares rollouts of one prompt: set rollout.per_prompt to 2 or more, got 1"
    )
    FireOPD(filter_scope="group").check(replace(FACTS, per_prompt=2))
    tempered = replace(FACTS, behavior=Behavior(temperature=0.6))
    with pytest.raises(ValueError, match=r"method.token_loss=sampled needs tokens drawn from the student itself"):
        FireOPD().check(tempered)
    FireOPD(token_loss="full").check(tempered)


def test_conventions_tell_a_kept_denominator_from_a_whole_one() -> None:
    assert FireOPD(**NEUTRAL).conventions() == {
        "divergence": "reverse_kl",
        "estimator": "full_vocabulary",
        "denominator": "tokens",
    }
    assert FireOPD().conventions()["denominator"] == "kept_tokens"
    assert FireOPD(skip_percentile=0, aggregation="sequence_mean").conventions()["denominator"] == "rollouts"
