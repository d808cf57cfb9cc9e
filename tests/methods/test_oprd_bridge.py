"""OPRD-Bridge: the loss by hand, the laws, the fit as a step of its own, the frozen ruler, the refusals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contract_bench import FACTS, Bench, Frozen, small_bench
from torch import Tensor
from torch.nn.functional import cosine_similarity

from opd_lab.methods import bridge
from opd_lab.methods.oprd import Oprd
from opd_lab.methods.oprd_bridge import OprdBridge
from opd_lab.types import Rollouts, Tokens
from tests.methods.bridges import S, T, fitted, numbers

# G6: the loss of a step, given the maps ----------------------------------------------------------------------------

HAND = {
    "pairs": ((1, 1),),
    "student_LRD": torch.tensor([[[1.0, 0], [0, 2]]]),
    "student_mean_LD": torch.zeros(1, 2),
    "teacher_LRE": torch.tensor([[[0.0, 1, 0], [1, 0, 0]]]),
    "teacher_mean_LE": torch.ones(1, 3),
}


def loss(method: Oprd, student: Tensor, teacher: Tensor, maps: Any = None) -> tuple[Tensor, Tensor]:
    """Per token, and its gradient to the student's states of one block."""
    student = student.clone().requires_grad_()
    none_N = torch.zeros(len(student), dtype=torch.long)
    known = {method.states("student"): student[:, None], method.states("teacher"): teacher[:, None]}
    tokens = Tokens(none_N, none_N, none_N, none_N, none_N, known, state={"bridge": maps or HAND})
    value_N = method.losses(tokens)["rep"]
    return value_N.detach(), torch.autograd.grad(value_N.sum(), student)[0]


def bound(**fields: Any) -> OprdBridge:
    return OprdBridge(layers=((1, 1),), rank=2, **fields)


def test_loss_by_hand() -> None:
    student, teacher = numbers((3, 2)), numbers((5, -2, 1))
    assert float(loss(bound(), student, numbers((5, 4, 9)))[0]) == pytest.approx(0, abs=1e-12)
    value, gradient = loss(bound(), student, teacher)
    assert float(value) == pytest.approx(1.44)
    torch.testing.assert_close(gradient, numbers((0.3072, -0.4608)))
    code = bound(reduce="mean", coef=10.0)
    assert float(loss(code, student, teacher)[0]) == pytest.approx(7.2)
    raw, gradient = loss(bound(normalize="none"), student, teacher)
    assert float(raw) == 36
    torch.testing.assert_close(gradient, numbers((12, 0)))


def test_loss_of_the_fit_by_hand() -> None:
    maps = fitted(2)._asdict()
    assert float(loss(bound(), S, T, maps)[0].mean()) == pytest.approx(0.3334411, abs=1e-6)
    assert float(loss(bound(reduce="mean"), S, T, maps)[0].mean()) == pytest.approx(0.1667206, abs=1e-6)


# laws ------------------------------------------------------------------------------------------------------------


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gradient_stays_in_the_row_space_and_is_orthogonal_to_the_projected_state() -> None:
    student, teacher = random(7, 6), random(7, 5, seed=1)
    m = bridge.moments(student[:, None], teacher[:, None])
    maps = fitted(2, student=student, teacher=teacher)
    value_N, gradient = loss(bound(), student, teacher, maps._asdict())
    inside = torch.linalg.pinv(maps.student_LRD[0]) @ maps.student_LRD[0]
    torch.testing.assert_close(gradient @ inside, gradient)
    assert (gradient * student).sum(-1).abs().max() < 1e-12  # scaling the state changes nothing
    torch.testing.assert_close(loss(bound(), 3 * student, teacher, maps._asdict())[0], value_N)
    cosine_N = cosine_similarity(maps.student(student[:, None]), maps.teacher(teacher[:, None]), dim=-1)[:, 0]
    torch.testing.assert_close(value_N, 2 - 2 * cosine_N)
    assert int(m["rows"]) == 7


def test_a_rotation_of_the_subspace_changes_nothing() -> None:
    student, teacher = random(7, 6), random(7, 5, seed=1)
    maps = fitted(3, student=student, teacher=teacher)
    turn = torch.linalg.qr(random(3, 3, seed=2))[0]
    turned = maps._replace(student_LRD=turn @ maps.student_LRD, teacher_LRE=turn @ maps.teacher_LRE)
    for fields in ({}, {"normalize": "none"}, {"reduce": "mean"}):
        one, other = (loss(bound(**fields), student, teacher, x._asdict()) for x in (maps, turned))
        torch.testing.assert_close(one, other)


def test_the_identity_is_vanilla() -> None:
    student, teacher = random(7, 4), random(7, 4, seed=1)
    eye, zero = torch.eye(4).double()[None], torch.zeros(1, 4).double()
    maps = bridge.Maps(((1, 1),), eye, zero, eye, zero)._asdict()
    for fields in ({"normalize": "none", "reduce": "mean"}, {"normalize": "l2", "reduce": "sum"}):
        vanilla = Oprd(layers=((1, 1),), **fields)
        torch.testing.assert_close(loss(bound(**fields), student, teacher, maps), loss(vanilla, student, teacher))


