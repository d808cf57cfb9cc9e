"""SCOPE where the temperature of the rollouts or a second update matters: through the signals pass, by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from lab_run import run
from torch import Tensor

from opd_lab.chunk import Chunk, Declared
from opd_lab.methods.scope import SCOPE
from opd_lab.tracking import read
from opd_lab.tracking.run_folder import read_table
from opd_lab.types import LOGP_STUDENT, Behavior, Signal, Tokens, logp_old, logp_student, remembered
from tests.methods.by_hand import FACTS
from tests.methods.test_scope import LOGITS_S, LOGITS_T, gv3, near, tokens_of

COLD = replace(FACTS, behavior=Behavior(temperature=0.6))


def bound(**keys: object) -> SCOPE:
    method = SCOPE(**keys)  # pyright: ignore[reportArgumentType]
    method.check(COLD)
    return method.bind(COLD)


def expected_gradient(method: SCOPE, term: str) -> Tensor:
    """Over what a sampler at temperature 0.6 draws, with respect to the raw logits."""
    logits_V = torch.tensor(LOGITS_S, dtype=torch.float64, requires_grad=True)
    ids_N, none_N = torch.arange(4), torch.zeros(4, dtype=torch.long)
    logq_V = torch.tensor(LOGITS_T, dtype=torch.float64)
    chunk = Chunk(ids_N, logits_V.expand(4, -1), logq_V.expand(4, -1))
    signals = Declared(chunk, method.needs().tokens, "needs().tokens")
    loss_N = method.losses(Tokens(ids_N, none_N, none_N, none_N, none_N, signals))[term]
    share_N = (logits_V.detach() / 0.6).softmax(0)
    return torch.autograd.grad((share_N * loss_N).sum(), logits_V)[0]


def test_gv5_as_the_signals_pass_has_it() -> None:
    """The logits are given as log-probs are: tempering undoes their normalisation."""
    near(expected_gradient(bound(), "wrong"), 0.41862699, -0.31355235, -0.07630997, -0.02876467)
    tempered = bound(logprob_temperature="rollout")
    near(expected_gradient(tempered, "wrong"), 0.69444549, -0.55059987, -0.11204291, -0.03180271)
    p_V = (torch.tensor(LOGITS_S, dtype=torch.float64) / 0.6).softmax(0)
    near(expected_gradient(tempered, "correct"), 0, 0, 0, 0)  # E[grad log p] is 0 where p is what was drawn from
    unit = expected_gradient(bound(correct_loss="nll"), "correct")
    near(unit, *(torch.tensor(LOGITS_S, dtype=torch.float64).softmax(0) - p_V).tolist())


def test_what_is_asked_for_is_at_one_temperature() -> None:
    tempered = bound(logprob_temperature="rollout")
    own = {str(s) for s in tempered.needs().tokens | tempered.needs().batch}
    assert own == {"logp_student(temperature=0.6)", "logp_old(temperature=0.6)", "logp_teacher"}
    assert tempered.conventions()["loss_temperature"] == "0.6"
    assert "loss_temperature" not in bound().conventions()
    assert bound(logprob_temperature="rollout").bind(COLD) == tempered
    assert SCOPE(logprob_temperature="rollout").bind(FACTS).needs() == SCOPE().needs()
    assert logp_student(1.0) == LOGP_STUDENT and str(logp_old(1.0)) == "logp_old"
    assert remembered(tempered.needs().tokens) == {logp_old(0.6): logp_student(0.6)}


def test_weights_follow_the_tempered_perplexity() -> None:
    """The same log-probs under the tempered name give the same weights; the untempered ones are not read."""
    batch = gv3()
    tempered: dict[Signal, Tensor] = {logp_student(0.6): batch[LOGP_STUDENT]}
    other = replace(batch, signals={s: v for s, v in batch.signals.items() if s != LOGP_STUDENT} | tempered)
    weights = bound(logprob_temperature="rollout").weights(other)
    for term, weight_BT in SCOPE().weights(batch).items():
        torch.testing.assert_close(weights[term], weight_BT, atol=0, rtol=0)


def test_each_paths_part_of_the_objective_is_reported() -> None:
    batch, mask_BT = gv3(), gv3().rollouts.mask_BT
    losses = SCOPE().losses(tokens_of(batch, batch[LOGP_STUDENT][mask_BT]))
    blank_BT = torch.full(mask_BT.shape, torch.nan, dtype=torch.float64)
    placed = {term: blank_BT.masked_scatter(mask_BT, loss_N) for term, loss_N in losses.items()}
    report = SCOPE().metrics(replace(batch, losses=placed), SCOPE().weights(batch))
    assert report["scope/correct_loss"] == pytest.approx(-1.311229666, abs=2e-9)
    assert report["scope/wrong_loss"] == pytest.approx(1.093007656, abs=2e-9)


def test_the_share_of_clipped_tokens_by_hand() -> None:
    """Of (rho, A) = (1.5, .4) (1.5, -.4) (.5, .4) (.5, -.4) (4, -.4) (4, .4) the clip 0.2 holds all but the first and
    the fourth; the dual clip at 3 holds the last. Two of the six are no wrong rollout's."""
    rho_N = torch.tensor([1.5, 1.5, 0.5, 0.5, 4, 4], dtype=torch.float64)
    gap_N = torch.tensor([0.4, -0.4, 0.4, -0.4, -0.4, 0.4], dtype=torch.float64)
    batch = gv3()
    logp_N, none_N = torch.full((6,), -1.0, dtype=torch.float64), torch.zeros(6, dtype=torch.long)
    signals = {**tokens_of(batch, logp_N).signals, logp_old(1.0): logp_N - rho_N.log()}
    signals = {s: v for s, v in signals.items() if s.name != "logp_teacher"} | {Signal("logp_teacher"): logp_N - gap_N}
    wrong_N = torch.tensor([True, True, True, True, False, False])
    tokens = Tokens(none_N, none_N, none_N, none_N, logp_N, signals, {"wrong": wrong_N})
    assert {k: int(v) for k, v in SCOPE(clip=0.2).tally(tokens).items()} == {"wrong": 4, "clipped": 2}
    every = replace(tokens, consulted={"wrong": torch.ones_like(wrong_N)})
    assert {k: int(v) for k, v in SCOPE(clip=0.2).tally(every).items()} == {"wrong": 6, "clipped": 4}
    assert SCOPE().tally(tokens) == {}
    later = {"wrong": torch.tensor(8), "clipped": torch.tensor(2)}
    assert SCOPE(clip=0.2).metrics(replace(batch, later=later), {})["scope/clipped_fraction"] == 0.25


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    changed = ("method=scope", "rollout.temperature=0.6", "method.logprob_temperature=rollout", "method.clip=0.001")
    yield run(tmp_path_factory.mktemp("runs"), *changed, "optim.updates_per_rollout=2", "steps=2", name="scope").folder


def test_a_tempered_run_with_two_updates(folder) -> None:
    seen = read.metrics(folder)
    clipped = seen[seen["name"] == "scope/clipped_fraction"]["value"]
    assert len(clipped) == 2 and 0 < clipped.min() <= clipped.max() <= 1
    assert read.status(folder)["tags"]["loss_temperature"] == "0.6"


def test_its_table_shows_the_most_surprising_rollouts(folder) -> None:
    rows = read_table(folder, "scope_extremes").to_pylist()
    for step in (1, 2):
        for path in ("correct", "wrong"):
            found = [row["perplexity"] for row in rows if (row["step"], row["path"]) == (step, path)]
            assert len(found) <= 4 and found == sorted(found, reverse=True)
    assert {row["reward"] for row in rows if row["path"] == "wrong"} == {0.0}
    assert all(row["weight"] > 0 and isinstance(row["text"], str) and row["text"] for row in rows)
