"""What a rollout engine is: anything that turns prompts and a `Behavior` into `Rollouts`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from opd_lab.models import LM
from opd_lab.types import Behavior, Rollouts


class Engine(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def max_tokens(self) -> int:
        """The response limit."""
        ...

    def sample(
        self,
        student: LM,
        prompts: list[list[int]],
        *,
        behavior: Behavior,
        group_B: Tensor,
        uid_B: Tensor,
        generator: torch.Generator,
    ) -> Rollouts:
        """One rollout per prompt, in the order given, not graded."""
        ...
