"""OPRD Vanilla: the page's vectors worked out by hand, the laws, the places, the refusals, and no LM head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_bench import FACTS, YAMLS, method_in, small_bench
from lab_run import run
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.chunk import Head
from opd_lab.methods.oprd import Oprd
from opd_lab.tracking import read
from opd_lab.types import Tokens

NUMBERS = {"atol": 1e-6, "rtol": 0}
RAGGED = ([[3, 4, 5, 6], [7]], [[8, 1], [9, 10, 11]])


def numbers(*rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def bound(pairs: int = 1, **fields: Any) -> Oprd:
    return Oprd(layers=tuple((block, block) for block in range(1, pairs + 1)), **fields)


def tokens_with(method: Oprd, student_ND: Tensor, teacher_ND: Tensor) -> Tokens:
    """Tokens of which the hidden states of one block are known; all are supervised."""
    none_N = torch.zeros(len(student_ND), dtype=torch.long)
    known = {method.states("student"): student_ND[:, None], method.states("teacher"): teacher_ND[:, None]}
    return Tokens(none_N, none_N, none_N, none_N, none_N, known, {"supervised": none_N == 0})


def loss(method: Oprd, student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    return method.losses(tokens_with(method, student_ND, teacher_ND))["rep"]


def with_gradient(method: Oprd, student_ND: Tensor, teacher_ND: Tensor) -> tuple[Tensor, Tensor]:
    student_ND = student_ND.clone().requires_grad_()
    value_N = loss(method, student_ND, teacher_ND)
    return value_N.detach(), torch.autograd.grad(value_N.sum(), student_ND)[0]


# G1: one block, two tokens, width 4 ------------------------------------------------------------------------------

S = numbers((1, 2, 2, 0), (0, 3, 0, 4))
T = numbers((2, 2, 1, 0), (0, 4, 0, 3))


def test_raw_mean_and_its_gradient() -> None:
    value_N, gradient_ND = with_gradient(bound(), S, T)
    torch.testing.assert_close(value_N, numbers(0.5, 0.5), **NUMBERS)
    torch.testing.assert_close(gradient_ND, numbers((-0.5, 0, 0.5, 0), (0, -0.5, 0, 0.5)), **NUMBERS)


def test_directions_and_their_gradient() -> None:
    value_N, gradient_ND = with_gradient(bound(normalize="l2"), S, T)
    torch.testing.assert_close(value_N, numbers(0.0555556, 0.02), **NUMBERS)
    wanted = numbers((-0.0617284, -0.0123457, 0.0432099, 0), (0, -0.0224, 0, 0.0168))
    torch.testing.assert_close(gradient_ND, wanted, **NUMBERS)
    assert (gradient_ND * S).sum(-1).abs().max() < 1e-12  # orthogonal to the student's state
    total_N = loss(bound(normalize="l2", reduce="sum"), S, T)
    torch.testing.assert_close(total_N, numbers(0.2222222, 0.08), **NUMBERS)
    tally = bound().tally(tokens_with(bound(), S, T))
    assert float(tally["cosine_L"]) == pytest.approx(0.8888889 + 0.96, abs=1e-6)


def test_directions_do_not_see_the_length_and_cost_2_minus_2_cos() -> None:
    one, ten = (loss(bound(normalize="l2", reduce="sum"), factor * S, T) for factor in (1, 10))
    torch.testing.assert_close(one, ten)
    torch.testing.assert_close(one, 2 - 2 * torch.cosine_similarity(S, T))
    angle, wide_T = math.acos(0.95), torch.zeros(1, 1536, dtype=torch.float64)
    wide_S = wide_T.clone()
    wide_T[0, 0], wide_S[0, 0], wide_S[0, 1] = 1, math.cos(angle), math.sin(angle)
    assert float(loss(bound(normalize="l2"), wide_S, wide_T)) == pytest.approx(6.5e-5, abs=2e-7)


def test_coef_is_a_factor_and_zero_states_are_finite() -> None:
    torch.testing.assert_close(loss(bound(coef=10.0), S, T), numbers(5, 5))
    value_N, gradient_ND = with_gradient(bound(normalize="l2"), 0 * S, T)
    assert value_N.isfinite().all()
    assert gradient_ND.isfinite().all()


def test_large_states_are_subtracted_in_fp32() -> None:
    """Residual norms of 1e3: in bf16 the sum of squares would be off by parts in a hundred."""
    student, teacher = (1e3 + x.repeat(1, 64).bfloat16() for x in (8 * S, 8 * T))
    exact = loss(bound(), student.double(), teacher.double())
    torch.testing.assert_close(loss(bound(), student, teacher).double(), exact, rtol=1e-6, atol=0)
    assert loss(bound(), student, teacher).dtype == torch.float32


# G7: what the LM head hides --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shift", "kl", "error"),
    [((0, 0, 5), 0.0, 8.3333333), ((1, 1, 0), 0.0, 0.6666667), ((1, 0, 0), 0.1201145, 0.3333333)],
)
def test_states_may_differ_where_distributions_do_not(shift: tuple, kl: float, error: float) -> None:
    head, teacher_ND = Head(numbers((1, 0, 0), (0, 1, 0))), numbers((1, 2, 0))
    student_ND = teacher_ND + numbers(shift)
    logp_NV, logq_NV = (head.logits(x).log_softmax(-1) for x in (student_ND, teacher_ND))
    assert float(d.reverse_kl(logp_NV, logq_NV)) == pytest.approx(kl, abs=1e-6)
    assert float(loss(bound(), student_ND, teacher_ND)) == pytest.approx(error, abs=1e-6)


# it learns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [p for p in YAMLS if p.stem.startswith("oprd")], ids=lambda path: path.stem)
def test_a_small_step_moves_the_states_towards_the_teachers(path: Any) -> None:
    bench = small_bench(replace(method_in(path), token_loss="none"))  # type: ignore[call-arg]

    def cosine() -> float:
        return float(bench.run()[0].tallies["cosine_L"].mean())

    before, (found, _) = cosine(), bench.run()
    for _ in range(5):
        _, grad_VH = bench.run()
        with torch.no_grad():
            bench.weight_VH -= 0.02 * grad_VH / grad_VH.norm()
    assert cosine() > before
    assert bench.run()[0].objective < found.objective


def test_on_a_pair_of_one_shape_the_kl_falls_too(tmp_path: Path) -> None:
    result = run(tmp_path, "method=oprd", "model=lab_same_shape", "steps=10", "rollout.prompts=16", "evaluate.every=0")
    found = read.metrics(result.folder).pivot(index="step", columns="name", values="value")
    first, last = found.loc[1], found.loc[10]
    assert last["kl/reverse_mean_nats"] < 0.8 * first["kl/reverse_mean_nats"]
    assert last["oprd/cosine_mean_fraction"] > first["oprd/cosine_mean_fraction"] + 0.03
    assert last["loss/rep_value"] < 0.7 * first["loss/rep_value"]
    assert last["oprd/hidden_mse_mean_raw"] == pytest.approx(last["loss/rep_value"], rel=0.1)  # all tokens, nearly


# terms, metrics, words -------------------------------------------------------------------------------------------


def test_the_terms_are_those_that_count() -> None:
    bench = small_bench(Oprd())
    for token_loss, terms in (("none", {"rep"}), ("sampled", {"rep", "opd"}), ("topk", {"rep", "opd"})):
        found, _ = bench.with_fields({"token_loss": token_loss}).run()
        assert found.values.keys() == terms
    opd = bench.with_fields({"token_loss": "full", "coef": 0.0}).run()[0].values["opd"]
    assert bench.with_fields({"token_loss": "full"}).run()[0].values["opd"] == opd


def tallied(method: Oprd, *tokens: Tokens) -> Mapping[str, Tensor]:
    parts = [method.tally(x) for x in tokens]
    return {name: sum(part[name] for part in parts) for name in parts[0]}  # type: ignore[misc]


def test_metrics_by_hand() -> None:
    method = bound()
    batch, _ = small_bench(Oprd()).batch()
    seen = tallied(method, tokens_with(method, S[:1], T[:1]), tokens_with(method, S[1:], T[1:]))
    found = method.metrics(replace(batch, tallies=seen), {})
    assert found == pytest.approx(
        {
            "oprd/cosine_mean_fraction": (8 / 9 + 0.96) / 2,
            "oprd/cosine_layer1_fraction": (8 / 9 + 0.96) / 2,
            "oprd/hidden_mse_mean_raw": 0.5,
            "oprd/supervised_tokens": 2,
            "oprd/teacher_norm_mean_raw": 4,
            "oprd/top5_dims_share_fraction": 1,
        }
    )
    assert method.metrics(batch, {}) == {}


def test_top5_share_of_an_outlier_dimension() -> None:
    student, teacher = torch.ones(3, 10).double(), torch.zeros(3, 10).double()
    student[:, 4] = 9  # 9 ones and one 81: the five worst have 85 of 90
    batch, _ = small_bench(Oprd()).batch()
    found = bound().metrics(replace(batch, tallies=tallied(bound(), tokens_with(bound(), student, teacher))), {})
    assert found["oprd/top5_dims_share_fraction"] == pytest.approx(85 / 90)


def test_low_initial_cosine_is_said() -> None:
    tallies = {"tokens": torch.tensor(2), "cosine_L": numbers(1.12, 1.36)}
    assert bound().notes(tallies) == [
        "initial cosine 0.62 (paper's pair: 0.93); equal shape is not shared representation, consider oprd_bridge"
    ]
    assert bound(warn_cosine=0.6).notes(tallies) == []


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        *(("all", (1, 2, 3, 4, 5)), ("last", (5,)), ("even", (2, 4)), ("odd", (1, 3, 5)), ((4, 2), (4, 2))),
    ],
)
def test_blocks_are_counted_from_1(layers: Any, wanted: tuple[int, ...]) -> None:
    facts = replace(FACTS, student_shape=(5, 8), teacher_shape=(5, 8))
    method = Oprd(layers=layers).bind(facts)
    assert method.pairs == tuple((block, block) for block in wanted)
    assert method.bind(facts) == method
    assert dict(method.states("teacher").args)["layers"] == wanted


@pytest.mark.parametrize(
    ("fields", "facts", "words"),
    [
        ({"k": 0}, {}, r"method\.k must be >= 1 token, got 0"),
        ({"positions": "x"}, {}, r"method\.positions must be one of last_k, first_k, last, all, got x"),
        ({"align": "x"}, {}, r"method\.align must be one of predict, token, got x"),
        ({"normalize": "x"}, {}, r"method\.normalize must be one of none, l2, got x"),
        ({"reduce": "x"}, {}, r"method\.reduce must be one of mean, sum, got x"),
        ({"aggregation": "x"}, {}, r"method\.aggregation must be one of sequence_mean, token_mean, got x"),
        ({"token_loss": "x"}, {}, r"method\.token_loss must be one of none, sampled, topk, full, got x"),
        ({"coef": -1.0}, {}, r"method\.coef must be >= 0, got -1"),
        ({"coef": 0.0}, {}, r"method\.coef=0 with token_loss=none leaves nothing to minimise"),
        ({"layers": (3,)}, {}, r"method\.layers must be all, last, even, odd or blocks in 1\.\.2, got \[3\]"),
        ({"layers": "none"}, {}, r"method\.layers must be all, last, even, odd or blocks in 1\.\.2, got none"),
        ({"warn_cosine": 2.0}, {}, r"method\.warn_cosine must be in \[-1, 1\], got 2"),
        (
            {},
            {"student_shape": (2, 64), "teacher_shape": (3, 96)},
            r"method=oprd compares raw hidden states: student 2x64 and teacher 3x96 \(depth x width\) differ; "
            "use method=oprd_bridge or a same-shape pair",
        ),
        (
            {},
            {"teacher": "server", "teacher_shape": None},
            "teacher=server returns no hidden states, which method=oprd needs; use teacher=local",
        ),
        ({"token_loss": "sampled"}, {"updates_per_rollout": 2}, "one update per rollout"),
    ],
)
def test_refusals(fields: dict[str, Any], facts: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Oprd(**fields).check(replace(FACTS, **facts))
