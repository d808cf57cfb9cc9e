"""KAT: its laws, and those traps of the specification that are no golden vectors. 4,000 random rollouts for any."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from contract_bench import Bench, small_bench
from torch import Tensor
from torch.nn.functional import pad

from opd_lab import divergence as d
from opd_lab.methods.base import TRAINED
from opd_lab.methods.kat import KAT
from opd_lab.methods.kat_scan import smoothed
from opd_lab.methods.opd import OPD
from opd_lab.types import Rollouts
from tests.methods.traps import A, B, g6, kat, kept, near, objective, step_of, stored

T = 24


def random_rollouts(rows: int = 4000) -> Tensor:
    """Divergences with stretches of low values; every seventh rollout is shorter, padded with NaN."""
    generator = torch.Generator().manual_seed(0)
    d_BT = torch.rand((rows, T), generator=generator, dtype=torch.float64)
    begin_B1, length_B1 = (torch.randint(T, (rows, 1), generator=generator) for _ in range(2))
    t_T = torch.arange(T)
    d_BT = torch.where((t_T >= begin_B1) & (t_T < begin_B1 + length_B1), d_BT * 0.2, d_BT)
    short_B1 = torch.arange(rows)[:, None] % 7 == 0
    return d_BT.masked_fill(short_B1 & (t_T >= length_B1), torch.nan)


D = random_rollouts()
LENGTH = (~D.isnan()).sum(1)
RULE: dict[str, Any] = {"window": 3, "consecutive": 2, "exempt_tokens": 2}


def kept_of(threshold: float = 0.25, **keys: Any) -> Tensor:
    """Tokens kept of the random rollouts."""
    onset_B = kat(**RULE | keys).trap(D, threshold).onset_B
    return torch.where(onset_B < 0, LENGTH, onset_B)


def test_the_random_rollouts_are_of_all_kinds() -> None:
    assert 0.2 < (kept_of() < LENGTH).double().mean() < 0.9


# the scan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("consecutive", [1, 2, 4])
@pytest.mark.parametrize("exempt", [0, 2, 7])
def test_the_scan_is_the_loop_of_the_specification(stride: int, consecutive: int, exempt: int) -> None:
    found = kat(window=3, consecutive=consecutive, window_stride=stride, exempt_tokens=exempt).trap(D[:500], 0.25)
    for b in range(500):
        kept, trigger, c = -1, -1, 0
        for t in range(exempt + 2, int(LENGTH[b]), stride):
            c = c + 1 if float(D[b, t - 2 : t + 1].mean()) < 0.25 else 0
            if c == consecutive:
                kept, trigger = t + 1 - 3 - (consecutive - 1) * stride, t
                break
        assert (int(found.onset_B[b]), int(found.trigger_B[b])) == (kept, trigger)


def test_closed_form() -> None:
    for keys in ({}, {"window_stride": 2}, {"window_stride": 3, "consecutive": 4}):
        method = kat(**RULE | keys)
        found = method.trap(D, 0.25)
        cut_B = found.trigger_B >= 0
        span = method.window + (method.consecutive - 1) * method.window_stride
        assert torch.equal(found.onset_B[cut_B] + span, found.trigger_B[cut_B] + 1)
        assert (found.onset_B[cut_B] >= method.exempt_tokens).all()
        assert (found.end_B[cut_B] > found.trigger_B[cut_B]).all()


@pytest.mark.parametrize("exempt_rule", ["kept", "decision"])
def test_nothing_behind_the_trigger_matters(exempt_rule: str) -> None:
    method = kat(**RULE, exempt_rule=exempt_rule)
    found = method.trap(D, 0.25)
    later_BT = (torch.arange(T) > found.trigger_B[:, None]) & (found.trigger_B >= 0)[:, None]
    for value in (0.0, 9.0, math.nan):
        again = method.trap(D.masked_fill(later_BT, value), 0.25)
        assert torch.equal(again.onset_B, found.onset_B)
        assert torch.equal(again.trigger_B, found.trigger_B)


@pytest.mark.parametrize("exempt_rule", ["kept", "decision"])
def test_the_engines_prefixes_trigger_where_the_whole_does(exempt_rule: str) -> None:
    """What a stop rule answers to the first t + 1 scores is -1 until the trigger, then the onset."""
    method = kat(**RULE, exempt_rule=exempt_rule)
    found = method.trap(D, 0.25)
    for t in range(T):
        onset_B = method.trap(D[:, : t + 1], 0.25).onset_B
        due_B = (found.trigger_B >= 0) & (t >= found.trigger_B)
        assert torch.equal(onset_B, torch.where(due_B, found.onset_B, -1))


def test_monotone() -> None:
    for low, high in pairwise([0.0, 0.05, 0.15, 0.25, 0.4, 2.0]):
        assert (kept_of(low) >= kept_of(high)).all()
    for few, many in pairwise([1, 2, 3, 5]):
        assert (kept_of(consecutive=few) <= kept_of(consecutive=many)).all()
    for small, large in pairwise([0, 1, 2, 5, 9]):
        assert (kept_of(exempt_tokens=small) <= kept_of(exempt_tokens=large)).all()
    method, buffer = kat(threshold="quantile", min_buffer_rollouts=1), stored(*D[:50, 0].tolist())
    thresholds = [replace(method, eta=eta).threshold_of(0, buffer) for eta in (0.05, 0.3, 0.5, 0.7, 1.0)]
    assert thresholds == sorted(thresholds, reverse=True)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 8.0])
def test_scale(scale: float) -> None:
    method = kat(**RULE)
    assert torch.equal(method.trap(D * scale, 0.25 * scale).onset_B, method.trap(D, 0.25).onset_B)


def test_windows_do_not_difference_running_sums() -> None:
    d_BT = torch.cat([torch.full((1, 8192), 8.0), torch.full((1, 8192), 0.001)], 1)
    assert (smoothed(d_BT, 64)[0, 8192:] - 0.001).abs().max() < 1e-6
    assert int(KAT(warmup_steps=0).trap(d_BT, 0.00100001).onset_B) == 8192


def test_at_most_the_full_divergence_and_never_negative() -> None:
    logp_NV, logq_NV = torch.randn(2, 500, 11, generator=torch.Generator().manual_seed(1)).double().log_softmax(-1)
    full_N = d.reverse_kl(logp_NV, logq_NV)
    for support in ("student_top", "teacher_top"):
        for k in (1, 3, 10, 11, 64):
            d_N = kat(support=support, top_k=k).score(logp_NV, logq_NV)
            assert (d_N >= 0).all()
            assert (d_N <= full_N + 1e-12).all()
        assert torch.allclose(d_N, full_N)  # more than the vocabulary is all of it


def test_rounding_below_zero_triggers_nothing() -> None:
    method = kat(threshold_nats=0.0)
    assert kept(step_of(method, [[-1e-9] * 9])) == [9]
    near_zero = torch.tensor([[0.5, 0.5]]).log()
    assert (method.score(near_zero, near_zero - 1e-8) >= 0).all()


# the step ----------------------------------------------------------------------------------------------------------


def bench(method: KAT) -> Bench:
    return small_bench(method)


TEACHERS = {"support": "teacher_top", "top_k": 3}
METHODS = [
    kat(window=2, consecutive=1, exempt_tokens=1, threshold_nats=3.5),
    kat(window=1, consecutive=2, exempt_tokens=0, threshold_nats=1.5, denominator="rollouts", **TEACHERS),
    kat(window=2, consecutive=1, exempt_tokens=1, threshold_nats=3.5, keep="pre_post", support="student_top", top_k=3),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_order_padding_and_micro_batches_change_nothing(method: KAT) -> None:
    small = bench(method)
    found, grad_VH = small.run()
    weight_BT = method.weights(small.batch()[0])[TRAINED]
    assert 0 < (weight_BT[small.rollouts.mask_BT] == 0).double().mean() < 1  # some tokens are cut, others are not
    order = torch.tensor([3, 1, 7, 5, 0, 6, 4, 2])
    for other in (small, small.but(rollouts=wide(small.rollouts)), small.but(rollouts=small.rollouts.rows(order))):
        for micro_batch in (1, 3, 100):
            again, again_VH = other.run(micro_batch)
            assert again.objective == pytest.approx(found.objective, rel=1e-12)
            torch.testing.assert_close(again_VH, grad_VH, rtol=1e-9, atol=1e-12)
            state = method.update(method.init_state(), other.batch(micro_batch)[0])
            near(state["lowest"], *method.update(method.init_state(), small.batch()[0])["lowest"].tolist(), atol=1e-12)


def wide(rollouts: Rollouts) -> Rollouts:
    """More padding on both sides."""
    right = {f.name for f in fields(rollouts)} & {"behavior_logp_BT", "logp_BT", "entropy_BT"}
    return replace(
        rollouts,
        ids_BL=pad(rollouts.ids_BL, (2, 2)),
        attention_BL=pad(rollouts.attention_BL, (2, 2)),
        source_BT=pad(rollouts.source_BT, (0, 2)),
        **{name: pad(getattr(rollouts, name), (0, 2), value=math.nan) for name in right},
    )


@pytest.mark.parametrize(
    "method",
    [
        kat(threshold_nats=0.0),
        KAT(threshold="fixed", threshold_nats=9.0, window=1, consecutive=1, support="full", warmup_steps=50),
        KAT(window=1, consecutive=1, exempt_tokens=0, support="full", warmup_steps=0),  # an empty buffer
    ],
)
def test_plain_opd_without_a_cut(method: KAT) -> None:
    found, grad_VH = bench(method).run()
    plain, plain_VH = bench(method).but(method=OPD()).run()
    assert found.objective == pytest.approx(plain.objective, rel=1e-12)
    torch.testing.assert_close(grad_VH, plain_VH, rtol=1e-12, atol=0)


def test_a_step_without_any_token_left_teaches_nothing() -> None:
    method = kat(window=1, consecutive=1, exempt_rule="decision", threshold_nats=1e9)
    for one in (method, replace(method, denominator="rollouts")):
        assert kept(step_of(one, [A, B])) == [0, 0]
        assert objective(one, step_of(one, [A, B])) == 0
        found, grad_VH = bench(one).run()
        assert found.objective == 0
        assert not grad_VH.any()


def test_the_buffer_is_filled_in_the_order_of_the_data() -> None:
    method = kat(threshold_nats=0.0)
    batch = step_of(method, [[v] * 5 for v in (0.4, 0.1, 0.3, 0.2)])
    order = torch.tensor([2, 0, 3, 1])
    moved = replace(
        batch,
        rollouts=batch.rollouts.rows(order),
        consulted={name: value_B[order] for name, value_B in batch.consulted.items()},
    )
    for one in (batch, moved):
        near(method.update(stored(0.9), one)["lowest"], 0.9, 0.4, 0.1, 0.3, 0.2, atol=1e-12)


def test_the_threshold_is_that_of_the_step_before() -> None:
    """Nothing of a step decides the step's own threshold, and nothing but the buffer does."""
    method = g6(threshold="quantile", min_buffer_rollouts=2, eta=0.5)
    state = stored(0.05, 0.15)
    batches = [step_of(method, rows, state) for rows in ([A, B], [B], [[0.0] * 9])]
    assert [set(batch.consulted["threshold"].tolist()) for batch in batches] == [{0.1}] * 3
    assert kept(batches[0]) == [3, 5]


def test_uncut_rollouts_alone_make_the_threshold_climb() -> None:
    method = g6(buffer_source="uncut")
    near(method.update(stored(), step_of(method, [A, B]))["lowest"], 0.65, atol=1e-12)
    near(g6().update(stored(), step_of(g6(), [A, B]))["lowest"], 0.035, 0.65, atol=1e-12)
