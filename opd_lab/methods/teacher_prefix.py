"""Rollouts that the teacher begins, for fewer and fewer tokens, and the student ends: not a method, but a part of one.

    longest prefix of step t = L/2 (1 + cos(pi min(t / T, 1))) tokens, rounded down

With prefix_length cap the teacher writes so many tokens, or fewer where it stops; with uniform a number between 0 and
that. A rollout that the teacher ended has no token of the student.

Metrics, under the name of the method: prefix_max_tokens, teacher_token_fraction, full_teacher_rollout_fraction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from opd_lab.methods.base import Method, choice, within
from opd_lab.methods.coins import uniform
from opd_lab.types import Batch, Behavior, Facts, Source, State

DRAWS = {"per_rollout": "rollout", "per_prompt": "group"}


@dataclass(frozen=True, kw_only=True)
class TeacherPrefix(Method):
    """Plain on-policy distillation on rollouts that the teacher begins."""

    prefix_schedule: str = "cosine"
    prefix_steps: int
    prefix_max_tokens: int
    prefix_length: str = "cap"
    prefix_draw: str = "per_rollout"

    def __post_init__(self) -> None:
        choice("prefix_schedule", self.prefix_schedule, ("cosine", "none"))
        no_prefix = "for no prefix set method.prefix_schedule=none"
        within("prefix_steps", self.prefix_steps, ">= 1", self.prefix_steps >= 1, no_prefix)
        choice("prefix_length", self.prefix_length, ("cap", "uniform"))
        choice("prefix_draw", self.prefix_draw, tuple(DRAWS))

    def check(self, facts: Facts) -> None:
        allowed = f"in [0, rollout.max_tokens={facts.max_tokens}]"
        within("prefix_max_tokens", self.prefix_max_tokens, allowed, 0 <= self.prefix_max_tokens <= facts.max_tokens)

    @property
    def first_prefix(self) -> int:
        """The longest prefix of the first step, tokens."""
        return self.prefix_max_tokens if self.prefix_schedule == "cosine" else 0

    def longest_prefix(self, step: int) -> float:
        """Tokens, not rounded."""
        return self.first_prefix / 2 * (1 + math.cos(math.pi * min(step / self.prefix_steps, 1)))

    def asks(self) -> Mapping[str, str]:
        return {"teacher_tokens": "method.prefix_schedule=none"} if self.first_prefix > 0 else {}

    def behavior(self, plain: Behavior, step: int, state: State) -> Behavior:
        longest = math.floor(self.longest_prefix(step))
        if longest < 1:
            return plain
        draws = DRAWS[self.prefix_draw]

        def any_up_to_longest(seed: int, uid_B: Tensor, group_B: Tensor) -> Tensor:
            owner_B = uid_B if draws == "rollout" else group_B
            return ((longest + 1) * uniform(seed, step, owner_B, 0, 1)).long()

        first = longest if self.prefix_length == "cap" else any_up_to_longest
        return replace(plain, teacher_first=first, teacher_draws=draws)

    def prefix_metrics(self, batch: Batch) -> dict[str, float]:
        own_BT, taught_BT = students(batch), teachers(batch)
        written_B = own_BT.any(1) | taught_BT.any(1)
        return {
            "prefix_max_tokens": math.floor(
                self.longest_prefix(batch.step - 1)
            ),  # the report of step k is numbered k + 1
            "teacher_token_fraction": float(taught_BT.sum() / (own_BT.sum() + taught_BT.sum())),
            "full_teacher_rollout_fraction": float((written_B & ~own_BT.any(1)).sum() / written_B.sum()),
        }


def teachers(batch: Batch) -> Tensor:
    """The tokens that the teacher wrote."""
    return batch.rollouts.source_BT == Source.TEACHER


def students(batch: Batch) -> Tensor:
    """All other generated tokens."""
    return batch.rollouts.mask_BT & ~teachers(batch)
