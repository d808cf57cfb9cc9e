"""What is checked before any budget is spent: at the first step of every run, and by `opd-lab doctor`.

Each check raises ValueError with what is wrong and what to do, or returns what it saw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from opd_lab.chunk import States, TeacherView, measure, of_the_student, reads, teacher_must
from opd_lab.data.grading import rates
from opd_lab.methods.base import Continued
from opd_lab.parts import Parts
from opd_lab.settings import RunSettings
from opd_lab.step import Gradient, Scorer, StatesOf, accumulate_gradient, whole_batch
from opd_lab.types import CAPABILITIES, LOGP_STUDENT, Behavior, Facts, Rollouts, Signal, State

ROWS = 8  # rollouts sampled for the checks
KNOWN = 16  # known answers shown to the grader
WARNING = "warning: "
NOTHING = 1e-6  # a gradient's norm below which there is only rounding
SAME, SAME_HALF = 1e-3, 0.05  # relative difference of gradients that counts as none, in fp32 and in half precision


def compatible(facts: Facts, parts: Parts) -> None:
    """The method, bound to these facts, can work with this rollout engine and this teacher."""
    for capability, otherwise in parts.method.asks().items():
        remedy = f", or {otherwise}" if otherwise else ""
        if capability not in parts.engine.supports:
            raise ValueError(f"rollout={facts.engine} cannot {CAPABILITIES[capability]}; use rollout=torch{remedy}")
        if capability == "dataset":
            if parts.data.solution is None:
                raise ValueError(
                    f"{type(parts.method).__name__} trains on the data's own solutions, data={facts.data} has none; "
                    f"name the field that holds them in data.solution_field{remedy}"
                )
        elif parts.teacher.lm is None:
            raise ValueError(
                f"teacher={facts.teacher} scores finished text and cannot help to {CAPABILITIES[capability]}; "
                f"use teacher=local{remedy}"
            )
    needs = parts.method.needs()
    if needs.text and "text" not in parts.teacher.provides:
        raise ValueError(
            f"method {type(parts.method).__module__.rpartition('.')[2]} asks the teacher for text, "
            f"teacher={facts.teacher} can only score; use teacher=local or teacher=server"
        )
    if lacking := teacher_must(needs.all) - parts.teacher.provides:
        wanted = ", ".join(sorted(str(s) for s in needs.all if teacher_must(frozenset({s})) & lacking))
        raise ValueError(
            f"{type(parts.method).__name__} needs {wanted} of the teacher, teacher={facts.teacher} can only give "
            f"{', '.join(sorted(parts.teacher.provides))}; use teacher=local"
        )
    if parts.reference is None and "reference" in reads(needs.all):
        raise ValueError(
            f"{type(parts.method).__name__} needs the reference model, the frozen initial student; got none"
        )


class Twin:
    """A teacher that is the student."""

    name = "twin"

    def __init__(self, states: StatesOf, like: Scorer) -> None:
        self._states, self.provides, self.continue_ = states, like.provides, like.continue_

    def view(self, rollouts: Rollouts, signals: frozenset[Signal]) -> TeacherView:
        with torch.no_grad():
            return self._states(rollouts, of_the_student(signals))


class Other:
    """A teacher that is none of them: the real one with its vocabulary, widths and scores moved by one, and every text
    read backwards."""

    name = "other"

    def __init__(self, like: Scorer) -> None:
        self._like, self.provides = like, like.provides

    def continue_(self, rollouts: Rollouts, cuts_B: torch.Tensor, **how: Any) -> list[Continued]:
        found = self._like.continue_(rollouts, cuts_B, **how)
        return [written._replace(texts=[text[::-1] for text in written.texts]) for written in found]

    def view(self, rollouts: Rollouts, signals: frozenset[Signal]) -> TeacherView:
        seen = self._like.view(rollouts, signals)
        if not isinstance(seen, States):
            return {signal: value_N.roll(1, 0) for signal, value_N in seen.items()}
        bias_V = None if seen.head.bias_V is None else seen.head.bias_V.detach().roll(1, 0)
        head = replace(seen.head, weight_VH=seen.head.weight_VH.detach().roll(1, 0), bias_V=bias_V)
        layers = {signal: layers_NDH.roll(1, -1) for signal, layers_NDH in seen.layers.items()}
        return States(seen.hidden_NH, head, layers)


def probe(settings: RunSettings, parts: Parts) -> Rollouts:
    """A few rollouts of the student, from a generator of their own; graded alternately right and wrong."""
    examples = parts.data.train[: ROWS // 2]
    rows = torch.arange(2 * len(examples))
    rollouts = parts.engine.sample(
        parts.student,
        [e.ids for e in examples for _ in range(2)],
        behavior=Behavior(),
        group_B=rows // 2,
        uid_B=rows,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    return replace(rollouts, reward_B=(rows % 2).to(rollouts.reward_B))


def gradient_of(
    parts: Parts, rollouts: Rollouts, teacher: Scorer, state: State, micro_batch: int, chunk: int
) -> tuple[Gradient, torch.Tensor]:
    """The step's gradient as one flat vector; the student is left without any."""
    method, student = parts.method, parts.student
    batch, views = whole_batch(
        method,
        rollouts,
        parts.models._replace(teacher=teacher),
        state=state,
        step=0,
        seed=0,
        micro_batch=micro_batch,
        chunk=chunk,
    )
    student.module.requires_grad_(True)
    student.module.zero_grad(set_to_none=True)
    found = accumulate_gradient(
        method, batch, method.weights(batch), parts.models.student, views, micro_batch=micro_batch, chunk=chunk
    )
    flat = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in student.module.parameters()]
    )
    student.module.zero_grad(set_to_none=True)
    return found, flat


