"""What a run is made of, and what a method may know of it before the first token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from opd_lab.chunk import layers_of
from opd_lab.data.prompts import Dataset, Example
from opd_lab.methods.base import Method
from opd_lab.models import LM
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.settings import RunSettings
from opd_lab.step import Models, Scorer, StatesOf
from opd_lab.types import Behavior, Facts


class Teacher(Scorer, Protocol):
    """A teacher, as a run sees it."""

    @property
    def lm(self) -> LM | None:
        """The model itself, where it is in this process."""
        ...

    @property
    def shape(self) -> tuple[int, int] | None:
        """Depth and width; None = it gives no hidden states."""
        ...

    def digest(self) -> str:
        """Of what decides its answers."""
        ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What a run is made of."""

    student: LM
    teacher: Teacher
    engine: TorchEngine
    data: Dataset
    method: Method
    reference: LM | None = None  # the frozen initial student, where the method asks for one
    measure: Scorer | None = None  # a teacher of evaluations only

    def solutions(self, examples: Sequence[Example]) -> list[list[int]]:
        """The data's own solutions as whole responses."""
        assert self.data.solution is not None, "data without solutions are refused before"
        return [self.student.response(self.data.solution(example)) for example in examples]

    @property
    def measuring(self) -> Scorer | None:
        """Whose full distributions evaluations compare with, if anybody gives them."""
        return self.teacher if "full" in self.teacher.provides else self.measure

    @property
    def models(self) -> Models:
        reference = _states_of(self.reference) if self.reference else None
        return Models(_states_of(self.student), self.teacher, reference, self.student)


def _states_of(lm: LM) -> StatesOf:
    return lambda rollouts, signals: lm.states(rollouts, layers_of("student", signals))


def tokenizer_digest(lm: LM) -> str:
    """What lists of token ids belong to: a digest of id -> string."""
    ids = sorted(lm.tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def plain_behavior(settings: RunSettings) -> Behavior:
    r = settings.rollout
    return Behavior(r.temperature, r.top_p, r.top_k, tuple(r.suppressed))


def facts_of(settings: RunSettings, parts: Parts) -> Facts:
    return Facts(
        steps=settings.steps,
        behavior=plain_behavior(settings),
        max_tokens=settings.rollout.max_tokens,
        per_prompt=settings.rollout.per_prompt,
        updates_per_rollout=settings.optim.updates_per_rollout,
        vocabulary=parts.student.vocabulary,
        graded=parts.data.grade is not None,
        tokenizer=tokenizer_digest(parts.student),
        data=settings.data.name,
        teacher=parts.teacher.name,
        engine=parts.engine.name,
        student_shape=parts.student.shape,
        teacher_shape=parts.teacher.shape,
        reference=settings.model.reference.path if settings.model.reference else None,
    )
