"""What a method asks in `consult`: text of the teacher, where it declared that, and what the student's tokens say.

Questions are counted: the teacher's time is the price of a method that asks them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from opd_lab.chunk import UndeclaredSignalError
from opd_lab.methods.base import Continued, Writer
from opd_lab.types import Rollouts, Source


class Language(Protocol):
    """What the student's tokens read like."""

    def texts(self, rollouts: Rollouts) -> list[str]: ...

    def shortened(self, text: str, tokens: int) -> str: ...


class Asking:
    """The `Ask` of one step. `teacher` is None where the method declared no text."""

    def __init__(self, teacher: Writer | None, language: Language | None, where: str) -> None:
        self._teacher, self._language, self._where = teacher, language, where
        self.cost: dict[str, int] = {}
        self.shown: list[dict[str, Any]] = []

    def continue_(self, rollouts: Rollouts, cuts_B: Tensor, **how: Any) -> list[Continued]:
        if self._teacher is None:
            raise UndeclaredSignalError(f"text is not in needs() of {self._where}; add text=True there to ask for it")
        found = self._teacher.continue_(rollouts, cuts_B, **how)
        prompts = int(rollouts.attention_BL[:, : rollouts.prompt_columns].sum())
        for name, count in (
            ("teacher_queries_count", len(rollouts)),
            ("teacher_prefix_tokens", prompts + int(cuts_B.sum())),
            ("teacher_cached_tokens", sum(written.cached for written in found)),
            ("teacher_generated_tokens", sum(written.tokens for written in found)),
        ):
            self.cost[name] = self.cost.get(name, 0) + count
        return found

    def texts(self, rollouts: Rollouts, begin_B: Tensor, end_B: Tensor) -> list[str]:
        t_T = torch.arange(rollouts.source_BT.shape[1], device=begin_B.device)
        outside_BT = (t_T < begin_B[:, None]) | (t_T >= end_B[:, None])
        part = replace(
            rollouts,
            source_BT=rollouts.source_BT.masked_fill(outside_BT, int(Source.PADDING)),
            stopped_B=rollouts.stopped_B & (end_B == rollouts.length_B),
        )
        return self._students().texts(part)

    def shortened(self, text: str, tokens: int) -> str:
        return self._students().shortened(text, tokens)

    def show(self, **row: Any) -> None:
        self.shown.append(row)

    def _students(self) -> Language:
        assert self._language is not None, "models without a tokenizer have no text"
        return self._language
