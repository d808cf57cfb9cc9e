"""OmniOPD: numbers worked out by hand, and laws."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from audits import CHUNK, LETTERS, Letters, Step, Teacher, waves, worth
from by_hand import FACTS
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.omniopd import OmniOPD, effort
from opd_lab.types import Behavior

FOUR = (worth(1, 1, 0.6, 0), worth(0.4, 0, 0, 0))  # k 2.6 and 0.4
G4 = OmniOPD(chunks=2, continuations=4, chunk_tokens=2)
RESPONSES = [[0, 3, 1, 2, 0, 3], [2]]


def near(got: Tensor | float, *expected: float, tolerance: float = 1e-9) -> None:
    got = torch.as_tensor(got, dtype=torch.float64).detach()
    torch.testing.assert_close(
        got, torch.tensor(expected, dtype=torch.float64).reshape(got.shape), atol=tolerance, rtol=0
    )


def step(method: OmniOPD = G4, texts: tuple[list[str], list[str]] = FOUR, **changes: Any) -> Step:
    """The step of G4: two rollouts, of 6 tokens and of 1."""
    shape = (2, 6, 4)
    student, reference = waves(shape, torch.sin, 1, 0.7, 1.3, 2.1), waves(shape, torch.cos, 0.5, 0.4, 1.1, 1.7)
    made = Step(method, student, reference, RESPONSES, Teacher({(0, 1): texts[0], (0, 4): texts[1]}))
    return replace(made, **changes)


def targets(method: OmniOPD, logp_CK: Tensor, texts: list[list[str]]) -> tuple[Tensor, Tensor]:
    """pi_bar and pi_hat of chunks that are whole rollouts, given the log-probs of their tokens."""
    b, t = logp_CK.shape
    p_CK = logp_CK.exp()
    logits_BTV = torch.stack([p_CK, 1 - p_CK], 2).log()
    teacher = Teacher({(row, 0): said for row, said in enumerate(texts)})
    method = replace(method, chunk_tokens=t, chunks=1)
    batch = Step(method, logits_BTV, logits_BTV, [[0] * t] * b, teacher).batch()
    return batch.consulted["prior"][:, 0], batch.consulted["target"][:, 0]


# golden numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "alpha", "pi_hat", "loss"),
    [
        (3.2, 1, 0.354971645, 0.496960302),
        (0, 1, 0.064062554, 0.089687575),
        (10, 1, 0.973153463, 1.362414848),
        (3.2, 5, 0.448229363, 0.627521109),
        (3.2, 0, 0.32, 0.448),
        (0, 0, 0, 0),
    ],
)
def test_g3_the_target_of_a_chunk(k: float, alpha: float, pi_hat: float, loss: float) -> None:
    logp_1K = torch.tensor([[-0.1, -0.7, -0.2, -0.4]], dtype=torch.float64)
    texts = worth(*[1.0] * int(k), *([0.2] if k % 1 else []), *[0.0] * (10 - math.ceil(k)))
    pi_bar_1, pi_hat_1 = targets(OmniOPD(prior_count=alpha), logp_1K, [texts])
    near(pi_bar_1, 0.704688090)  # neither the arithmetic mean 0.722618 nor the product 0.246597
    near(pi_hat_1, pi_hat)
    near(-pi_hat_1 * logp_1K.sum(), loss)


def test_g4_chunks_and_targets() -> None:
    made = step()
    near(made.rollouts.entropy_BT[0], 1.098249611, 1.150359127, 0.826730320, 0.982697017, 0.996224163, 1.044050048)
    batch = made.batch()
    assert G4.opens(batch).nonzero().tolist() == [[0, 1], [0, 4]]
    opens_BT = G4.opens(batch)
    near(batch.consulted["match"][opens_BT], 2.6 / 4, 0.4 / 4)
    near(batch.consulted["prior"][opens_BT], 0.169987141, 0.256526510)
    near(batch.consulted["target"][opens_BT], 0.553997428, 0.131305302)
    assert (~batch.consulted["target"].isnan()).tolist() == [[False, True, True, False, True, True], [False] * 6]


G4_TABLE = {
    "tokens": (
        0.332642130, (0.316569959, 0.075031601), 0.042857143,
        (0.031496195, 0.002469229, 0.014210610, -0.048176034), (-0.000960053, 0.001031269, -0.000176443, 0.000105227),
    ),
    "rollouts": (
        1.164247454, (1.107994856, 0.262610604), 0.15,
        (0.110236681, 0.008642300, 0.049737136, -0.168616117), (-0.003360185, 0.003609442, -0.000617551, 0.000368294),
    ),
    "term_tokens": (
        0.582774076, (0.553997428, 0.131305302), 0.1,
        (0.055118340, 0.004321150, 0.024868568, -0.084308059), (-0.002240123, 0.002406294, -0.000411700, 0.000245529),
    ),
}  # fmt: skip


@pytest.mark.parametrize("denominator", G4_TABLE)
def test_g4_objective_weights_and_gradients(denominator: str) -> None:
    objective, audit, anchor, at_01, at_00 = G4_TABLE[denominator]
    found, grad_BTV, batch = step(replace(G4, denominator=denominator)).run()
    weights = replace(G4, denominator=denominator).weights(batch)
    near(found.objective, objective)
    near(weights["audit"][0], 0, audit[0], audit[0], 0, audit[1], audit[1])
    near(weights["anchor"][0], anchor, 0, 0, anchor, 0, 0)
    near(weights["anchor"][1], anchor, 0, 0, 0, 0, 0)
    near(grad_BTV[0, 1], *at_01)
    near(grad_BTV[0, 0], *at_00)


def test_g4_terms() -> None:
    found, _, batch = step().run()
    near((batch.consulted["target"] * found.losses["audit"]).nansum(), 2.320690719, tolerance=1e-6)  # recorded in fp32
    anchored_BT = ~found.losses["anchor"].isnan()
    assert anchored_BT.nonzero().tolist() == [[0, 0], [0, 3], [1, 0]]
    near(found.losses["anchor"][anchored_BT], 0.033744888, 0.014219546, 0.030077446, tolerance=1e-8)


def test_g4_the_wrong_versions_are_other_numbers() -> None:
    made = step()
    ids_BT, mask_BT = made.rollouts.response_BT, made.rollouts.mask_BT
    logits_BTV = made.logits_BTV.clone().requires_grad_()
    logp_BTV, logr_BTV = logits_BTV.log_softmax(-1), made.reference_BTV.log_softmax(-1)
    logp_BT = logp_BTV.gather(2, ids_BT[..., None])[..., 0]
    other_BT = made.batch().consulted["target"].isnan() & mask_BT
    audit = torch.zeros((), dtype=torch.float64)
    for start, k in ((1, 2.6), (4, 0.4)):
        logp_K = logp_BT[0, start : start + 2]
        audit = audit - (k + logp_K.mean().exp()) / 5 * logp_K.sum()
    anchor = [kl(logp_BTV[other_BT], logr_BTV[other_BT]).sum() for kl in (d.forward_kl, d.reverse_kl)]
    near((audit + 0.1 * anchor[0]) / 7, 0.332642130)
    near((audit + 0.1 * anchor[1]) / 7, 0.332766134)
    (grad_BTV,) = torch.autograd.grad(audit / 7, logits_BTV)
    near(grad_BTV[0, 1], 0.028071135, 0.002200712, 0.012665275, -0.042937122)


@pytest.mark.parametrize(
    ("denominator", "objective", "audit"),
    [("tokens", 0.330206632, 0.185714286), ("rollouts", 1.155723212, 0.65), ("term_tokens", 0.578511955, 0.325)],
)
def test_g5_a_chunk_of_weight_zero_is_not_counted(denominator: str, objective: float, audit: float) -> None:
    method = replace(G4, prior_count=0.0, denominator=denominator)
    found, grad_BTV, batch = step(method, (FOUR[0], worth(0, 0, 0, 0))).run()
    near(found.objective, objective)
    near(method.weights(batch)["audit"][0], 0, audit, audit, 0, 0, 0)
    assert bool((grad_BTV[0, 4:] == 0).all())
    assert method.weights(batch)["anchor"][0, 4:].tolist() == [0, 0], "it is audited, and not anchored"


def test_g6_effort() -> None:
    def of(m: int, n: int, c: int, t: int = 4000) -> float:
        return effort(m * n * c, m * t / 2, t)

    near(torch.tensor([of(5, 10, 50), of(10, 10, 50), of(10, 10, 100)]), 0.875, 1.75, 3.0, tolerance=1e-6)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (1, (0.080909091, -0.082363636, 0.001454545)),
        (0, (0.095, -0.093, -0.002)),
        (1e12, (-0.06, 0.024, 0.036)),
    ],
)
def test_g7_expected_gradient(alpha: float, expected: tuple[float, ...]) -> None:
    """One token, exact match: every token and every number of matches among the ten, by its probability."""
    p_V, q_V = (torch.tensor(x, dtype=torch.float64) for x in ((0.5, 0.3, 0.2), (0.1, 0.6, 0.3)))
    logits_V = p_V.log().requires_grad_()
    cases = [(y, k) for y in range(3) for k in range(11)]
    _, pi_hat_C = targets(
        OmniOPD(prior_count=alpha),
        p_V.log()[torch.tensor([[y] for y, _ in cases])],
        [worth(*[1.0] * k, *[0.0] * (10 - k)) for _, k in cases],
    )
    chance_C = torch.stack([p_V[y] * math.comb(10, k) * q_V[y] ** k * (1 - q_V[y]) ** (10 - k) for y, k in cases])
    logp_C = logits_V.log_softmax(0)[torch.tensor([y for y, _ in cases])]
    (grad_V,) = torch.autograd.grad(-(chance_C * pi_hat_C * logp_C).sum(), logits_V)
    near(grad_V, *expected)
    if alpha == 0:  # that of the chance to agree, which is no divergence
        (agree_V,) = torch.autograd.grad(-(logits_V.softmax(0) * q_V).sum(), logits_V)
        near(grad_V, *agree_V.tolist())
    (kl_V,) = torch.autograd.grad(d.reverse_kl(logits_V.log_softmax(0), q_V.log()), logits_V)
    near(kl_V, 0.546878066, -0.362648688, -0.184229378)


# laws ---------------------------------------------------------------------------------------------------------------


def test_no_chunk_and_the_reference_itself_teach_nothing() -> None:
    made = step(replace(G4, chunk_tokens=7))
    found, grad_BTV, _ = replace(made, reference_BTV=made.logits_BTV).run()
    assert found.objective == 0 and float(grad_BTV.abs().max()) < 1e-15
    assert made.teacher.asked == [], "nothing was to be asked"


def test_a_prior_without_end_forgets_the_teacher() -> None:
    strong = replace(G4, prior_count=1e12)
    _, one_BTV, batch = step(strong).run()
    _, two_BTV, _ = step(strong, (worth(0, 0, 0, 0), worth(1, 1, 1, 1))).run()
    torch.testing.assert_close(one_BTV, two_BTV, rtol=1e-9, atol=0)
    torch.testing.assert_close(batch.consulted["target"], batch.consulted["prior"], equal_nan=True)


def test_equal_similarity_is_equal_loss_whoever_wrote_the_texts() -> None:
    _, one_BTV, _ = step().run()
    other = [text.replace("z", "é") for text in FOUR[0][::-1]]  # another order, other letters
    _, two_BTV, _ = step(texts=(other, [f" {text}\n" for text in FOUR[1]])).run()
    assert torch.equal(one_BTV, two_BTV)


def test_targets_lie_between_zero_and_one_and_spread_no_more_than_the_bound() -> None:
    logp_CK = torch.full((11, 4), 0.5, dtype=torch.float64).log()
    texts = [worth(*[1.0] * k, *[0.0] * (10 - k)) for k in range(11)]
    _, pi_hat_C = targets(OmniOPD(), logp_CK, texts)
    assert bool(((pi_hat_C > 0) & (pi_hat_C <= 1)).all())
    chance_C = torch.tensor([math.comb(10, k) / 2**10 for k in range(11)], dtype=torch.float64)
    variance = (chance_C * pi_hat_C.square()).sum() - (chance_C * pi_hat_C).sum().square()
    near(variance.sqrt(), 0.143739894)  # reached where each text matches with probability 1/2


def test_the_match_rate_rises_and_the_divergence_ends_above_where_it_was_lowest() -> None:
    """Exact expected gradient on one position: what is audited sharpens onto the teacher's favourite."""
    q_V = torch.tensor([0.45, 0.3, 0.15, 0.07, 0.03], dtype=torch.float64)
    logits_V = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    match, kl = [], []
    for _ in range(4001):
        logp_V = logits_V.log_softmax(0)
        p_V = logp_V.detach().exp()
        match.append(float((p_V * q_V).sum()))
        kl.append(float(d.reverse_kl(logp_V.detach(), q_V.log())))
        loss = -(p_V * (10 * q_V + p_V) / 11 * logp_V).sum()  # pi_hat's mean over the teacher's texts, as in G7
        (grad_V,) = torch.autograd.grad(loss, logits_V)
        logits_V = (logits_V - 0.5 * grad_V).detach().requires_grad_()
    assert all(b > a for a, b in pairwise(match))
    near(torch.tensor([kl[0], kl[40], kl[4000]]), 0.4036, 0.0747, 0.7892, tolerance=1e-4)


