"""SCOPE: the golden vectors GV1 to GV5 and GV7 of its specification, worked out by hand, its laws and its edges.

GV6 (two estimators of pass@k) belongs to the evaluation.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lab.chunk import Chunk
from opd_lab.divergence import weighted_mean
from opd_lab.methods.scope import SCOPE
from opd_lab.types import LOGP_OLD, LOGP_STUDENT, LOGP_TEACHER, Batch, Behavior, Facts, Rollouts, Tokens

OFFICIAL: dict[str, Any] = {"student_weight": "low_ppl", "teacher_weight": "low_ppl", "weight_scale": "mean_one"}
OFFICIAL |= {"denominator": "official", "correct_loss": "nll", "logprob_temperature": "rollout", "clip": 0.2}
NEUTRAL: dict[str, Any] = dict(SCOPE.neutral or {})
UNIFORM: dict[str, Any] = {"student_weight": "uniform", "teacher_weight": "uniform"}


def batch_of(rows: list[tuple[int, float, list[float], list[float]]], prompt: int = 0, after: int = 0) -> Batch:
    """Rollouts of (group, reward, student log-probs, teacher log-probs), with as many padded columns as asked for."""
    columns = max(len(logp) for _, _, logp, _ in rows) + after

    def padded(value_N: list[float]) -> list[float]:
        return [*value_N, *[math.nan] * (columns - len(value_N))]

    logp_BT = torch.tensor([padded(logp) for _, _, logp, _ in rows], dtype=torch.float64)
    mask_BT, b = ~logp_BT.isnan(), len(rows)
    ids_BL = torch.zeros(b, prompt + columns, dtype=torch.long)
    rollouts = Rollouts(
        ids_BL=ids_BL,
        attention_BL=ids_BL == 0,
        source_BT=mask_BT.to(torch.int8) * 2,
        behavior_logp_BT=logp_BT,
        logp_BT=logp_BT,
        entropy_BT=logp_BT,
        stopped_B=torch.ones(b, dtype=torch.bool),
        uid_B=torch.arange(b),
        group_B=torch.tensor([group for group, *_ in rows]),
        reward_B=torch.tensor([reward for _, reward, *_ in rows]),
    )
    logq_BT = torch.tensor([padded(logq) for *_, logq in rows], dtype=torch.float64)
    return Batch(rollouts, {LOGP_STUDENT: logp_BT, LOGP_TEACHER: logq_BT})


def tokens_of(batch: Batch, logp_N: Tensor) -> Tokens:
    mask_BT = batch.rollouts.mask_BT
    none_N = torch.zeros(int(mask_BT.sum()), dtype=torch.long)
    signals = {LOGP_STUDENT: logp_N, LOGP_OLD: logp_N.detach(), LOGP_TEACHER: batch[LOGP_TEACHER][mask_BT]}
    return Tokens(none_N, none_N, none_N, none_N, logp_N.detach(), signals)


def objective(batch: Batch, **keys: Any) -> tuple[dict[str, float], Tensor]:
    """The value of each term and the gradient of their sum with respect to the log-probs of the sampled tokens."""
    method, mask_BT = SCOPE(**keys), batch.rollouts.mask_BT
    logp_N = batch[LOGP_STUDENT][mask_BT].requires_grad_()
    losses, weights = method.losses(tokens_of(batch, logp_N)), method.weights(batch)
    assert losses.keys() == weights.keys()
    terms = {t: weighted_mean(losses[t], weights[t][mask_BT], (weights[t] != 0).sum()) for t in losses}
    (gradient_N,) = torch.autograd.grad(sum(terms.values(), torch.zeros(())), logp_N)
    return {term: value.item() for term, value in terms.items()}, gradient_N


def shares(nll_N: list[float], reward: float, **keys: Any) -> Tensor:
    """The weights of one-token rollouts of one prompt, all on one path."""
    batch = batch_of([(0, reward, [-nll], [-nll]) for nll in nll_N])
    return SCOPE(**keys).paths(batch)["correct" if reward else "wrong"].weight_B


def near(got: Tensor, *wanted: float, atol: float = 5e-9) -> None:
    torch.testing.assert_close(got.double().flatten(), torch.tensor(wanted, dtype=torch.float64), atol=atol, rtol=0)


GV1 = [  # reward, perplexities, weights at tau 0.5, 1 and 2
    (1.0, (1.2, 2.6, 3.8), "06360424 29858657 63780919  15789474 34210526 50000000  23521259 34622355 41856386"),
    (0.0, (4.5, 2.9, 1.7), "09601750 23119552 67278698  19235271 29847835 50916894  25822041 32166056 42011903"),
    (0.0, (1.361, 1.755, 2.383), "51878355 31199541 16922104  42614349 33047367 24338283  37931164 33403092 28665744"),
]


@pytest.mark.parametrize(("reward", "ppl", "wanted"), GV1)
def test_gv1_weights_rise_with_the_students_and_fall_with_the_teachers_perplexity(
    reward: float, ppl: tuple[float, ...], wanted: str
) -> None:
    got = torch.cat([shares([math.log(x) for x in ppl], reward, tau=tau) for tau in (0.5, 1.0, 2.0)])
    near(got, *(float(f"0.{digits}") for digits in wanted.split()))


@pytest.mark.parametrize(("tau", "ess"), [(0.5, 2.000000), (1.0, 2.551237), (2.0, 2.853951)])
def test_gv1_effective_sample_size_and_the_official_direction(tau: float, ess: float) -> None:
    nll = [math.log(x) for x in (1.2, 2.6, 3.8)]
    near(shares(nll, 1.0, **OFFICIAL), 1.68792711, 0.77904328, 0.53302961)
    batch, method = batch_of([(0, 1.0, [-x], [-x]) for x in nll]), SCOPE(tau=tau)
    assert method.metrics(batch, {})["scope/correct_ess_fraction"] == pytest.approx(ess / 3, abs=2e-7)


def test_gv2_extremes() -> None:
    near(shares([800.0, 801.0], 1.0), 0.26894142, 0.73105858)
    near(shares([0.1, 0.2, 0.15], 1.0, tau=1e-3), 0, 1, 0)
    near(shares([0.1, 0.2, 0.15], 1.0, tau=1e6), 1 / 3, 1 / 3, 1 / 3, atol=1e-6)
    near(shares([2.5], 1.0), 1)
    near(shares([2.5], 0.0), 1)


def gv3(prompt: int = 0, after: int = 0) -> Batch:
    rows = [
        (0, 1.0, [-0.1, -0.3], [-0.2, -0.1]),
        (0, 1.0, [-0.9, -0.2, -1.0], [-0.3, -0.6, -0.2]),
        (0, 0.0, [-0.5, -0.7], [-1.5, -0.9]),
        (0, 0.0, [-0.2, -0.4, -0.1, -0.3], [-0.1, -0.8, -0.3, -0.4]),
        (1, 0.0, [-0.6], [-2.0]),
    ]
    return batch_of(rows, prompt, after)


def test_gv3_weights_of_the_rollouts() -> None:
    correct, wrong = SCOPE().paths(gv3()).values()
    near(correct.nll_B[:2], 0.2, 0.7)
    near(wrong.nll_B[2:], 1.2, 0.4, 2.0)
    near(correct.weight_B, 0.377540669, 0.622459331, 0, 0, 0, atol=5e-10)
    near(wrong.weight_B, 0, 0, 0.310025519, 0.689974481, 1, atol=5e-10)
    report = SCOPE().metrics(gv3(), {})
    assert report["scope/correct_ess_fraction"] == pytest.approx(1.886819 / 2, abs=5e-7)
    assert report["scope/wrong_ess_fraction"] == pytest.approx(1.747700 / 2, abs=5e-7)


@pytest.mark.parametrize(
    ("keys", "correct", "wrong", "total"),
    [
        ({}, -1.311229666, 1.093007656, -0.218222010),
        ({"correct_loss": "nll"}, 0.729090432, 1.093007656, 1.822098087),
        ({"denominator": "rollout_mean"}, -0.5, 0.844755742, 0.344755742),
        ({"denominator": "path_tokens"}, -0.524491866, 0.312287902, -0.212203965),
        ({"denominator": "all_tokens"}, -0.218538278, 0.182167943, -0.036370335),
        (UNIFORM, -1.25, 1.15, -0.1),
        ({"weight_scale": "mean_one", "denominator": "path_tokens"}, -1.048983732, 0.424575803, -0.624407929),
        (OFFICIAL, 0.416727655, 0.247669219, 0.664396873),
    ],
)
def test_gv3_objectives(keys: dict[str, Any], correct: float, wrong: float, total: float) -> None:
    terms, _ = objective(gv3(), **keys)
    assert [terms["correct"], terms["wrong"], sum(terms.values())] == pytest.approx([correct, wrong, total], abs=2e-9)


@pytest.mark.parametrize("correct_loss", ["ratio", "nll"])
def test_gv3_gradient_is_weight_times_gap_and_nothing_else(correct_loss: str) -> None:
    _, gradient_N = objective(gv3(), correct_loss=correct_loss)
    wanted = [-0.188770334] * 2 + [-0.311229666] * 3 + [0.155012759, 0.031002552]
    near(gradient_N, *wanted, -0.034498724, 0.137994896, 0.068997448, 0.034498724, 0.7, atol=1e-9)


def per_rollout(method: SCOPE) -> Tensor:
    return torch.stack([weight_BT.amax(1) for weight_BT in method.weights(gv3()).values()]).amax(0)


def test_gv3_platform_weights() -> None:
    near(per_rollout(SCOPE()), 0.943851672, 1.556148328, 1.085089316, 2.414910684, 3.5)
    rollout_mean = per_rollout(SCOPE(denominator="rollout_mean"))
    near(rollout_mean, 0.471925836, 0.518716109, 0.542544658, 0.603727671, 3.5)
    near(SCOPE(**OFFICIAL).paths(gv3())["correct"].weight_B[:2], 1.244918662, 0.755081338)
    near(SCOPE(**OFFICIAL).paths(gv3())["wrong"].weight_B[2:], 0.620051038, 1.379948962, 1)
    _, gradient_N = objective(gv3(), **OFFICIAL)
    near(gradient_N[[0, 1, 2, 3, 4, -1]], *[-0.248983732] * 2, *[-0.151016268] * 3, 0.116666667)


@pytest.mark.parametrize("tau", [1e-3, 1e-5])  # the small weight is 7e-218, then 0 also in float64
def test_gv3_underflowing_weights_leave_the_sums_as_they_are(tau: float) -> None:
    terms, _ = objective(gv3(), tau=tau)
    assert sum(terms.values()) == pytest.approx(-0.5, abs=1e-9)
    assert per_rollout(SCOPE(tau=tau))[[0, 2]].tolist() == [0, 0]


def test_gv4_a_rollout_that_the_teacher_did_not_score_leaves_its_group() -> None:
    near(shares([0.0, 0.4, 0.6], 0.0), 0.450626706, 0.302064114, 0.247309180)  # what a score of 0 would have won
    rows = [(0, 0.0, [-0.5], [math.nan]), (0, 0.0, [-0.5], [-0.4]), (0, 0.0, [-0.5], [-0.6])]
    both = 1 / (1 + math.exp(-0.2))
    near(SCOPE().paths(batch_of(rows))["wrong"].weight_B, 0, both, 1 - both)
    assert SCOPE().metrics(batch_of(rows), {})["scope/teacher_missing_fraction"] == pytest.approx(1 / 3)
    correct = [(0, 1.0, [-0.5], [math.nan]), (0, 0.0, [-0.5], [-0.4])]  # correct rollouts need no teacher
    terms, gradient_N = objective(batch_of(correct))
    assert terms == pytest.approx({"correct": -1.0, "wrong": -0.1})
    near(gradient_N, -1, -0.1)


LOGITS_S, LOGITS_T = [2.0, 1.0, 0.0, -1.0], [0.5, 1.5, 0.0, -0.5]


@pytest.mark.parametrize(
    ("sampled_at", "scored_at", "wanted"),
    [
        (1.0, 1.0, (0.43052064, -0.31538594, -0.07245185, -0.04268285)),
        (0.6, 1.0, (0.41862699, -0.31355235, -0.07630997, -0.02876467)),
        (0.6, 0.6, (0.69444549, -0.55059987, -0.11204291, -0.03180271)),
    ],
)
def test_gv5_temperature(sampled_at: float, scored_at: float, wanted: tuple[float, ...]) -> None:
    logits_V = torch.tensor(LOGITS_S, dtype=torch.float64, requires_grad=True)
    logq_V = torch.tensor(LOGITS_T, dtype=torch.float64).log_softmax(0)
    logp_V = (logits_V / scored_at).log_softmax(0)
    batch = batch_of([(0, 0.0, logp_V.tolist(), logq_V.tolist())])
    share_V = (logits_V.detach() / sampled_at).softmax(0)
    loss_V = SCOPE().losses(tokens_of(batch, logp_V))["wrong"]
    (gradient_V,) = torch.autograd.grad((share_V * loss_V).sum(), logits_V)
    near(gradient_V, *wanted)


# topk covers the whole vocabulary here
@pytest.mark.parametrize(("wrong_loss", "signal"), [("full", "reverse_kl"), ("topk", "topk(k=16, support=teacher)")])
def test_gv5_the_exact_losses_have_the_gradient_that_the_sampled_one_expects(wrong_loss: str, signal: str) -> None:
    logits_V = torch.tensor(LOGITS_S, dtype=torch.float64, requires_grad=True)
    ids_N = torch.tensor([0])
    chunk = Chunk(ids_N, logits_V[None], torch.tensor([LOGITS_T], dtype=torch.float64))
    method = SCOPE(wrong_loss=wrong_loss, correct_loss="none", topk=16)
    assert {str(needed) for needed in method.needs().tokens} == {signal}
    loss_N = method.losses(Tokens(ids_N, ids_N, ids_N, ids_N, ids_N, chunk))["wrong"]
    near(torch.autograd.grad(loss_N.sum(), logits_V)[0], *[0.43052064, -0.31538594, -0.07245185, -0.04268285])


def test_gv7_dual_clip() -> None:
    rho_N = torch.tensor([1.5, 1.5, 0.5, 0.5, 4, 4], dtype=torch.float64)
    gap_N = torch.tensor([0.4, -0.4, 0.4, -0.4, -0.4, 0.4], dtype=torch.float64)
    logp_N = torch.full((6,), -1.0, dtype=torch.float64)
    signals = {LOGP_STUDENT: logp_N, LOGP_OLD: logp_N - rho_N.log(), LOGP_TEACHER: logp_N - gap_N}
    none_N = torch.zeros(6, dtype=torch.long)
    tokens = Tokens(none_N, none_N, none_N, none_N, logp_N, signals)
    near(SCOPE(clip=0.2).losses(tokens)["wrong"], 0.6, -0.48, 0.32, -0.2, -0.48, 1.2)
    near(SCOPE().losses(tokens)["wrong"], 0.6, -0.6, 0.2, -0.2, -1.6, 1.6)
    near(SCOPE().losses(tokens)["correct"], *(-rho_N).tolist())


def test_padding_on_either_side_changes_no_bit() -> None:
    for term, weight_BT in SCOPE().weights(gv3(prompt=5, after=5)).items():
        assert torch.equal(weight_BT[:, :4], SCOPE().weights(gv3())[term])
        assert not bool(weight_BT[:, 4:].any())


def test_the_order_of_rollouts_changes_nothing() -> None:
    order = torch.tensor([4, 2, 0, 3, 1])
    batch = gv3()
    mixed = replace(batch, rollouts=batch.rollouts.rows(order), signals={s: v[order] for s, v in batch.signals.items()})
    for term, weight_BT in SCOPE().weights(mixed).items():
        torch.testing.assert_close(weight_BT, SCOPE().weights(batch)[term][order])


@pytest.mark.parametrize(("reward", "there", "empty"), [(1.0, "correct", "wrong"), (0.0, "wrong", "correct")])
def test_an_empty_path_is_exactly_zero(reward: float, there: str, empty: str) -> None:
    batch = batch_of([(0, reward, [-0.1, -0.2], [-0.3, -0.1]), (1, reward, [-0.5], [-0.9])])
    for name in ("prompts", "rollout_mean", "path_tokens", "all_tokens", "official"):
        terms, gradient_N = objective(batch, denominator=name)
        assert terms[empty] == 0.0 and terms[there] != 0.0
        assert bool((gradient_N.isfinite() & (gradient_N != 0)).all())


def test_weights_sum_to_one_shift_free_with_the_ratio_of_the_definition() -> None:
    for reward, direction in ((1.0, 1), (0.0, -1)):
        weight_B = shares([0.3, 1.1, 2.0, 0.9], reward, tau=0.7)
        near(weight_B.sum(), 1, atol=1e-12)
        near(shares([5.3, 6.1, 7.0, 5.9], reward, tau=0.7), *weight_B.tolist(), atol=1e-12)
        near(weight_B[1] / weight_B[0], math.exp(direction * 0.8 / 0.7), atol=1e-12)


def test_one_rollout_per_prompt_is_pure_routing() -> None:
    batch = batch_of([(0, 1.0, [-0.1], [-0.2]), (1, 0.0, [-3.0], [-5.0]), (2, 0.0, [-0.4], [-0.2])])
    correct, wrong = SCOPE(tau=0.01).paths(batch).values()
    near(correct.weight_B + wrong.weight_B, 1, 1, 1, atol=0)


@pytest.mark.parametrize("keys", [{}, OFFICIAL, {"correct_loss": "none"}, {"truncated": "drop"}])
def test_neutral_counts_every_token_once_under_any_other_keys(keys: dict[str, Any]) -> None:
    ungraded = replace(gv3(), rollouts=replace(gv3().rollouts, reward_B=torch.full((5,), torch.nan)))
    method = SCOPE(**(keys | NEUTRAL))
    weights = method.weights(ungraded)
    torch.testing.assert_close(weights["wrong"], gv3().rollouts.mask_BT.double(), atol=1e-15, rtol=0)
    assert not bool(weights.get("correct", torch.zeros(1)).any())
    _, gradient_N = objective(gv3(), **(NEUTRAL | {"wrong_loss": "sampled"}))  # in expectation: the bare gap
    near(gradient_N, *((gv3()[LOGP_STUDENT] - gv3()[LOGP_TEACHER])[gv3().rollouts.mask_BT] / 12).tolist(), atol=1e-12)
    tags = {"divergence": "reverse_kl", "estimator": "full_vocabulary", "denominator": "tokens"}
    assert method.conventions() == tags


def test_a_truncated_rollout_is_wrong_or_leaves_while_its_prompt_still_counts() -> None:
    batch = replace(gv3(), rollouts=replace(gv3().rollouts, stopped_B=torch.tensor([True] * 4 + [False])))
    near(SCOPE().weights(batch)["wrong"].amax(1), 0, 0, 1.085089316, 2.414910684, 3.5)
    dropped = SCOPE(truncated="drop").weights(batch)["wrong"].amax(1)
    near(dropped, 0, 0, 0.310025519 * 6 / 2, 0.689974481 * 6 / 2, 0)
    assert SCOPE().metrics(batch, {})["scope/truncated_fraction"] == pytest.approx(0.2)


def test_rollouts_without_tokens_or_verdict_are_on_no_path() -> None:
    rows = [(0, 0.0, [], []), (0, 0.0, [-0.5], [-0.4]), (0, math.nan, [-0.5], [-0.1])]
    near(SCOPE().weights(batch_of(rows))["wrong"], 0, 1, 0, atol=0)
    with pytest.raises(ValueError, match=r"method=scope needs reward 0 or 1, got 0.5"):
        SCOPE().weights(batch_of([(0, 0.5, [-0.5], [-0.4])]))


def test_a_path_can_be_scaled_or_left_out_and_then_asks_nobody() -> None:
    scaled, _ = objective(gv3(), correct_coef=0.25)
    assert scaled == pytest.approx({"correct": -1.311229666 / 4, "wrong": 1.093007656}, abs=2e-9)
    assert objective(gv3(), wrong_loss="none")[0].keys() == {"correct"}
    assert objective(gv3(), correct_loss="none")[0].keys() == {"wrong"}
    assert LOGP_TEACHER not in SCOPE(wrong_loss="none").needs().batch | SCOPE(wrong_loss="none").needs().tokens


def test_the_teacher_moves_wrong_rollouts_and_never_correct_ones() -> None:
    rows = [(0, float(i % 2), [-0.5, -0.2], [-0.3, -0.9]) for i in range(4)]  # a grader that fails every second one
    other = [(*row[:3], [-1.1, -0.1]) for row in rows]
    one_N, other_N = (objective(batch_of(r))[1].reshape(4, 2) for r in (rows, other))
    near(one_N[1::2], *other_N[1::2].flatten().tolist(), atol=0)
    near(one_N[::2], *[-0.1, 0.35] * 2)  # half the gap
    near(other_N[::2], *[0.3, -0.05] * 2)


def test_metrics_by_hand() -> None:
    report = SCOPE().metrics(gv3(), {})
    wanted = {
        "correct_rollout_fraction": 0.4,
        "all_correct_prompt_fraction": 0,
        "mixed_prompt_fraction": 0.5,
        "all_wrong_prompt_fraction": 0.5,
        "singleton_group_fraction": 1 / 3,
        "correct_group_mean_rollouts": 2,
        "wrong_group_mean_rollouts": 1.5,
        "correct_weight_max": 0.622459331,
        "wrong_weight_max": 1,
        "ppl_student_correct_mean": (math.exp(0.2) + math.exp(0.7)) / 2,
        "ppl_teacher_wrong_mean": (math.exp(1.2) + math.exp(0.4) + math.exp(2)) / 3,
        "correct_nll_mean_nats": 2.5 / 5,
        "gap_wrong_mean_nats": (1 + 0.2 - 0.1 + 0.4 + 0.2 + 0.1 + 1.4) / 7,
        "gap_wrong_square_mean_nats2": (1 + 0.04 + 0.01 + 0.16 + 0.04 + 0.01 + 1.96) / 7,
        "length_ppl_teacher_correlation": -0.918681,  # lengths 2 4 1, perplexities 3.320117 1.491825 7.389056
        "teacher_missing_fraction": 0,
    }
    assert {name: report[f"scope/{name}"] for name in wanted} == pytest.approx(wanted, abs=2e-6)
    near(torch.as_tensor(report["scope/gap_wrong_q1_nats"]), -0.1, 0.4, 0.2, 0.1)  # a4, the least surprising
    near(torch.as_tensor(report["scope/gap_wrong_q3_nats"]), 1.4)


@pytest.mark.parametrize("wrong_loss", ["topk", "none"])
def test_a_wrong_path_that_does_not_ask_for_the_teacher_s_perplexity_is_reported_by_it_all_the_same(wrong_loss) -> None:
    asking, silent = SCOPE().metrics(gv3(), {}), SCOPE(wrong_loss=wrong_loss).metrics(gv3(), {})
    for name in ("gap_wrong_q1_nats", "gap_wrong_q3_nats", "nll_teacher_wrong_nats", "ppl_teacher_wrong_mean"):
        torch.testing.assert_close(silent[f"scope/{name}"], asking[f"scope/{name}"])


def test_a_metric_without_rollouts_is_nan_and_named() -> None:
    report = SCOPE().metrics(batch_of([(0, 1.0, [-0.1], [-0.2])]), {})
    for name in ("ppl_teacher_wrong_mean", "gap_wrong_mean_nats", "wrong_ess_fraction", "wrong_weight_max"):
        assert math.isnan(float(report[f"scope/{name}"]))
    assert report.keys() == SCOPE().metrics(gv3(), {}).keys()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tau": 0}, "tau must be > 0, got 0; for uniform weights use student_weight=uniform teacher_weight=uniform"),
        ({"student_weight": "up"}, "student_weight must be one of high_ppl, low_ppl, uniform, got up"),
        ({"teacher_weight": "up"}, "teacher_weight must be one of low_ppl, high_ppl, uniform, got up"),
        ({"weight_scale": "one"}, "weight_scale must be one of sum_one, mean_one, got one"),
        ({"correct_loss": "kl"}, "correct_loss must be one of ratio, nll, none, got kl"),
        ({"wrong_loss": "kl"}, "wrong_loss must be one of sampled, full, topk, none, got kl"),
        ({"correct_loss": "none", "wrong_loss": "none"}, "scope has nothing to train: set correct_loss or wrong_loss"),
        ({"topk": 0}, "topk must be in [1, vocabulary], got 0"),
        ({"correct_coef": -1}, "correct_coef must be >= 0, got -1"),
        ({"logprob_temperature": "one"}, "logprob_temperature must be one of unit, rollout, got one"),
        ({"clip": 2}, "clip must be in (0, 1) or null, got 2"),
        ({"dual_clip": 1}, "dual_clip must be > 1, got 1"),
        ({"route": "all"}, "route must be one of verifier, all_wrong, got all"),
        ({"truncated": "keep"}, "truncated must be one of wrong, drop, got keep"),
    ],
)
def test_ranges(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        SCOPE(**keys)
    assert str(refused.value) == f"method.{message}"


FACTS = Facts(
    **{"steps": 1, "max_tokens": 8, "updates_per_rollout": 1, "vocabulary": 9, "graded": True, "tokenizer": "w"},
    **{"data": "prose", "teacher": "t", "engine": "e", "behavior": Behavior(), "per_prompt": 8},
)


def test_refused_or_warned_before_the_first_token() -> None:
    SCOPE().check(FACTS)
    with pytest.raises(ValueError) as refused:
        SCOPE().check(replace(FACTS, graded=False))
    assert str(refused.value) == "method=scope needs graded prompts (reward 0 or 1); data=prose has none"
    SCOPE(route="all_wrong").check(replace(FACTS, graded=False))
    with pytest.raises(ValueError, match=r"logprob_temperature must be one of unit, rollout, got 0\.6"):
        SCOPE(logprob_temperature=0.6).check(FACTS)
    with pytest.warns(UserWarning, match=r"with rollout.per_prompt=1 every weight is 1"):
        SCOPE().check(replace(FACTS, per_prompt=1))
