"""KAT: the golden vectors G1 to G6 of the specification, and its metrics."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.base import TRAINED
from opd_lab.methods.kat import KAT
from opd_lab.methods.kat_scan import lowest
from tests.methods.by_hand import FACTS, padded, token_losses
from tests.methods.traps import TWO_RUNS, A, B, g6, kat, kept, near, objective, place, step_of, stored

P = torch.tensor([[0.6, 0.25, 0.1, 0.03, 0.02]], dtype=torch.float64).log()
Q1 = torch.tensor([[0.5, 0.2, 0.2, 0.05, 0.05]], dtype=torch.float64).log()
Q2 = torch.tensor([[0.05, 0.2, 0.6, 0.1, 0.05]], dtype=torch.float64).log()
LATE = [1.0] * 6 + [0.01] * 8


@pytest.mark.parametrize(
    ("logq_NV", "support", "value", "without_tail"),
    [
        (Q1, "full", 0.062213520, None),
        (Q1, "student_top", 0.061206745, 0.165178822),
        (Q2, "full", 1.313108932, None),
        (Q2, "student_top", 1.305314191, 1.546729878),
        (Q2, "teacher_top", 0.642735689, -0.123390059),
    ],
)
def test_g1_the_divergence(logq_NV: Tensor, support: str, value: float, without_tail: float | None) -> None:
    method = kat(support=support, top_k=2)
    near(token_losses(method, P, logq_NV)[TRAINED], value)
    near(method.score(P, logq_NV), value)
    if without_tail is not None:
        on = d.topk(P, logq_NV, 2, support.removesuffix("_top"))
        near(d.topk_kl(on, direction="reverse", tail="truncate"), without_tail)


@pytest.mark.parametrize(
    ("support", "wanted"),
    [
        ("full", (0.703078631, -0.272491345, -0.310486840, -0.075512452, -0.044587993)),
        ("student_top", (0.707755475, -0.270542660, -0.291475210, -0.087442563, -0.058295042)),
    ],
)
def test_g2_the_gradient(support: str, wanted: tuple[float, ...]) -> None:
    logits_NV = P.clone().requires_grad_()
    loss_N = token_losses(kat(support=support, top_k=2), logits_NV.log_softmax(-1), Q2)[TRAINED]
    near(torch.autograd.grad(loss_N.sum(), logits_NV)[0], *wanted)


@pytest.mark.parametrize(
    ("d_T", "keys", "wanted"),
    [
        (LATE, {}, (5, 10)),
        (LATE, {"exempt_tokens": 4}, (5, 10)),
        (LATE, {"exempt_tokens": 6}, (6, 11)),
        (LATE, {"exempt_tokens": 8}, (8, 13)),
        (LATE, {"exempt_tokens": 9}, (14, None)),
        (LATE, {"exempt_tokens": 12, "exempt_rule": "decision"}, (5, 12)),
        (LATE, {"exempt_tokens": 14, "exempt_rule": "decision"}, (14, None)),
        ([1.0] * 8 + [0.01] * 24, {}, (7, 12)),
        ([1.0] * 8 + [0.01] * 24, {"window_stride": 4}, (8, 19)),
        ([0.01] * 10, {}, (0, 5)),
        ([0.01] * 10, {"exempt_tokens": 2}, (2, 7)),
        ([0.5, 0.4], {}, (2, None)),
        (TWO_RUNS, {}, (3, 8)),
    ],
)
def test_g3_the_scan(d_T: list[float], keys: dict[str, Any], wanted: tuple[int, int | None]) -> None:
    assert place(d_T, **keys) == wanted
    batch = step_of(kat(**keys), [d_T])
    assert kept(batch) == [wanted[0]]
    assert kat(**keys).weights(batch)[TRAINED].sum() == wanted[0]


def test_g3_a_rollout_shorter_than_the_window_stores_nothing() -> None:
    method, before = kat(), stored(0.5)
    batch = step_of(method, [[0.5, 0.4]], before)
    assert batch.consulted["lowest"].isnan().all()
    assert torch.equal(method.update(before, batch)["lowest"], before["lowest"])


def test_g3_phases() -> None:
    method = kat()
    values = method.metrics(step_of(method, [TWO_RUNS, B]), {})
    means = [values[f"kat/kl_{phase}_mean_nats"] for phase in ("pre", "agreement", "post")]
    assert means == pytest.approx([1.0, 0.175, 0.341111111], abs=6e-10)
    for keep, trained in (("pre", range(3)), ("pre_agreement", range(9)), ("pre_post", [0, 1, 2, *range(9, 18)])):
        weight_BT = kat(keep=keep).weights(step_of(kat(keep=keep), [TWO_RUNS]))[TRAINED]
        assert weight_BT.nonzero()[:, 1].tolist() == list(trained)


def test_g3_the_minimum_is_taken_over_what_was_scanned() -> None:
    d_BT = padded([LATE + [0.001] * 4])
    method = kat()
    near(lowest(d_BT, 4, method.trap(d_BT, 0.3).trigger_B), 0.01)
    near(lowest(d_BT, 4, torch.tensor([-1])), 0.001)
    near(step_of(method, d_BT.tolist()).consulted["lowest"], 0.01)


def test_g4_low_is_strictly_below() -> None:
    assert place([0.25] * 10, threshold=0.25) == (10, None)
    assert place([0.25] * 10, threshold=0.25 + 1e-12) == (0, 5)


@pytest.mark.parametrize(("eta", "wanted"), [(0.3, 0.73), (0.1, 0.91), (0.7, 0.37), (1.0, 0.1)])
def test_g5_the_quantile(eta: float, wanted: float) -> None:
    method = KAT(eta=eta, warmup_steps=0, min_buffer_rollouts=1)
    assert method.threshold_of(0, stored(*(i / 10 for i in range(1, 11)))) == pytest.approx(wanted, abs=1e-12)


def test_g5_small_buffers() -> None:
    method = KAT(warmup_steps=0, min_buffer_rollouts=1)
    assert method.threshold_of(0, stored(0.2)) == 0.2
    assert method.threshold_of(0, stored(0.4, 0.1, 0.3, 0.2)) == pytest.approx(0.31, abs=1e-12)


@pytest.mark.parametrize("at_once", [1, 3, 7])
def test_g5_the_oldest_leaves_first(at_once: int) -> None:
    values = [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    method = kat(threshold="quantile", buffer_rollouts=5, min_buffer_rollouts=5)
    state = method.init_state()
    for i in range(0, 7, at_once):
        state = method.update(state, step_of(kat(threshold_nats=0.0), [[v] * 5 for v in values[i : i + at_once]]))
    near(state["lowest"], 0.2, 0.3, 0.4, 0.5, 0.6, atol=1e-12)
    assert method.threshold_of(50, state) == pytest.approx(0.48, abs=1e-12)


@pytest.mark.parametrize(("step", "rollouts", "active"), [(49, 600, False), (50, 511, False), (50, 512, True)])
def test_g5_when_it_is_active(step: int, rollouts: int, active: bool) -> None:
    method, state = KAT(), stored(*[0.2] * rollouts)
    assert method.active(step, state) == active
    assert math.isnan(method.threshold_of(step, state)) == (not active)


def test_g6_the_objective() -> None:
    assert [place(x, 0.1, window=2, consecutive=2, exempt_tokens=1) for x in (A, B)] == [(3, 5), (5, None)]
    near(step_of(g6(), [A, B]).consulted["lowest"], 0.035, 0.65, atol=1e-15)
    plain, rollouts = g6(threshold_nats=0.0), g6(denominator="rollouts")
    assert objective(g6(), step_of(g6(), [A, B])) == pytest.approx(0.875)
    assert objective(rollouts, step_of(rollouts, [A, B])) == pytest.approx(3.5)
    assert rollouts.weights(step_of(rollouts, [A, B]))[TRAINED].unique().tolist() == [0, 4]
    assert objective(plain, step_of(plain, [A, B])) == pytest.approx(0.55)
    literal = replace(plain, denominator="rollouts")
    assert objective(literal, step_of(literal, [A, B])) == pytest.approx(3.575)


# metrics -----------------------------------------------------------------------------------------------------------


def test_metrics() -> None:
    method = g6(window=2, consecutive=2, exempt_tokens=4)  # A is cut at 4 now; its low stretch begins at 3
    values = method.metrics(step_of(method, [A, B], stored(0.5, 0.6)), {})
    wanted = {
        "threshold_nats": 0.1,
        "buffer_rollouts": 2,
        "active_fraction": 1,
        "cut_fraction": 0.5,
        "generated_mean_tokens": 6.5,
        "kept_mean_tokens": 4.5,
        "kept_fraction": 9 / 13,
        "cut_mismatch_fraction": 0,
        "segment_fraction": 0.5,
        "onset_median_tokens": 3,
        "kl_pre_mean_nats": 3.55 / 4,
        "kl_agreement_mean_nats": 0.1 / 4,
    }
    assert {name: values[f"kat/{name}"] for name in wanted} == pytest.approx(wanted)
    assert math.isnan(cast(float, values["kat/kl_post_mean_nats"]))  # the low stretch lasts to the end
    near(cast(Tensor, values["kat/cut_position_tokens"]), 4)
    near(cast(Tensor, values["kat/lowest_nats"]), 0.025, 0.65, atol=1e-12)  # up to the trigger, token 6
    assert cast(Tensor, values["kat/smoothed_nats"]).isfinite().sum() == 7 + 4


@pytest.mark.parametrize(("slips", "wanted"), [((2, -1), 1.0), ((3, 0), 1.0), ((4, 0), 0.0), ((-1, 0), 0.0)])
def test_cuts_after_a_slip(slips: tuple[int, int], wanted: float) -> None:
    """A keeps tokens 0 .. 3; B is not cut, wherever it slips."""
    method = g6(window=2, consecutive=2, exempt_tokens=4)
    batch = step_of(method, [A, B], stored(0.5, 0.6))
    told = replace(batch.rollouts, extra={**batch.rollouts.extra, "first_slip": torch.tensor(slips)})
    assert method.metrics(replace(batch, rollouts=told), {})["kat/cut_after_slip_fraction"] == wanted
    assert math.isnan(cast(float, method.metrics(batch, {})["kat/cut_after_slip_fraction"])), "no grader of steps"


def test_metrics_before_the_first_cut() -> None:
    method = g6(warmup_steps=1)
    values = method.metrics(step_of(method, [A, B]), {})
    assert math.isnan(cast(float, values["kat/threshold_nats"]))
    assert [values[f"kat/{name}_fraction"] for name in ("active", "cut", "kept", "segment")] == [0, 0, 1, 0]


def test_the_length_of_every_rollout_is_left_to_later_runs() -> None:
    rows = g6().tables(step_of(g6(), [A, B]))["rollout_lengths"]
    assert rows == [{"uid": 0, "kept": 3, "generated": 8}, {"uid": 1, "kept": 5, "generated": 5}]


def test_conventions_say_what_was_compared() -> None:
    assert kat().conventions()["denominator"] == "kept_tokens"
    said = KAT(denominator="rollouts").bind(replace(FACTS, vocabulary=40)).conventions()
    assert (said["denominator"], said["estimator"], said["topk_k"], said["stop"]) == (
        "rollouts",
        "topk",
        "40",
        "online",
    )
