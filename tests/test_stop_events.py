"""Models that end a response at different ids: one event for both, or tokens of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lab_run import settings

from opd_lab import divergence as d
from opd_lab.chunk import Head
from opd_lab.doctor import first_step
from opd_lab.methods.blends import nearest_in_ball
from opd_lab.models import LM, load, save, wrap
from opd_lab.pairing import match
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.run import load_parts
from opd_lab.settings import ModelSettings
from opd_lab.types import Behavior
from tests.pair import near
from tests.tiny import make, tokenizer

Z_P, Z_Q = (torch.tensor([z], dtype=torch.float64) for z in ((1.0, 0, 0.5, -2), (0.5, 0.5, -3, 1)))


def ending(*ids: int, seed: int = 0, name: str = "teacher") -> LM:
    """Ends at these ids; the tokenizer's own end is id 1."""
    return replace(make(seed=seed), name=name, stop_ids=frozenset(ids))


def head(*one_event: int) -> Head:
    return Head(torch.eye(4, dtype=torch.float64), one_event=one_event)


def test_one_event_by_hand() -> None:
    """Ids a, b, the student's end, the teacher's end."""
    logp_1V, logq_1V = (head(2, 3).logits(z_1V).log_softmax(-1) for z_1V in (Z_P, Z_Q))
    near(logp_1V.exp()[0], 0.49402302, 0.18174091, 0.32423607, 0)
    near(logq_1V.exp()[0], 0.27181900, 0.27181900, 0.45636199, 0)
    near(d.reverse_kl(logp_1V, logq_1V), 0.111162759)
    near(d.forward_kl(logp_1V, logq_1V), d.forward_kl(logp_1V[:, :3], logq_1V[:, :3]).item())
    logmu_1V, columns = nearest_in_ball(logp_1V, logq_1V, 0.02, 60)
    near(columns["beta"], 0.420578692)
    near(logmu_1V.exp()[0], 0.39455792, 0.22104021, 0.38440186, 0)
    apart = [head().logits(z_1V).log_softmax(-1) for z_1V in (Z_P, Z_Q)]
    near(d.reverse_kl(apart[0], apart[1]), 1.228539263)


def test_its_gradient_is_shared_by_mass() -> None:
    """The ends get the event's gradient by e^.5 : e^-2 = .924142 : .075858."""
    z_1V = Z_P.clone().requires_grad_()
    logq_1V = head(2, 3).logits(Z_Q).log_softmax(-1)
    d.reverse_kl(head(2, 3).logits(z_1V).log_softmax(-1), logq_1V).sum().backward()
    p_V, r_V = (torch.tensor(x, dtype=torch.float64) for x in ((0.49402302, 0.18174091, 0.32423607), (0.0,) * 3))
    q_V = torch.tensor((0.27181900, 0.27181900, 0.45636199), dtype=torch.float64)
    r_V = p_V * ((p_V / q_V).log() - 0.111162759)  # the gradient of the three events' KL
    assert z_1V.grad is not None
    near(z_1V.grad[0], float(r_V[0]), float(r_V[1]), float(r_V[2]) * 0.924142, float(r_V[2]) * 0.075858)


def test_unlike_ends_become_the_students() -> None:
    student, teacher, notes = match(ending(1, name="student"), ending(4), None, "merged")
    assert student.stop_ids == teacher.stop_ids == {1}
    assert student.one_end == teacher.one_end == student.head.one_event == (1, 4)
    assert notes == [
        "student and teacher end a response at different ids (1 = <eos> and 4 = b): model.stop_event=merged"
    ]
    _, reference, _ = match(student, ending(1), None, "merged")
    assert (reference.stop_ids, reference.one_end) == ({1}, (1, 4)), "the reference speaks of the same event"
    several, _, _ = match(ending(5, 1, name="student"), ending(4, 5), None, "merged")
    assert several.one_end == (1, 4, 5), "the tokenizer's end goes first"
    assert match(ending(5, 3, name="student"), ending(4), None, "merged")[0].one_end == (3, 4, 5)