def test_the_student_moves_towards_the_teacher_in_the_match_rate() -> None:
    """The same with texts that are drawn: steps of the method itself on one-letter answers."""
    q_V, generator = torch.tensor([0.05, 0.15, 0.8]), torch.Generator().manual_seed(0)
    method = OmniOPD(chunks=1, continuations=4, chunk_tokens=1, prior_count=0.4)
    logits_V, first_V, match = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), []
    for _ in range(60):
        y_B = logits_V.softmax(0).multinomial(64, replacement=True, generator=generator).tolist()
        drawn = q_V.multinomial(256, replacement=True, generator=generator).reshape(64, 4).tolist()
        texts = {(b, 0): [LETTERS[i] for i in row] for b, row in enumerate(drawn)}
        student, reference = logits_V.expand(64, 1, 3), first_V.expand(64, 1, 3)
        made = Step(method, student, reference, [[y] for y in y_B], Teacher(texts), language=Letters())
        found, grad_BTV, batch = made.run()
        metrics = method.metrics(replace(batch, tallies=found.tallies), method.weights(batch))
        match.append(float(metrics["omniopd/match_mean_fraction"]))
        logits_V = logits_V - 0.5 * grad_BTV.sum((0, 1))
    assert sum(match[-10:]) / 10 > sum(match[:10]) / 10 + 0.2, match