def test_a_teacher_that_is_the_student_is_met_with_an_intercept_only() -> None:
    states = random(20, 6) + 1
    zero, gradient = loss(bound(), states, states, fitted(2, True, states, states)._asdict())
    assert zero.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-6
    assert loss(bound(), states, states, fitted(2, False, states, states)._asdict())[0].mean() > 1e-3


# the fit as a step of its own --------------------------------------------------------------------------------------


class Ask(Frozen):
    """The bench's models, and how often they were asked."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.asked: list[tuple[int, int]] = []

    def rollouts(self, prompts: int, max_tokens: int) -> Rollouts:
        self.asked.append((prompts, max_tokens))
        return super().rollouts(prompts, max_tokens)


def prepared(**fields: Any) -> tuple[bridge.Maps, dict[str, float], Ask]:
    bench = small_bench(OprdBridge(**{"rank": 3, **fields}))
    ask = Ask(bench)
    found = bench.method.prepare(ask, {"other": 1})
    assert found.state["other"] == 1
    return bridge.Maps(**found.state["bridge"]), found.metrics, ask


def training_rows(ask: Ask, method: OprdBridge) -> Iterator[bridge.Rows]:
    """The rows that the fit has seen, found again by its own seed."""
    given = ask.bench.rollouts
    order_B = torch.randperm(len(given), generator=torch.Generator().manual_seed(method.fit_seed))[1:]
    seen = ask.states(given.rows(order_B), method.both)
    yield seen[method.states("student")], seen[method.states("teacher")]


def test_least_squares_at_a_rank_is_a_slice_of_a_larger_one() -> None:
    three, asked = prepared(solver="least_squares")[0], prepared(solver="least_squares")[2].asked
    five = prepared(solver="least_squares", rank=5)[0]
    torch.testing.assert_close(three.student_LRD, five.student_LRD[:, :3])
    torch.testing.assert_close(three.teacher_LRE, five.teacher_LRE[:, :3])
    assert asked == [(2000, 4096)]
    assert three.pairs == ((1, 1), (2, 2))


@pytest.mark.parametrize("center", [False, True])
def test_adamw_nears_least_squares_and_never_passes_it(center: bool) -> None:
    def error(maps: bridge.Maps) -> float:
        ((student, teacher),) = training_rows(ask, method)
        return float((maps.student(student) - maps.teacher(teacher)).square().mean())

    exact, _, ask = prepared(solver="least_squares", center_student=center)
    method = ask.bench.method
    assert isinstance(method, OprdBridge)
    short = prepared(center_student=center)[0]
    long, metrics, _ = prepared(fit_epochs=400, fit_lr=0.03, center_student=center)
    assert error(exact) <= error(long) < 1.2 * error(exact) < error(short)
    curve = [metrics[f"oprd/bridge_fit_loss_epoch{epoch}_raw"] for epoch in (1, 10, 400)]
    assert curve == sorted(curve, reverse=True)
    assert prepared(fit_epochs=400, fit_lr=0.03, center_student=center)[1] == pytest.approx(metrics, nan_ok=True)


def test_the_best_epoch_is_taken_where_asked() -> None:
    keys: dict[str, Any] = {"fit_epochs": 60, "fit_lr": 0.1, "fit_seed": 3}
    last, best = (
        prepared(**keys, fit_select=name)[1]["oprd/bridge_cosine_after_fraction"] for name in ("last", "best_cosine")
    )
    assert best > last


def test_the_principal_rows_are_sampled_by_the_fits_seed() -> None:
    some = [prepared(pca_rows=6, fit_seed=seed, fit_epochs=1)[0].teacher_LRE for seed in (1, 1, 2)]
    assert torch.equal(some[0], some[1])
    assert not torch.allclose(some[0], some[2])


def test_the_report_of_the_fit() -> None:
    maps, metrics, ask = prepared(solver="least_squares", rank=8)
    assert metrics["oprd/bridge_explained_fraction"] == pytest.approx(1)  # the bench is 8 wide
    layers = [metrics[f"oprd/bridge_cosine_after_layer{block}_fraction"] for block in (1, 2)]
    assert metrics["oprd/bridge_cosine_after_fraction"] == pytest.approx(sum(layers) / 2)
    assert {name.split("bridge_")[1] for name in metrics if "layer" not in name} == {
        *("explained_fraction", "best_rank_dimensions", "cka_fraction"),
        *("cosine_before_fraction", "cosine_after_fraction"),
    }
    assert not any(value.requires_grad for value in (maps.student_LRD, maps.teacher_LRE))
    assert ask.asked


def test_too_few_rows() -> None:
    bench = small_bench(OprdBridge(solver="least_squares"))
    few = bench.but(rollouts=bench.rollouts.rows(torch.tensor([1, 4])))  # 3 and 2 tokens; one rollout is held out
    with pytest.raises(ValueError, match=r"method\.fit_prompts gives fewer rows \([23]\) than rank \+ 1 \(9\)"):
        bench.method.prepare(Frozen(few), {})


# the ruler -------------------------------------------------------------------------------------------------------


def test_the_ruler_is_frozen_unless_asked_to_move() -> None:
    frozen = small_bench(OprdBridge(rank=3))
    batch, _ = frozen.batch()
    seen = replace(batch, tallies=frozen.run()[0].tallies)
    assert frozen.method.update(seen.state, seen) is seen.state
    moving = small_bench(OprdBridge(rank=3, refit_every=2))
    batch, _ = moving.batch()  # step 3: the fourth
    seen = replace(batch, tallies=moving.run()[0].tallies)
    before, after = seen.state["bridge"], moving.method.update(seen.state, seen)["bridge"]
    assert torch.equal(before["teacher_LRE"], after["teacher_LRE"])
    m = {name: seen.tallies[name] for name in ("rows", "s_LD", "t_LE", "ss_LDD", "st_LDE", "tt_LEE")}
    assert int(m["rows"]) == 24
    torch.testing.assert_close(after["student_LRD"], bridge.regress(m, bridge.Maps(**before)).float())
    assert not torch.allclose(before["student_LRD"], after["student_LRD"])
    assert moving.method.update(seen.state, replace(seen, step=2)) is seen.state


def test_a_refit_is_measured_on_the_rollouts_of_the_next_step() -> None:
    """G4 at rank 1, uncentred: a refit gives P_S (1.4073867, -.0883916), whose row 3 alone points the wrong way, so its
    mean cosine is .6. A frozen map (1, 0) agrees in sign on all rows but 3, on which its side is 0: (4 + 0) / 5."""
    method = OprdBridge(layers=((1, 1),), rank=1, refit_cosine_every=2)
    maps = fitted(1)
    frozen = maps._replace(student_LRD=torch.tensor([[[1.0, 0.0]]], dtype=torch.float64))._asdict()
    none_N = torch.zeros(len(S), dtype=torch.long)

    def step(at: int, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is reported of a step, and the state after it."""
        known = {method.states("student"): S.reshape(-1, 1, 2), method.states("teacher"): T.reshape(-1, 1, 3)}
        on = {"supervised": torch.ones(len(S), dtype=torch.bool)}
        tokens = Tokens(none_N, none_N, none_N, none_N, none_N, known, consulted=on, step=at, state=state)
        batch: Any = SimpleNamespace(tallies=method.tally(tokens), step=at)
        return dict(method.metrics(batch, {})), method.update(state, batch)

    first, state = step(0, {"bridge": frozen})
    assert "refit" not in state and "oprd/bridge_refit_cosine_fraction" not in first
    second, state = step(1, state)  # the second step: a map is fitted anew
    assert "oprd/bridge_refit_cosine_fraction" not in second
    torch.testing.assert_close(state["refit"]["student_LRD"][0, 0], numbers(1.4073867, -0.0883916).float())
    assert state["bridge"] is frozen
    third, state = step(2, state)
    assert third["oprd/bridge_refit_cosine_fraction"] == pytest.approx(0.6, abs=1e-6)
    assert third["oprd/subspace_cosine_mean_fraction"] == pytest.approx(first["oprd/subspace_cosine_mean_fraction"])
    assert "refit" not in state


