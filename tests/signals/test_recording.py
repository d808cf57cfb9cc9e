"""What the pass writes down, what it may read, and what never enters it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from opd_lab.chunk import Chunk, Declared, States, UndeclaredSignalError, measure
from opd_lab.types import (
    ENTROPY_STUDENT,
    ENTROPY_TEACHER,
    FORWARD_KL,
    LOGP_OLD,
    LOGP_STUDENT,
    LOGP_TEACHER,
    RANK_TEACHER,
    REVERSE_KL,
    Tokens,
    jsd,
    outside,
    overlap,
)
from tests.pair import LOGP, LOGQ, near
from tests.signals.models import LOSSES, Loss, N, models

EVERYTHING = frozenset(
    {LOGP_STUDENT, LOGP_TEACHER, ENTROPY_STUDENT, ENTROPY_TEACHER, REVERSE_KL, FORWARD_KL, RANK_TEACHER, jsd(0.5)}
) | {overlap(4), outside(4)}
UNTRAINED = torch.arange(N) % 3 == 2  # weight 0 in both terms of `models`


def pair() -> Chunk:
    """The golden pair at five tokens, each sampled once."""
    return Chunk(torch.arange(5), LOGP.expand(5, 5), LOGQ.expand(5, 5))


def test_rank_counts_what_the_teacher_prefers() -> None:
    """q = .10 .40 .15 .05 .30"""
    assert pair()[RANK_TEACHER].tolist() == [3, 0, 2, 4, 1]


@pytest.mark.parametrize(("k", "share"), [(1, 0.0), (2, 1 / 2), (3, 2 / 3), (4, 3 / 4), (5, 1.0), (99, 1.0)])
def test_overlap_of_the_likeliest_tokens(k: int, share: float) -> None:
    """In order of the student 0 1 2 3 4, of the teacher 1 4 2 0 3."""
    near(pair()[overlap(k)], *[share] * 5)


@pytest.mark.parametrize(("k", "mass"), [(1, 0.8), (2, 0.75), (3, 0.6), (4, 0.1), (5, 0.0), (99, 0.0)])
def test_the_students_mass_outside_what_the_teacher_likes(k: int, mass: float) -> None:
    """In order of the teacher 1 4 2 0 3, with p = .50 .20 .15 .10 .05."""
    near(pair()[outside(k)], *[mass] * 5)


def test_signals_of_the_sampled_token() -> None:
    near(pair()[LOGP_STUDENT], *(math.log(p) for p in (0.5, 0.2, 0.15, 0.1, 0.05)))
    near(pair()[LOGP_TEACHER], *(math.log(q) for q in (0.1, 0.4, 0.15, 0.05, 0.3)))
    near(pair()[ENTROPY_STUDENT], *[1.333074] * 5)
    near(pair()[ENTROPY_TEACHER], *[1.392321] * 5)
    near(pair()[REVERSE_KL], *[0.645816] * 5)
    near(pair()[FORWARD_KL], *[0.619186] * 5)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_what_is_recorded_is_what_measure_finds(chunk: int) -> None:
    """Of trained and untrained tokens alike, in the order of the tokens."""
    m = models()
    _, out = m.run(LOSSES["reverse"], chunk=chunk, record=EVERYTHING)
    plain = Chunk(
        m.tokens.ids_N, m.student.head.logits(m.student.hidden_NH), m.teacher.head.logits(m.teacher.hidden_NH)
    )
    measured = measure(EVERYTHING, m.tokens.ids_N, m.student, m.teacher, chunk=chunk)
    assert out.signals.keys() == measured.keys() == EVERYTHING
    for signal, value_N in measured.items():
        torch.testing.assert_close(out.signals[signal], value_N)
        torch.testing.assert_close(value_N, plain[signal].detach())
        assert not out.signals[signal].requires_grad


def test_recorded_losses_are_nan_where_the_weight_is_0_and_their_shares_sum_to_the_objective() -> None:
    m = models()
    value, out = m.run(LOSSES["two terms"], record=EVERYTHING)
    for term, loss_N in out.losses.items():
        assert (loss_N.isnan() == (m.weights[term] == 0)).all()
    trained_N = ~out.losses["opd"].isnan()
    torch.testing.assert_close(out.losses["opd"][trained_N], out.signals[REVERSE_KL][trained_N])
    assert sum(out.values.values()) == pytest.approx(float(value.detach()), abs=1e-12)
    share = (m.weights["sft"] * -out.signals[LOGP_STUDENT]).sum() / m.kept["sft"]
    assert out.values["sft"] == pytest.approx(float(share), abs=1e-12)


def test_a_term_that_is_no_number_where_it_has_no_weight_spoils_nothing() -> None:
    """The teacher cannot score token 0, which counts in the other term alone."""
    weights = {term: weight_N.clone() for term, weight_N in models().weights.items()}
    weights["opd"][0], weights["sft"][0] = 0.0, 1.0
    m = replace(models(), weights=weights)
    with torch.no_grad():
        m.teacher.hidden_NH[0] = torch.nan
    value, _ = m.run(LOSSES["two terms"])
    (gradient_NH,) = torch.autograd.grad(value, m.student.hidden_NH)
    assert value.isfinite()
    assert gradient_NH.isfinite().all()
    assert gradient_NH[0].any()


def test_tokens_of_weight_0_never_enter_the_losses() -> None:
    m, seen = models(), []

    def watch(tokens: Tokens) -> dict[str, torch.Tensor]:
        seen.extend((tokens.row_N * 4 + tokens.position_N).tolist())
        return {"opd": tokens[REVERSE_KL]}

    m.run(Loss(watch, frozenset({REVERSE_KL})))
    assert sorted(seen) == [n for n in range(N) if n % 3 != 2]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_whatever_the_teacher_says_of_them(loss: Loss) -> None:
    """The teacher is broken on untrained tokens: NaN on one, a probability of 0 on the next."""
    m = models(softcap=None)
    hidden_NH, weight_VH = m.teacher.hidden_NH.detach().clone(), m.teacher.head.weight_VH.detach().clone()
    hidden_NH[:, 0] = 0.0
    weight_VH[:, 0] = 0.0
    weight_VH[m.tokens.ids_N[5], 0] = -1e308
    sane = replace(m, teacher=States(hidden_NH.clone(), replace(m.teacher.head, weight_VH=weight_VH)))
    hidden_NH[2], hidden_NH[5, 0] = math.nan, 1e10
    broken = replace(m, teacher=States(hidden_NH, sane.teacher.head))
    (wanted, _), (got, out) = sane.run(loss), broken.run(loss, record=EVERYTHING)
    assert out.signals[LOGP_TEACHER][2].isnan()
    assert out.signals[LOGP_TEACHER][5] == -math.inf
    assert out.signals[REVERSE_KL][5] == math.inf
    torch.testing.assert_close([got, *m.gradients(got)], [wanted, *m.gradients(wanted)])


def test_a_chunk_cuts_the_teachers_graph() -> None:
    logits = [LOGP.clone()[None].requires_grad_(), LOGQ.clone()[None].requires_grad_()]
    chunk = Chunk(torch.zeros(1, dtype=torch.long), *logits)
    sum(chunk[signal] for signal in EVERYTHING).sum().backward()  # type: ignore[union-attr]
    assert logits[0].grad is not None
    assert logits[1].grad is None


def test_a_nan_of_the_teacher_on_a_trained_token_shows() -> None:
    m = models()
    hidden_NH = m.teacher.hidden_NH.detach().clone()
    hidden_NH[0] = math.nan
    value, _ = replace(m, teacher=States(hidden_NH, m.teacher.head)).run(LOSSES["reverse"])
    assert value.isnan()


def test_a_teacher_of_scores_alone() -> None:
    """It says log-probs of the sampled tokens, and nothing that needs a distribution."""
    m = models()
    scores = measure(frozenset({LOGP_TEACHER}), m.tokens.ids_N, None, m.teacher, chunk=3)
    served = replace(m, teacher=scores)  # type: ignore[arg-type]
    (got, out), (wanted, _) = served.run(LOSSES["k2"], record=frozenset({LOGP_TEACHER})), m.run(LOSSES["k2"])
    torch.testing.assert_close([got, *m.gradients(got)], [wanted, *m.gradients(wanted)])
    torch.testing.assert_close(out.signals[LOGP_TEACHER], scores[LOGP_TEACHER])
    with pytest.raises(UndeclaredSignalError, match="teacher's full next-token distribution"):
        served.run(LOSSES["reverse"])


def test_an_undeclared_signal_is_refused_with_the_remedy() -> None:
    declared = Declared({REVERSE_KL: 1, FORWARD_KL: 2}, frozenset({REVERSE_KL}), "needs().batch of Fancy")
    assert declared[REVERSE_KL] == 1
    assert list(declared) == [REVERSE_KL]
    message = r"forward_kl is not in needs\(\)\.batch of Fancy \(declared: reverse_kl\); add it there to read it"
    with pytest.raises(UndeclaredSignalError, match=message):
        declared[FORWARD_KL]
    with pytest.raises(UndeclaredSignalError, match=r"forward_kl is not in needs\(\)\.tokens.*add it there"):
        models().run(Loss(LOSSES["forward"].losses, frozenset({REVERSE_KL})))


def test_the_old_log_prob_is_the_current_one_until_it_is_given() -> None:
    def ratio(tokens: Tokens) -> dict[str, torch.Tensor]:
        return {"opd": (tokens[LOGP_STUDENT] - tokens[LOGP_OLD]).exp()}

    m = models()
    loss = Loss(ratio, frozenset({LOGP_STUDENT, LOGP_OLD}))
    _, out = m.run(loss)
    torch.testing.assert_close(out.losses["opd"][~UNTRAINED], torch.ones(int((~UNTRAINED).sum()), dtype=torch.float64))
    logp_N = measure(frozenset({LOGP_STUDENT}), m.tokens.ids_N, m.student, None, chunk=3)[LOGP_STUDENT]
    later = replace(m, tokens=replace(m.tokens, signals={LOGP_OLD: logp_N - math.log(2)}))
    _, out = later.run(loss)
    torch.testing.assert_close(out.losses["opd"][~UNTRAINED], torch.full((8,), 2.0, dtype=torch.float64))


def test_a_few_tokens_at_a_time_or_all_at_once_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the losses asked for already is taken as it is; the rest is computed in pieces of one token."""
    m = models()
    logits = [model.head.logits(model.hidden_NH) for model in (m.student, m.teacher)]
    whole, pieces = (Chunk(m.tokens.ids_N, *logits) for _ in range(2))
    expected = whole.read(EVERYTHING)
    monkeypatch.setattr("opd_lab.chunk.IN_CACHE", 1)
    asked = pieces[REVERSE_KL]
    assert asked.requires_grad
    found = pieces.read(EVERYTHING)
    assert found.keys() == expected.keys() == EVERYTHING
    for signal, value_N in expected.items():
        torch.testing.assert_close(found[signal], value_N)
        assert not found[signal].requires_grad
    assert torch.equal(found[REVERSE_KL], asked)