def first_step(settings: RunSettings, parts: Parts, state: State) -> list[str]:
    """The checks on real rollouts, in the order in which a failure is easiest to understand. `state` is what the
    method remembers before its first step. Lines that begin with WARNING concern everyone.

    Raises:
        ValueError: the run would spend its budget on a wrong objective.
    """
    seen = [_prompt(parts), *_solution(settings, parts), _grader(parts)]
    rollouts = probe(settings, parts)
    if not bool(rollouts.mask_BT.any()):
        raise ValueError(
            "the student wrote no token on any of the first prompts; look at its chat template and stop ids"
        )
    seen.append(_decoding(rollouts, parts, settings.optim.chunk_tokens))
    chunk = settings.optim.chunk_tokens

    def gradient(teacher: Scorer, micro_batch: int = len(rollouts)) -> tuple[Gradient, torch.Tensor]:
        return gradient_of(parts, rollouts, teacher, state, micro_batch, chunk)

    found, whole = gradient(parts.teacher)
    if not math.isfinite(found.objective) or not bool(whole.isfinite().all()):
        raise ValueError(
            f"the objective of the first rollouts is {found.objective}, its gradient not finite everywhere"
        )
    if float(whole.norm()) < NOTHING:
        raise ValueError("the gradient of the first rollouts is 0: this student has nothing to learn from this teacher")
    seen.append(f"gradient finite, norm {float(whole.norm()):.3g}")
    seen += [f"{WARNING}{note}" for note in parts.method.notes(found.tallies)]
    _, split = gradient(parts.teacher, 1)
    difference = float((split - whole).norm() / whole.norm())
    if difference > (SAME if whole.dtype == torch.float32 else SAME_HALF):
        raise ValueError(
            f"micro-batches of 1 change the gradient by {difference:.2g} of its norm; the method is at fault"
        )
    seen.append(f"micro-batch 1 against all: gradient differs by {difference:.1e} of its norm")
    needs = parts.method.needs()
    if teacher_must(needs.all) or needs.text:
        seen += _teacher_counts(parts, gradient, whole)
    return seen


def _prompt(parts: Parts) -> str:
    example = parts.data.train[0]
    return (
        f"first prompt: {len(example.ids)} ids {example.ids[:12]}... = {parts.student.tokenizer.decode(example.ids)!r}"
    )


def _solution(settings: RunSettings, parts: Parts) -> list[str]:
    if "dataset" not in parts.method.asks():
        return []
    (ids,) = parts.solutions(parts.data.train[:1])
    cut = f", cut to rollout.max_tokens={n}" if len(ids) > (n := settings.rollout.max_tokens) else ""
    seen = [f"its solution: {len(ids)} ids{cut}, {ids[:12]}... = {parts.student.tokenizer.decode(ids)!r}"]
    if (each := settings.rollout.per_prompt) > 1:
        seen.append(
            f"{WARNING}rollout.per_prompt={each} shows each solution of the data {each} times in a step; with 1, and "
            f"rollout.prompts={each * settings.rollout.prompts}, a step has as many rollouts of more problems"
        )
    return seen


def _grader(parts: Parts) -> str:
    if parts.data.grade is None:
        return "no grader: accuracy will not be known"
    known = [e for e in parts.data.validation or parts.data.train if e.answer is not None][:KNOWN]
    true, wrong = rates(parts.data.grade, known)
    if true < 0.8 or wrong > 0.1:
        raise ValueError(
            f"the grader of data={parts.data.name} accepts {true:.0%} of {len(known)} true answers and {wrong:.0%} of "
            "wrong ones; look at data.grader and data.answer_pattern"
        )
    return f"grader: accepts {true:.0%} of {len(known)} true answers, {wrong:.0%} of wrong ones"


def _decoding(rollouts: Rollouts, parts: Parts, chunk: int) -> str:
    mask_BT = rollouts.mask_BT
    with torch.no_grad():
        states = parts.student.states(rollouts)
    again_N = measure(frozenset({LOGP_STUDENT}), rollouts.response_BT[mask_BT], states, None, chunk=chunk)[LOGP_STUDENT]
    worst = float((again_N - rollouts.logp_BT[mask_BT]).abs().max())
    limit = 1e-3 if states.hidden_NH.dtype == torch.float32 else 0.5
    if not worst < limit:
        raise ValueError(f"decoding and training disagree on log-probs by up to {worst:.2g} nats (allowed {limit:g})")
    return f"decoding = teacher-forced pass: log-probs differ by at most {worst:.1e} nats"


def _teacher_counts(
    parts: Parts, gradient: Callable[[Scorer], tuple[Gradient, torch.Tensor]], whole: torch.Tensor
) -> list[str]:
    seen = []
    _, other = gradient(Other(parts.teacher))
    if torch.equal(other, whole):
        raise ValueError("another teacher gives the very same gradient: the teacher never reaches the loss")
    seen.append("another teacher gives another gradient")
    if parts.method.not_zero_at_teacher is None:
        found, zero = gradient(Twin(parts.models.student, parts.teacher))
        ratio = float(zero.norm() / whole.norm())
        if abs(found.objective) > 1e-4 or ratio > 1e-3:
            raise ValueError(
                f"teacher := student must teach nothing, but the objective is {found.objective:.3g} and the gradient "
                f"{ratio:.2g} of the real one"
            )
        seen.append(f"teacher := student: objective {found.objective:.1e}, gradient {ratio:.1e} of the real one")
    else:
        seen.append(f"teacher := student not asked: {parts.method.not_zero_at_teacher}")
    return seen
