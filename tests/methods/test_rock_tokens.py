"""Rock tokens: the golden vectors GV1 and GV3 of the specification, its traps, the control arm, metrics, refusals. GV2,
GV4, GV5 and GV8 are about selectors: tests/analyze. The online set and the laws on models have files of their own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lab.chunk import Chunk
from opd_lab.methods.opd import OPD
from opd_lab.types import FORWARD_KL
from tests.methods.by_hand import FACTS, token_losses
from tests.methods.rocks import IDS, PROMPT, batch_of, consulted, gv3, objective, rocks, weights_of

N = 8  # tokens of GV3


def rows(*wanted: str) -> Tensor:
    """`rows("0 1", "1")`, padded with 0."""
    values = [[float(x) for x in row.split()] for row in wanted]
    width = max(map(len, values))
    return torch.tensor([row + [0.0] * (width - len(row)) for row in values], dtype=torch.float64)


def near(got: Tensor, *wanted: float, atol: float = 6e-9) -> None:
    torch.testing.assert_close(got.double().flatten(), torch.tensor(wanted, dtype=torch.float64), atol=atol, rtol=0)


def test_gv1_the_loss_and_its_gradient() -> None:
    logits_NV = torch.tensor([[2.0, 1, 0, -1]], dtype=torch.float64, requires_grad=True)
    logp_NV = logits_NV.log_softmax(-1)
    logq_NV = torch.tensor([[0.5, 1.5, 0, -0.5]], dtype=torch.float64).log_softmax(-1)
    loss_N = token_losses(rocks(), logp_NV, logq_NV)["opd"]
    near(loss_N, 0.437217371, atol=6e-10)
    near(Chunk(torch.tensor([0]), logp_NV, logq_NV)[FORWARD_KL], 0.403363676, atol=6e-10)
    near(logp_NV - logq_NV, 1.10581669, -0.89418331, -0.39418331, -0.89418331)
    (grad_NV,) = torch.autograd.grad(loss_N.sum(), logits_NV)
    near(grad_NV, 0.43052064, -0.31538594, -0.07245185, -0.04268285)
    near(grad_NV, *(logp_NV.exp() * (logp_NV - logq_NV - loss_N)).flatten().tolist(), atol=1e-15)
    near(grad_NV.norm(), 0.540266052, atol=2e-9)  # 0.5402660533 by hand: its last digit is one too low
    near(grad_NV.sum(), 0, atol=1e-15)


GV3 = [
    (0.0, "label", ("0 1 0 1 1", "1 0 1"), 5, (0.456250, 0.730000, 0.779166667)),
    (0.0, "previous", ("1 0 1 0 1", "0 1 0"), 4, (0.150000, 0.300000, 0.400000)),
    (0.5, "label", (".5 1 .5 1 1", "1 .5 1"), 8, (0.531250, 0.653846154, 0.707500)),
    (0.5, "previous", ("1 .5 1 .5 1", ".5 1 .5"), 8, (0.378125, 0.504166667, 0.581250)),
    (1.0, "label", ("1 1 1 1 1", "1 1 1"), 8, (0.606250, 0.606250, 0.661666667)),
    (1.0, "previous", ("1 1 1 1 1", "1 1 1"), 8, (0.606250, 0.606250, 0.661666667)),
]
NORMALIZERS = ("all_tokens", "kept_weight", "rollout_kept_weight")


@pytest.mark.parametrize(("rock_weight", "align", "w", "counted", "wanted"), GV3)
def test_gv3_weights_and_objectives(
    rock_weight: float, align: str, w: tuple[str, str], counted: int, wanted: tuple[float, ...]
) -> None:
    for normalizer, value in zip(NORMALIZERS, wanted):
        method = rocks(rock_weight=rock_weight, align=align, normalizer=normalizer)
        assert torch.equal(method.token_weights(consulted(method, gv3())), rows(*w))
        assert int((weights_of(method, gv3()) != 0).sum()) == counted
        assert objective(method, gv3()) == pytest.approx(value, abs=6e-10)


def test_gv3_the_weights_the_platform_sees() -> None:
    assert torch.equal(weights_of(rocks(), gv3()), rows("0 .625 0 .625 .625", ".625 0 .625"))


@pytest.mark.parametrize(
    ("keys", "w"),
    [
        ({"window": "radius", "window_radius": 1}, ("0 0 0 0 1", "0 0 0")),
        ({"window": "radius", "window_radius": 2}, ("0 0 0 0 0", "0 0 0")),
        ({"window": "high_run", "window_quantile": 0.5}, ("0 1 0 1 1", "1 0 0")),
    ],
)
def test_gv3_windows(keys: dict[str, Any], w: tuple[str, str]) -> None:
    method = rocks(**keys)
    assert torch.equal(method.token_weights(consulted(method, gv3())), rows(*w))


def test_trap_1_previous_is_label_one_later() -> None:
    label, previous = (weights_of(rocks(align=align), gv3()) != 0 for align in ("label", "previous"))
    assert torch.equal(previous[:, 1:][gv3().rollouts.mask_BT[:, 1:]], label[:, :-1][gv3().rollouts.mask_BT[:, 1:]])
    assert all(a != b for w in (0, 2) for a, b in zip(GV3[w][-1], GV3[w + 1][-1]))  # and every objective differs


def test_trap_5_an_all_frozen_step_teaches_nothing() -> None:
    for normalizer in NORMALIZERS:
        method = rocks(token_ids=(2, 3, 5, 7, 9), normalizer=normalizer)
        assert objective(method, gv3()) == 0
        assert method.metrics(consulted(method, gv3()), {})["rock_tokens/frozen_fraction"] == 1


def test_a_high_run_ends_at_its_radius_and_starts_only_from_a_high_rock() -> None:
    ids, kl = [[1, 1, 1, 7, 1, 1, 1], [7, 1, 1, 1, 1, 1, 1]], [[3.0, 3, 3, 3, 3, 0, 3], [0, 3, 0, 0, 0, 0, 0]]
    method = rocks(window="high_run", window_radius=2, window_quantile=0.5)
    got = method.token_weights(consulted(method, batch_of(ids, kl)))
    assert torch.equal(got, rows("1 0 0 0 0 1 1", "0 1 1 1 1 1 1"))


def test_an_infinite_loss_of_some_tokens_still_has_a_quantile() -> None:
    kl = [[math.inf, 0.10, 0.20, math.inf, 0], [0.05, 0.60, math.inf]]
    for quantile in (0.5, 0.6, 0.9):
        method = rocks(window="high_run", window_quantile=quantile)
        frozen_BT = consulted(method, batch_of(IDS, kl, PROMPT)).consulted["frozen"]
        assert frozen_BT[0].tolist() == [True, False, True, False, False]
    assert objective(rocks(token_ids=(7, 5, 9)), batch_of(IDS, kl, PROMPT)) == pytest.approx((0.10 + 0 + 0.05) / N)


def test_windows_stay_inside_the_response() -> None:
    batch = batch_of([[1, 1, 7], [1, 1, 1, 1, 1]], prompt=[7, 1])
    method = rocks(window="radius", window_radius=9)
    assert torch.equal(method.token_weights(consulted(method, batch)), rows("0 0 0", "1 1 1 1 1"))


def test_trap_9_the_last_row_of_the_head_is_a_token_too() -> None:
    last = FACTS.vocabulary - 1
    method = rocks(token_ids=(last,), tokenizer_digest=FACTS.tokenizer)
    method.check(FACTS)
    assert torch.equal(weights_of(method, batch_of([[5, last]])), rows(".5 0"))


def test_as_many_other_tokens_are_frozen_drawn_anew_at_every_step() -> None:
    ids = [[7, *range(10, 30)], [*range(10, 22), 7, 7]]
    method, drawn = rocks(mask="random_positions"), set()
    for step in range(20):
        batch = batch_of(ids, step=step)
        frozen_BT = consulted(method, batch).consulted["frozen"]
        assert frozen_BT.sum() == 3
        assert not (frozen_BT & (batch.rollouts.response_BT == 7)).any()
        assert not (frozen_BT & ~batch.rollouts.mask_BT).any()
        assert torch.equal(frozen_BT, consulted(method, batch_of(ids, step=step)).consulted["frozen"])
        drawn |= {tuple(place) for place in frozen_BT.nonzero().tolist()}
    assert len(drawn) > 20
    of_another_seed = consulted(method, batch_of(ids, seed=1)).consulted["frozen"]
    assert not torch.equal(of_another_seed, consulted(method, batch_of(ids)).consulted["frozen"])


def test_all_others_where_the_rocks_are_the_majority() -> None:
    method = rocks(mask="random_positions")
    assert torch.equal(weights_of(method, batch_of([[7, 7, 1, 7]])) != 0, rows("1 1 0 1").bool())
    assert torch.equal(weights_of(method, batch_of([[1, 2]])), rows("1 1"))  # no rock, nothing frozen


def test_metrics_by_hand() -> None:
    method = rocks(window="radius", window_radius=1, rock_weight=0.5)  # frozen: all but the 2
    report = method.metrics(consulted(method, gv3()), {})
    wanted = {"frozen_fraction": 7 / 8, "frozen_kl_share_fraction": 1, "frozen_enrichment_ratio": 8 / 7}
    wanted |= {"frozen_kl_mean_nats": 4.85 / 7, "other_kl_mean_nats": 0, "effective_tokens": 4.5}
    wanted |= {"window_fraction": 4 / 8, "set_size_types": 1}
    assert {name: report[f"rock_tokens/{name}"] for name in wanted} == pytest.approx(wanted)
    near(torch.as_tensor(report["rock_tokens/rollout_frozen_fraction"]), 0.8, 1)
    report = rocks().metrics(consulted(rocks(), gv3()), {})
    wanted = {"frozen_fraction": 3 / 8, "frozen_kl_share_fraction": 1.2 / 4.85, "window_fraction": 0}
    wanted |= {"frozen_enrichment_ratio": 1.2 / 4.85 / (3 / 8), "other_kl_mean_nats": 3.65 / 5, "effective_tokens": 5}
    assert {name: report[f"rock_tokens/{name}"] for name in wanted} == pytest.approx(wanted)
    near(torch.as_tensor(report["rock_tokens/frozen_kl_nats"]), 0.40, 0.20, 0.60)
    near(torch.as_tensor(report["rock_tokens/other_kl_nats"]), 0.10, 1.50, 0, 0.05, 2.00)


def test_metrics_without_a_recorded_loss_or_a_rock() -> None:
    method = rocks(token_ids=(100,))
    report = method.metrics(consulted(method, replace(gv3(), signals={})), {})
    assert report["rock_tokens/frozen_fraction"] == 0
    assert math.isnan(float(report["rock_tokens/frozen_enrichment_ratio"]))
    assert math.isnan(float(report["rock_tokens/other_kl_mean_nats"]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rock_weight": 1.2}, "method.rock_weight must be in [0, 1], got 1.2; 1 is plain OPD"),
        ({"source": "file"}, "method.source must be one of list, online, got file"),
        ({"align": "next"}, "method.align must be one of label, previous, got next"),
        ({"window": "w"}, "method.window must be one of none, radius, high_run, got w"),
        (
            {"window": "radius", "window_radius": 0},
            "method.window_radius must be >= 1 when window is radius or high_run, got 0",
        ),
        ({"window_quantile": 1}, "method.window_quantile must be in (0, 1), got 1"),
        ({"normalizer": "n"}, "method.normalizer must be one of all_tokens, kept_weight, rollout_kept_weight, got n"),
        ({"mask": "m"}, "method.mask must be one of tokens, random_positions, got m"),
        (
            {"online_score": "s"},
            "method.online_score must be one of rock_score, mean_kl, frequency, lower_bound, got s",
        ),
        ({"online_k": 0}, "method.online_k must be >= 1, got 0"),
        ({"online_warmup": 0}, "method.online_warmup must be >= 1, got 0"),
        ({"online_refresh": 0}, "method.online_refresh must be >= 1, got 0"),
        ({"online_decay": 0}, "method.online_decay must be in (0, 1], got 0"),
        ({"min_count": 0}, "method.min_count must be >= 1, got 0"),
        ({"exclude_most_frequent": -1}, "method.exclude_most_frequent must be >= 0, got -1"),
    ],
)
def test_ranges(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        rocks(**keys)
    assert str(refused.value) == message


def test_a_window_that_is_off_may_have_any_radius() -> None:
    assert rocks(window_radius=0).window == "none"


@pytest.mark.parametrize(("token_ids", "got"), [((), "[]"), ((3, 151936), "[151936]"), ((-1,), "[-1]")])
def test_ids_outside_the_vocabulary_are_refused(token_ids: tuple[int, ...], got: str) -> None:
    with pytest.raises(ValueError) as refused:
        rocks(token_ids=token_ids, tokenizer_digest=FACTS.tokenizer).check(FACTS)
    assert str(refused.value) == (
        f"method.token_ids must name at least one id in [0, 151936), got {got}; "
        "run 'opd-lab analyze rock corpus RUN', then 'rock select RUN', and use the method it writes"
    )


def test_ids_of_another_tokenizer_are_refused() -> None:
    with pytest.raises(ValueError) as refused:
        rocks(tokenizer_digest="ab12").check(replace(FACTS, tokenizer="cd34"))
    assert str(refused.value) == (
        "token_ids were chosen with tokenizer ab12, this run uses cd34; select them again on this model"
    )


def test_conventions() -> None:
    said = rocks(align="previous", normalizer="kept_weight", window="radius", tokenizer_digest="ab12").conventions()
    wanted = {"denominator": "kept_weight", "normalizer": "kept_weight", "align": "previous", "window": "radius"}
    assert said == OPD().conventions() | wanted | {"digest": "ab12"}
    assert rocks().conventions()["denominator"] == "tokens"
