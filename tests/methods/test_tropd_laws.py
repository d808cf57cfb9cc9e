"""What holds of TrOPD whatever the numbers: whose the coins are, total variation, its neighbours among the methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from contract_bench import small_bench
from test_contract import padded as with_padding
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.opd_sampled import OPDSampled
from opd_lab.types import LOGP_STUDENT, LOGP_TEACHER, TOTAL_VARIATION, Rollouts, Source
from tests.methods.by_hand import Silent, batch_of
from tests.methods.test_tropd import tropd
from tests.pair import LOGP, LOGQ, P


def other_orders(rollouts: Rollouts) -> list[tuple[Rollouts, Tensor]]:
    """The rollouts shuffled, and with more padding; with the rows of the old ones in the new."""
    order_B = torch.tensor([3, 1, 7, 5, 0, 6, 4, 2])
    return [(rollouts.rows(order_B), order_B), (with_padding(rollouts, 3), torch.arange(8))]


def test_the_coins_belong_to_their_tokens() -> None:
    bench = small_bench(tropd())
    trust_BT = bench.batch()[0].consulted["trust"]
    assert 0 < trust_BT.sum() < (bench.rollouts.source_BT == Source.STUDENT).sum()
    for size in (1, 2, 8):
        assert torch.equal(bench.batch(size)[0].consulted["trust"], trust_BT)
    for rollouts, order_B in other_orders(bench.rollouts):
        again_BT = bench.but(rollouts=rollouts).batch()[0].consulted["trust"]
        assert torch.equal(again_BT[:, : trust_BT.shape[1]], trust_BT[order_B])


def test_a_token_that_the_teacher_likes_better_is_always_trusted() -> None:
    generator = torch.Generator().manual_seed(0)
    gap_BT = torch.randn(64, 64, generator=generator).abs().neg()
    rows = {LOGP_STUDENT: torch.full_like(gap_BT, -2).tolist(), LOGP_TEACHER: (-2 - gap_BT).tolist()}
    assert batch_of(tropd(), rows).consulted["trust"].all()


@pytest.mark.parametrize("settings", [{}, {"tail": "bucket"}, {"region": "expected"}, {"denominator": "regions"}])
def test_a_teacher_equal_to_the_student_accepts_everything_and_teaches_nothing(settings: Mapping[str, Any]) -> None:
    bench = small_bench(tropd(prefix_schedule="none", **settings))
    twin = replace(bench.teacher, features=bench.features, weight_VH=bench.weight_VH.detach())
    bench = bench.but(teacher=twin)
    batch, _ = bench.batch()
    logp_BT, mask_BT = bench.rollouts.logp_BT, bench.rollouts.mask_BT
    batch = replace(batch, signals={LOGP_STUDENT: logp_BT, LOGP_TEACHER: logp_BT}, consulted={})
    assert torch.equal(bench.method.consult(Silent(), batch)["trust"], mask_BT.double())
    found, grad_VH = bench.run()
    assert found.objective == pytest.approx(0, abs=1e-12) and grad_VH.abs().max() < 1e-12


def test_trust_everywhere_is_the_sampled_baseline_bit_for_bit() -> None:
    settings: dict[str, Any] = {"region": "everything", "prefix_schedule": "none", "denominator": "tokens"}
    _, grad_VH = small_bench(tropd(**settings)).run(2)
    _, sampled_VH = small_bench(OPDSampled()).run(2)
    assert torch.equal(grad_VH, sampled_VH)


def test_without_prefixes_the_guidance_weight_means_nothing() -> None:
    runs = [small_bench(tropd(prefix_schedule="none", guidance_weight=beta)).run() for beta in (0.0, 0.5)]
    assert runs[0][0].objective == runs[1][0].objective and torch.equal(runs[0][1], runs[1][1])


def test_outliers_agree_with_the_exact_total_variation() -> None:
    """Tokens that the student drew, coins of the method: within its standard error of TV = .45."""
    rows, columns = 400, 100
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.multinomial(P, rows * columns, replacement=True, generator=generator).view(rows, columns)
    method = tropd()
    batch = batch_of(method, {LOGP_STUDENT: LOGP[ids_BT].tolist(), LOGP_TEACHER: LOGQ[ids_BT].tolist()})
    exact_BT = d.total_variation(LOGP.exp(), LOGQ.exp()).expand(rows, columns)
    seen = method.metrics(replace(batch, signals={TOTAL_VARIATION: exact_BT}), {})
    standard_error = math.sqrt(0.45 * 0.55 / (rows * columns))
    assert seen["tropd/total_variation_mean_fraction"] == pytest.approx(0.45)
    assert seen["tropd/outlier_fraction"] == pytest.approx(0.45, abs=3 * standard_error)


def test_an_infinite_gap_is_an_outlier_and_harms_nothing() -> None:
    method = tropd(denominator="tokens", outlier="clip")
    batch = batch_of(method, {LOGP_STUDENT: [[-1.0, -1.0]], LOGP_TEACHER: [[-math.inf, -1.0]]})
    assert batch.consulted["trust"].tolist() == [[0.0, 1.0]]
    assert method.weights(batch)["trust"].isfinite().all()
