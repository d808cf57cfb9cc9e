"""The fit of a bridge, worked out by hand: layer map, principal directions, closed form, CKA, the error of a rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract_bench import FACTS
from torch import Tensor
from torch.nn.functional import cosine_similarity

from opd_lab.methods import bridge
from opd_lab.methods.oprd_bridge import OprdBridge
from tests.methods.bridges import NUMBERS, S, T, fitted, numbers

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


# G4, G5 --------------------------------------------------------------------------------------------------------


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


# what a fit is known by --------------------------------------------------------------------------------------------


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
