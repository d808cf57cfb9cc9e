"""Evaluation: pass@k by hand, and what it says of a student whose answers are known."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import pytest
import torch

from opd_lab.evaluate import Evaluation, evaluate, pass_at_k, pass_at_k_with_replacement
from opd_lab.models import LM
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.teacher.local import LocalTeacher
from opd_lab.types import Behavior
from tests.tiny import make


@dataclass(frozen=True)
class Problem:
    id: str
    ids: list[int]
    answer: str | None


PROBLEMS = [Problem("first", [3, 4], "a"), Problem("second", [5], "b"), Problem("third", [6, 7, 8], None)]


def run(student: LM, teacher: LocalTeacher | None = None, **changes: object) -> Evaluation:
    settings = {"samples": 4, "behavior": Behavior(), "seed": 0, "chunk": 16, "micro_batch": 5} | changes
    grade = settings.pop("grade", lambda text, answer: float(answer in text.split()))
    return evaluate(student, teacher, TorchEngine(6, 64), PROBLEMS, grade, **settings)  # pyright: ignore


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(32, 1, 32, 1.0), (32, 4, 8, 0.704505006), (32, 1, 8, 0.25), (4, 0, 4, 0.0), (4, 4, 1, 1.0), (4, 1, 1, 0.25)],
)
def test_pass_at_k_by_hand(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(32, 1, 32, 0.637944711), (32, 2, 32, 0.873211214), (32, 4, 8, 0.656391084), (32, 1, 8, 0.224300120)],
)
def test_pass_at_k_with_replacement_by_hand_and_never_above_the_unbiased(
    n: int, c: int, k: int, expected: float
) -> None:
    assert pass_at_k_with_replacement(n, c, k) == pytest.approx(expected, abs=1e-9)
    assert pass_at_k_with_replacement(n, c, k) < pass_at_k(n, c, k)
    assert pass_at_k_with_replacement(n, c, 1) == pytest.approx(pass_at_k(n, c, 1), abs=1e-12)


def test_pass_at_k_is_the_counting_formula_and_stays_stable_for_many_rollouts() -> None:
    for n in (1, 5, 16):
        for c in range(n + 1):
            for k in range(1, n + 1):
                assert pass_at_k(n, c, k) == pytest.approx(1 - comb(n - c, k) / comb(n, k), abs=1e-12)
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_pass_at_k_refuses_what_means_nothing(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass_at_k needs"):
        pass_at_k(n, c, k)


def test_scalars_by_hand() -> None:
    seen = Evaluation(["first", "second"], 4, [1, 2], 3.5, 0.25, 0.75, 0.125)
    assert seen.scalars("eval/test") == {
        "eval/test/length_mean_tokens": 3.5,
        "eval/test/truncated_fraction": 0.25,
        "eval/test/distinct_fraction": 0.75,
        "eval/test/avg_at_4": 0.375,
        "eval/test/pass_at_1": 0.375,
        "eval/test/pass_at_2": pytest.approx((1 / 2 + 5 / 6) / 2),
        "eval/test/pass_at_4": 1.0,
        "eval/test/reverse_kl_mean_nats": 0.125,
    }
    three = Evaluation(["first"], 3, [1], 3.5, 0.25, 0.75, None).scalars("eval/test")
    assert {name for name in three if "_at_" in name} == {
        "eval/test/avg_at_3",
        "eval/test/pass_at_1",
        "eval/test/pass_at_2",
    }


def test_a_student_that_always_says_the_same() -> None:
    """Id 3 is the word a, id 1 the end of text; all others are suppressed."""
    student = make("llama")
    seen = run(student, behavior=Behavior(suppressed=tuple(i for i in range(24) if i != 3)))
    assert (seen.ids, seen.n, seen.c) == (["first", "second"], 4, [4, 0])
    assert (seen.length_mean_tokens, seen.truncated_fraction, seen.distinct_fraction) == (6.0, 1.0, 0.25)
    assert seen.reverse_kl_mean_nats is None
    ended = run(student, behavior=Behavior(suppressed=tuple(i for i in range(24) if i != 1)))
    assert (ended.c, ended.length_mean_tokens, ended.truncated_fraction) == ([0, 0], 1.0, 0.0)


def test_without_a_grader_there_is_no_accuracy() -> None:
    seen = run(make(), grade=None)
    assert (seen.ids, seen.c) == ([], [])
    assert not any("_at_" in name for name in seen.scalars("eval/test"))


def test_the_reverse_kl_is_exact_and_no_matter_of_batches() -> None:
    student, teacher = make(seed=0), make(seed=1)
    seen = run(student, LocalTeacher(teacher)).reverse_kl_mean_nats
    assert seen is not None
    problem_B = torch.arange(3).repeat_interleave(4)
    rollouts = TorchEngine(6, 64).sample(
        student,
        [PROBLEMS[i].ids for i in problem_B.tolist()],
        behavior=Behavior(),
        group_B=problem_B,
        uid_B=problem_B,
        generator=torch.Generator().manual_seed(0),
    )
    kl = []
    with torch.no_grad():
        for ids_L, real_L, on_T in zip(rollouts.ids_BL, rollouts.attention_BL, rollouts.mask_BT):
            ids_1L = ids_L[real_L][None]
            logp, logq = (m.module(input_ids=ids_1L).logits[0].double().log_softmax(-1) for m in (student, teacher))
            kl.append((logp.exp() * (logp - logq)).sum(-1)[-1 - int(on_T.sum()) : -1])
    assert seen == pytest.approx(float(torch.cat(kl).mean()), abs=1e-5)
    for chunk, micro_batch in ((1, 1), (64, 64)):
        other = run(student, LocalTeacher(teacher), chunk=chunk, micro_batch=micro_batch)
        assert other.reverse_kl_mean_nats == pytest.approx(seen, abs=1e-6)
    assert run(student, LocalTeacher(student)).reverse_kl_mean_nats == pytest.approx(0.0, abs=1e-6)


def test_a_teacher_of_text_alone_is_not_asked_for_a_divergence() -> None:
    teacher = LocalTeacher(make(seed=1), provides=frozenset({"text"}))
    assert run(make(), teacher).reverse_kl_mean_nats is None


def test_training_randomness_and_mode_are_untouched_and_the_seed_is_everything() -> None:
    student, teacher = make(seed=0), LocalTeacher(make(seed=1))
    student.module.train()
    before = torch.get_rng_state()
    seen = run(student, teacher)
    assert torch.equal(torch.get_rng_state(), before)
    assert student.module.training
    assert run(student, teacher) == seen
    assert run(student, teacher, seed=1) != seen