# traps --------------------------------------------------------------------------------------------------------------


def test_the_teacher_never_sees_the_chunk() -> None:
    made = step(seed=5, step=8)
    made.batch()
    (asked,) = made.teacher.asked  # all chunks of the step at once
    assert asked["prefix"] == [[90, 91, 0], [90, 91, 0, 3, 1, 2]]
    assert asked["uid"] == [0, 0] and asked["cut"] == [1, 4]
    assert asked["seed"] == (5, 8) and asked["samples"] == 4 and asked["max_tokens"] == 2
    assert asked["temperature"] == asked["top_p"] == 1.0
    first = step(replace(G4, chunks=1, chunk_tokens=6))
    first.teacher.otherwise = FOUR[0]
    first.batch()
    assert first.teacher.asked[0]["prefix"] == [[90, 91]]


def test_too_few_texts_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"chunk at token 4 of rollout 0 .*continuations=4 .* gave 3"):
        step(texts=(FOUR[0], FOUR[1][:3])).batch()


def test_how_the_tokens_were_sampled_chooses_no_chunk() -> None:
    made = step()
    batch = made.batch()
    tempered = replace(batch.rollouts, behavior_logp_BT=2 * batch.rollouts.behavior_logp_BT)
    assert torch.equal(G4.opens(batch), G4.opens(replace(batch, rollouts=tempered)))


