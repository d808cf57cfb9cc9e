"""A teacher in this process: it can say everything. Scores are hidden states and a head, never logits of a sequence."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_lab.chunk import States, layers_of
from opd_lab.methods.base import Continued
from opd_lab.models import LM, evaluating
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.types import Behavior, Rollouts, Signal


@dataclass(slots=True)
class LocalTeacher:
    lm: LM
    decode_rows: int = 64  # continuations decoded together
    name: str = "local"
    provides: frozenset[str] = frozenset({"sampled", "topk", "full", "hidden", "text"})

    @property
    def shape(self) -> tuple[int, int] | None:
        return self.lm.shape

    def digest(self) -> str:
        return self.lm.digest()

    def view(self, rollouts: Rollouts, signals: frozenset[Signal] = frozenset()) -> States:
        """The states that predict the generated tokens, in row-major order of `mask_BT`, without gradient."""
        with torch.no_grad(), evaluating(self.lm.module):
            return self.lm.states(rollouts, layers_of("teacher", signals))

    def continue_(
        self,
        rollouts: Rollouts,
        cuts_B: Tensor,
        *,
        samples: int,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: tuple[int, ...],
    ) -> list[Continued]:
        """All prefixes decoded together; what several begin with is read once for those decoded at a time. What a
        rollout draws depends neither on its neighbours nor on what was asked before."""
        prefixes = _prefixes(rollouts, cuts_B)
        generators = [_generator(*seed, *pair) for pair in zip(rollouts.uid_B.tolist(), cuts_B.tolist(), strict=True)]
        uniform_BT = torch.cat(
            [torch.rand((samples, max_tokens), generator=g, dtype=torch.float64) for g in generators]
        )
        engine = TorchEngine(max_tokens=max_tokens, decode_rows=self.decode_rows)
        answers = engine.decode(
            self.lm,
            [prefix for prefix in prefixes for _ in range(samples)],
            behavior=Behavior(temperature, top_p),
            group_B=rollouts.group_B.repeat_interleave(samples),
            uid_B=rollouts.uid_B.repeat_interleave(samples),
            uniform_BT=uniform_BT,
        )
        texts = self.lm.texts(answers)
        tokens_CN, shared_CN = (x_B.reshape(-1, samples) for x_B in (answers.length_B, answers.extra["shared"]))
        counts = zip(tokens_CN.sum(1).tolist(), shared_CN.amin(1).tolist(), strict=True)
        return [Continued(texts[c * samples : (c + 1) * samples], *count) for c, count in enumerate(counts)]


def _prefixes(rollouts: Rollouts, cuts_B: Tensor) -> list[list[int]]:
    """Prompt and the response before the cut, as ids without padding."""
    ends = (rollouts.prompt_columns + cuts_B).tolist()
    rows = zip(rollouts.ids_BL, rollouts.attention_BL, ends, strict=True)
    return [ids_L[:end][real_L[:end]].tolist() for ids_L, real_L, end in rows]


def _generator(*owner: int) -> torch.Generator:
    digest = hashlib.sha256(f"continue {' '.join(map(str, owner))}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
