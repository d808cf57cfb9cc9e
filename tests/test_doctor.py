"""What is checked before any budget is spent: each check fails on a run that is wrong in just that way."""

from dataclasses import dataclass, replace

import pytest
import torch
from lab_run import command, settings
from torch import Tensor

from opd_lab.doctor import first_step
from opd_lab.methods.base import TRAINED
from opd_lab.methods.opd import OPD
from opd_lab.models import LM
from opd_lab.run import load_parts
from opd_lab.types import LOGP_STUDENT, REVERSE_KL, Batch, Needs, Tokens


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> tuple:
    chosen = settings(tmp_path_factory.mktemp("runs"))
    return chosen, load_parts(chosen, print)


def refused(lab, words: str, **changes) -> None:
    chosen, parts = lab
    with pytest.raises(ValueError, match=words):
        first_step(chosen, replace(parts, **changes), {})


def test_plain_opd_passes(lab):
    chosen, parts = lab
    seen = first_step(chosen, parts, {})
    assert any("teacher := student: objective 0.0e+00" in line for line in seen)
    assert any("another teacher gives another gradient" in line for line in seen)


@dataclass(frozen=True, kw_only=True)
class Deaf(OPD):
    """Asks the teacher and does not listen."""

    def needs(self) -> Needs:
        return Needs(tokens=frozenset({REVERSE_KL, LOGP_STUDENT}))

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        return {TRAINED: -tokens[LOGP_STUDENT]}


@dataclass(frozen=True, kw_only=True)
class Crowded(OPD):
    """Its loss depends on its neighbours in the micro-batch."""

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        return {TRAINED: tokens[REVERSE_KL] / tokens[REVERSE_KL].detach().sum()}


@dataclass(frozen=True, kw_only=True)
class Idle(OPD):
    def weights(self, batch: Batch) -> dict[str, Tensor]:
        return {TRAINED: torch.zeros_like(batch.rollouts.mask_BT, dtype=torch.float32)}


@dataclass(frozen=True, kw_only=True)
class Shifted(OPD):
    """Teaches something even where teacher and student are one."""

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        return {TRAINED: tokens[REVERSE_KL] - tokens[LOGP_STUDENT]}

    def needs(self) -> Needs:
        return Needs(tokens=frozenset({REVERSE_KL, LOGP_STUDENT}))


def test_a_teacher_that_never_reaches_the_loss(lab):
    refused(lab, "the teacher never reaches the loss", method=Deaf())


def test_a_loss_that_depends_on_the_micro_batch(lab):
    refused(lab, "micro-batches of 1 change the gradient", method=Crowded())


def test_nothing_to_learn(lab):
    refused(lab, "the gradient of the first rollouts is 0", method=Idle())


def test_a_twin_that_still_teaches(lab):
    refused(lab, "teacher := student must teach nothing", method=Shifted())


def test_a_teacher_that_is_the_student(lab):
    _, parts = lab
    own: LM = parts.student
    refused(
        lab,
        "nothing to learn from this teacher",
        teacher=replace(parts.teacher, lm=own),
    )


def test_a_grader_that_likes_everything(lab):
    _, parts = lab
    refused(
        lab, "accepts 100% of 16 true answers and 100% of wrong ones", data=replace(parts.data, grade=lambda r, a: 1.0)
    )


def test_decoding_that_disagrees_with_training(lab):
    _, parts = lab

    class Liar:
        name = "liar"

        def sample(self, *args, **kwargs):
            rollouts = parts.engine.sample(*args, **kwargs)
            return replace(rollouts, logp_BT=rollouts.logp_BT - 0.5)

    refused(lab, "decoding and training disagree", engine=Liar())


def test_the_command_prints_what_it_saw(tmp_path):
    done = command("doctor", "method=fire_full", "threads=1", "data.problems=50", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "everything works" in done.stdout
    assert "store: sqlite:///" in done.stdout
    done = command("doctor", "method=scope", "data.grader=none", cwd=tmp_path)
    assert done.returncode == 2
    assert "needs graded prompts" in done.stderr
