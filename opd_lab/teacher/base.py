"""What a teacher is: it scores rollouts, and it may continue them in its own words.

`provides` says what it can do, so that what cannot work is refused before the first token:

    sampled   log-probs of the sampled tokens
    topk      log-probs of its likeliest tokens
    full      the whole next-token distribution
    hidden    its hidden states
    text      continuations
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from opd_lab.signals import TeacherView
from opd_lab.types import Rollouts


class Teacher(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def provides(self) -> frozenset[str]: ...

    def view(self, rollouts: Rollouts) -> TeacherView:
        """What it knows of the generated tokens, in row-major order of `mask_BT`, without gradient."""
        ...

    def continue_(self, rollouts: Rollouts, cuts_B: Tensor, *, samples: int, max_tokens: int) -> list[list[str]]:
        """`samples` texts per rollout, each continuing its response from before token `cuts_B[b]`."""
        ...