def test_random_places_belong_to_seed_step_and_rollout() -> None:
    method = OmniOPD(select="random", chunk_tokens=3, chunks=4, continuations=1)
    flat_BTV = torch.zeros(3, 24, 2, dtype=torch.float64)

    def places(**when: int) -> Tensor:
        made = Step(method, flat_BTV, flat_BTV, [[0] * 24] * 3, Teacher({}, [CHUNK]), **when)
        return method.opens(made.batch())

    once = places()
    assert torch.equal(once, places())
    assert not torch.equal(once, places(seed=1)) and not torch.equal(once, places(step=1))
    assert len({tuple(row) for row in once.tolist()}) == 3
    for row_T in once:
        starts = row_T.nonzero()[:, 0]
        assert len(starts) >= 3 and int(starts.diff().min()) >= 3 and int(starts[-1]) <= 21


def test_texts_are_cut_to_the_students_tokens_where_asked() -> None:
    long = [CHUNK + "tail"] * 4
    cut = replace(G4, length_match="student_tokens", chunks=1)  # a letter is a token here: 2 are left
    near(step(cut, (long, long)).batch().consulted["match"][0, 1], 0.2)
    near(step(replace(cut, length_match="none"), (long, long)).batch().consulted["match"][0, 1], 10 / 14)


def test_a_teacher_that_does_not_sample_is_noticed() -> None:
    same, some = ([worth(0.5)[0]] * 4, [worth(0.3)[0]] * 4), FOUR
    found, _, _ = step(texts=same).run()
    assert "not sampling" in G4.notes(found.tallies)[0]
    assert G4.notes(step(texts=some).run()[0].tallies) == []
    assert replace(G4, continuations=1).notes(found.tallies) == []
    assert G4.notes({}) == []


