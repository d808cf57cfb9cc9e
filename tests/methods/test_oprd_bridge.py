"""OPRD-Bridge: the layer map, the fit by hand and against its laws, the frozen ruler, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
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

NUMBERS = {"atol": 1e-6, "rtol": 0}


def numbers(*rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# G3 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depths", "blocks"),
    [
        ((2, 3), "1 3"),
        ((3, 2), "1 1 2"),
        ((3, 4), "1 3 4"),
        ((3, 6), "1 3 6"),
        ((5, 3), "1 1 2 3 3"),
        ((6, 4), "1 2 2 3 3 4"),
        ((1, 3), "3"),
        ((28, 36), "1 2 4 5 6 7 9 10 11 13 14 15 17 18 19 20 22 23 24 26 27 28 30 31 32 33 35 36"),
        ((28, 32), "1 2 3 4 6 7 8 9 10 11 12 14 15 16 17 18 19 21 22 23 24 25 26 27 29 30 31 32"),
    ],
)
def test_layer_map(depths: tuple[int, int], blocks: str) -> None:
    assert bridge.layer_map(*depths) == tuple(map(int, blocks.split()))


def test_blocks_are_mapped_and_the_teacher_is_asked_for_its_own() -> None:
    facts = replace(FACTS, student_shape=(6, 8), teacher_shape=(4, 12))
    method = OprdBridge(layers="even").bind(facts)
    assert method.pairs == ((2, 2), (4, 3), (6, 4))
    asked = {dict(signal.args)["owner"]: dict(signal.args)["layers"] for signal in method.needs().tokens}
    assert asked == {"student": (2, 4, 6), "teacher": (2, 3, 4)}


# G4, G5: five rows, teacher width 3, student width 2 -------------------------------------------------------------

T = numbers((3, 1, 0), (1, 1, 0), (-1, 0, 1), (-3, 0, 0), (0, 3, -1))
S = numbers((2, 1), (1, 1), (0, -1), (-2, 0), (1, 2))


def fitted(rank: int, center: bool = False, student: Tensor = S, teacher: Tensor = T) -> bridge.Maps:
    """The closed form on these rows."""
    m = bridge.moments(student[:, None], teacher[:, None])
    basis_LEE, _ = bridge.principal(m)
    mean_LD = m["s_LD"] / m["rows"] * center
    maps = bridge.Maps(((1, 1),), mean_LD, mean_LD, basis_LEE[:, :rank], m["t_LE"] / m["rows"])
    return maps._replace(student_LRD=bridge.regress(m, maps))


def sides(maps: bridge.Maps) -> tuple[Tensor, Tensor]:
    return maps.student(S[:, None])[:, 0], maps.teacher(T[:, None])[:, 0]


def squared_error(maps: bridge.Maps) -> float:
    own, theirs = sides(maps)
    return float((own - theirs).square().sum(-1).mean())


def test_principal_directions() -> None:
    basis_LEE, value_LE = bridge.principal(bridge.moments(S[:, None], T[:, None]))
    torch.testing.assert_close(value_LE, numbers((5.3056766, 1.6101917, 0.0841317)), **NUMBERS)
    wanted = numbers((0.9584610, 0.2699803, -0.0919955), (-0.2793745, 0.8236481, -0.4935116))
    torch.testing.assert_close(basis_LEE[0, :2], wanted, **NUMBERS)
    torch.testing.assert_close(fitted(2).teacher_mean_LE, numbers((0, 1, 0)))


def test_closed_form() -> None:
    one, two = fitted(1), fitted(2)
    wanted = numbers((1.4073867, -0.0883916), (-0.4425748, 0.9163967))
    torch.testing.assert_close(two.student_LRD[0], wanted, **NUMBERS)
    torch.testing.assert_close(one.student_LRD[0], wanted[:1], **NUMBERS)  # rank 1 is a slice of rank 2
    assert squared_error(one) == pytest.approx(0.5209304, abs=1e-6)
    assert squared_error(two) == pytest.approx(1.0527910, abs=1e-6)
    torch.testing.assert_close(cosine_similarity(*sides(one)), numbers(1, 1, -1, 1, 1))  # at rank 1, signs
    rows = numbers(0.9567775, 0.8089118, 0.5395910, 0.9553151, 0.9058019)
    torch.testing.assert_close(cosine_similarity(*sides(two)), rows, **NUMBERS)
    assert float(bridge.cosines(two, [(S[:2, None], T[:2, None]), (S[2:, None], T[2:, None])])) == pytest.approx(
        0.8332794, abs=1e-6
    )


def test_closed_form_with_the_student_centred() -> None:
    one, two = fitted(1, center=True), fitted(2, center=True)
    wanted = numbers((1.3921197, 0.2169496), (-0.4537367, 1.1396351))
    torch.testing.assert_close(two.student_LRD[0], wanted, **NUMBERS)
    assert squared_error(one) == pytest.approx(0.1706065, abs=1e-6)
    assert squared_error(two) == pytest.approx(0.5152107, abs=1e-6)
    assert [float(cosine_similarity(*sides(maps)).mean()) for maps in (one, two)] == pytest.approx(
        [1.0, 0.9397602], abs=1e-6
    )


def test_moments_add_up_over_batches_and_only_kept_rows_count() -> None:
    batches = [(S[:2, None], T[:2, None]), (S[2:, None], T[2:, None])]
    whole = bridge.moments(S[:, None], T[:, None])
    for name, value in bridge.gathered(batches, torch.ones(5, dtype=torch.bool)).items():
        torch.testing.assert_close(value, whole[name])
    keep_N = torch.tensor([True, False, False, True, True])
    some = bridge.moments(S[keep_N][:, None], T[keep_N][:, None])
    for name, value in bridge.gathered(batches, keep_N).items():
        torch.testing.assert_close(value, some[name])


def test_linear_cka() -> None:
    def cka(student: Tensor, teacher: Tensor) -> float:
        return float(bridge.cka(bridge.moments(student[:, None], teacher[:, None])))

    assert cka(S, T) == pytest.approx(0.9316497, abs=1e-6)
    assert cka(S, T.roll(-1, 0)) == pytest.approx(0.5019501, abs=1e-6)  # rows of other tokens
    assert cka(S, 3 * S + 1) == pytest.approx(1)


# G8 --------------------------------------------------------------------------------------------------------------


def test_the_error_of_a_rank() -> None:
    errors = bridge.rank_errors(numbers((4, 2, 1)), numbers((0.9, 0.6, 0.2)))
    torch.testing.assert_close(errors, numbers((5, 1.8, 1.4, 2)))
    assert errors.argmin() == 2


def test_the_share_that_least_squares_finds() -> None:
    """With an intercept, R^2 of a coordinate is 1 - error / variance; the first's is 1 - .1706065 * 5/4 / 5.3056766."""
    m, maps = bridge.moments(S[:, None], T[:, None]), fitted(3, center=True)
    found = bridge.r_squared(m, maps, bridge.principal(m)[1])
    errors = [squared_error(fitted(rank, center=True)) for rank in (1, 2)]
    assert float(found[0, 0]) == pytest.approx(1 - 0.1706065 * 5 / 4 / 5.3056766, abs=1e-6)
    assert float(found[0, 1]) == pytest.approx(1 - (errors[1] - errors[0]) * 5 / 4 / 1.6101917, abs=1e-6)


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


def test_what_the_fit_depends_on() -> None:
    facts = replace(FACTS, student_shape=(2, 64), teacher_shape=(3, 96))
    plain = OprdBridge().bind(facts).preparation()
    assert plain["layers"] == ((1, 1), (2, 3))
    for fields in ({"coef": 2.0}, {"token_loss": "full"}, {"k": 5}, {"normalize": "none"}, {"refit_every": 1}):
        assert OprdBridge(**fields).bind(facts).preparation() == plain
    for fields in ({"rank": 4}, {"fit_seed": 1}, {"align": "token"}, {"center_student": True}, {"fit_lr": 1e-3}):
        assert OprdBridge(**fields).bind(facts).preparation() != plain
    one, two = (OprdBridge(fit_positions="last_k", k=k).bind(facts).preparation() for k in (5, 6))
    assert one != two