def test_a_bad_fit_is_said() -> None:
    tallies = {"tokens": torch.tensor(2), "cosine_L": numbers(1.12, 1.2)}
    assert bound().notes(tallies) == [
        "cosine through the fitted bridge 0.58, below method.warn_cosine=0.8; try solver: least_squares, more "
        "fit_prompts or another rank"
    ]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 128}, r"method\.rank must be in \[1, min\(d_S, d_T\)\] = \[1, 64\], got 128"),
        ({"rank": 0}, r"method\.rank must be >= 1, got 0"),
        ({"pca_rows": 8}, r"method\.pca_rows must exceed rank \(8\), got 8"),
        ({"fit_lr": 0.0}, r"method\.fit_lr must be > 0, got 0"),
        ({"fit_epochs": 0}, r"method\.fit_epochs must be > 0, got 0"),
        ({"fit_prompts": 0}, r"method\.fit_prompts must be > 0, got 0"),
        ({"fit_batch_rollouts": 0}, r"method\.fit_batch_rollouts must be > 0, got 0"),
        ({"fit_validation_fraction": 0.6}, r"method\.fit_validation_fraction must be in \(0, 0\.5\], got 0\.6"),
        ({"fit_positions": "last"}, r"method\.fit_positions must be one of all, last_k, got last"),
        ({"solver": "sgd"}, r"method\.solver must be one of adamw, least_squares, got sgd"),
        ({"fit_select": "first"}, r"method\.fit_select must be one of last, best_cosine, got first"),
        ({"refit_every": -1}, r"method\.refit_every must be >= 0 steps, got -1"),
    ],
)
def test_refusals(fields: dict[str, Any], words: str) -> None:
    facts = replace(FACTS, student_shape=(2, 64), teacher_shape=(3, 96))
    OprdBridge().check(facts)
    with pytest.raises(ValueError, match=words):
        OprdBridge(**fields).check(facts)