# what it reports, refuses and says ------------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    found, _, batch = step().run()
    metrics = G4.metrics(replace(batch, tallies=found.tallies), G4.weights(batch))
    expected = {
        "audit_loss_mean_nats": 2.320690719 / 4,
        "reference_kl_mean_nats": (0.033744888 + 0.014219546 + 0.030077446) / 3,
        "audited_fraction": 4 / 7,
        "chunks_mean_count": 1.0,
        "unaudited_rollouts_fraction": 0.5,
        "match_mean_fraction": 3 / 8,
        "zero_match_fraction": 0.0,
        "interior_fraction": 1.0,
        "distinct_fraction": (3 + 2) / 8,
        "prior_share_fraction": (0.169987141 / 2.769987141 + 0.256526510 / 0.656526510) / 2,
        "pi_bar_mean_fraction": (0.169987141 + 0.256526510) / 2,
        "pi_hat_mean_fraction": (0.553997428 + 0.131305302) / 2,
        "effort_ratio": (56 + 0.1 * 9) / 7,  # 2 x 4 texts of 7 tokens; prefixes of 3 and 6
    }
    for name, value in expected.items():
        near(metrics[f"omniopd/{name}"], value)
    near(metrics["entropy/student_at_peaks_mean_nats"], (1.150359127 + 0.996224163) / 2)
    near(metrics["omniopd/start_tokens"], 1, 4)
    assert batch.cost == {
        "teacher_queries_count": 2,
        "teacher_prefix_tokens": 9,
        "teacher_cached_tokens": 0,
        "teacher_generated_tokens": 56,
    }
    first = batch.shown[0]
    assert first["uid"] == 0 and first["start"] == 1 and first["chunk"] == CHUNK and first["texts"] == FOUR[0]
    near(torch.tensor(first["phi"]), 1, 1, 0.6, 0, tolerance=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunks": 0}, "method.chunks must be >= 1, got 0"),
        ({"continuations": 0}, "method.continuations must be >= 1, got 0"),
        ({"chunk_tokens": 0}, "method.chunk_tokens must be >= 1, got 0"),
        ({"prior_count": -1.0}, "method.prior_count must be >= 0, got -1"),
        ({"anchor_weight": -0.1}, "method.anchor_weight must be >= 0, got -0.1"),
        ({"phi": "bleu"}, "method.phi must be one of edit, rouge1, got bleu"),
        ({"phi_unit": "byte"}, "method.phi_unit must be one of character, word, got byte"),
        ({"phi": "rouge1"}, "method.phi=rouge1 counts words; set method.phi_unit=word"),
        ({"select": "even"}, "method.select must be one of entropy, random, got even"),
        ({"placement": "end"}, "method.placement must be one of start, centre, got end"),
        ({"denominator": "sum"}, "method.denominator must be one of tokens, rollouts, term_tokens, got sum"),
        (
            {"teacher_temperature": 0.0},
            "method.teacher_temperature must be > 0, got 0.0: greedy continuations are all the same, so "
            "method.continuations=10 would buy nothing",
        ),
        ({"teacher_top_p": 1.5}, "method.teacher_top_p must be in (0, 1], got 1.5"),
        ({"length_match": "words"}, "method.length_match must be one of none, student_tokens, got words"),
    ],
)
def test_refused_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        OmniOPD(**fields)
    assert str(refused.value) == message


def test_refused_or_warned_before_the_first_token() -> None:
    with pytest.raises(ValueError) as refused:
        OmniOPD().check(replace(FACTS, max_tokens=48))
    assert str(refused.value) == (
        "method.chunk_tokens=50 exceeds the response limit 48: nothing could be audited; use method=omniopd_lab"
    )
    OmniOPD().check(replace(FACTS, max_tokens=50))
    for behavior in (Behavior(temperature=0.7), Behavior(top_p=0.9)):
        with pytest.warns(UserWarning, match="drawn from the student itself"):
            OmniOPD().check(replace(FACTS, max_tokens=50, behavior=behavior))


def test_conventions() -> None:
    said = OmniOPD().conventions()
    assert said["divergence"] == "text_likelihood+forward_kl_reference" and said["denominator"] == "tokens"
    assert said["estimator"] == "edit_character" and said["omniopd_entropy_source"] == "rollout_engine"
    assert OmniOPD(anchor_weight=0.0).conventions()["divergence"] == "text_likelihood"