def test_ends_that_agree_or_are_given_or_separate_are_left_alone() -> None:
    for student, teacher in (
        match(ending(1, 4), ending(4, 1), None, "merged")[:2],
        match(ending(1), ending(4), None, "separate")[:2],
        match(ending(1), ending(5), [4, 1], "merged")[:2],
    ):
        assert student.stop_ids == teacher.stop_ids == {1, 4}
        assert student.one_end == teacher.one_end == ()
    student, _, _ = match(ending(1), ending(4), None, "separate")
    assert match(student, ending(1), None, "separate")[1].stop_ids == {1, 4}


def test_what_cannot_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must end a response at some id, got .*'teacher': 'none'.*model.stop_ids"):
        match(ending(1, name="student"), ending(), None, "merged")
    with pytest.raises(ValueError, match=r"model.stop_event must be one of merged, separate, got both"):
        match(ending(1), ending(4), None, "both")
    for bad in ([], [24], [-1]):
        with pytest.raises(ValueError, match=r"model.stop_ids must name ids below 24"):
            match(ending(1), ending(4), bad, "merged")


def test_a_rollout_ends_with_the_students_end_and_the_mass_of_both() -> None:
    student, teacher, _ = match(ending(1, name="student"), ending(4, seed=1), None, "merged")
    rows_B, engine = torch.arange(64), TorchEngine(6, 64)
    blend = Behavior(mix=lambda logp_RV, logq_RV: nearest_in_ball(logp_RV, logq_RV, 0.05, 30))
    some = engine.sample(
        student,
        [[3, 5, 6]] * 64,
        behavior=blend,
        group_B=rows_B,
        uid_B=rows_B,
        generator=torch.Generator().manual_seed(0),
        teacher=teacher,
    )
    written = some.response_BT[some.mask_BT]
    assert 4 not in written and some.stopped_B.any()
    at_once = some.stopped_B & (some.length_B == 1)
    raw_V = student.module(input_ids=torch.tensor([[3, 5, 6]])).logits[0, -1].log_softmax(-1)
    both = float(raw_V[[1, 4]].logsumexp(0).detach())
    assert at_once.any() and float(some.logp_BT[at_once, 0][0]) == pytest.approx(both, abs=1e-5)
    deviation = some.extra["deviation"][some.mask_BT]
    assert float(deviation.max()) <= 0.05 + 1e-6 and not deviation.isnan().any()


def test_a_saved_student_stops_at_either(tmp_path: Path) -> None:
    student, _, _ = match(ending(1, name="student"), ending(4), None, "merged")
    save(student, tmp_path)
    again = load(ModelSettings(path=str(tmp_path), dtype="float32", trust_remote_code=False), device="cpu", name="s")
    assert again.stop_ids == {1, 4}


def test_ends_are_read_from_generation_config_and_tokenizer() -> None:
    other = make()
    assert other.module.generation_config is not None
    other.module.generation_config.eos_token_id = [4]
    assert wrap(other.module, tokenizer(), name="teacher", path="x").stop_ids == {1, 4}


@pytest.mark.parametrize("method", ["fixed_epsilon", "exopd_full", "jsd", "kat_lab"])
def test_methods_run_on_such_a_pair(tmp_path: Path, method: str) -> None:
    """The lab's teacher, told that it ends with another id as well; what is asked of the first step holds."""
    teacher = load(ModelSettings(path="lab:teacher", dtype="float32", trust_remote_code=False), device="cpu", name="t")
    assert teacher.module.generation_config is not None
    other = next(i for i in range(teacher.vocabulary) if i not in teacher.stop_ids and i != teacher.pad_id)
    teacher.module.generation_config.eos_token_id = [other]
    save(teacher, tmp_path / "teacher")
    asked = settings(tmp_path, f"method={method}", "steps=30", f"model.teacher.path={tmp_path / 'teacher'}")
    parts = load_parts(asked, lambda note: None)
    assert parts.student.one_end[1:] == (other,)
    assert parts.reference is None or parts.reference.one_end == parts.student.one_end
    assert "another teacher gives another gradient" in first_step(asked, parts, parts.method.init_state())
