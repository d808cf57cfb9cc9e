"""Matched cut, rollouts cut at random as short as KAT cut them: `method=matched_cut`.

Ours, the control for arXiv 2606.09471: `method=kat` both removes what follows a trap and shortens the rollouts. Here
the lengths are the same and the places are not, so what KAT gains over this run it owes to where it cut.

    kept = min(cut, T),  cut ~ uniform over `lengths`, a pure function of (seed, rollout)

`lengths` are a hundred quantiles of the tokens that the run in `run` kept of its rollouts, all of its steps; a rollout
that it left whole counts with its response limit. They are read when the run is composed, so that a run depends on
their values and not on that folder. Since T is another rollout's here, a little more is kept than there, or a little
less. Nothing is generated behind the cut.

Neutral: one length above the response limit.
Differs: the paper's own control, a random cut, is not matched in length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from opd_lab.methods.base import Method
from opd_lab.methods.coins import uniform
from opd_lab.types import ENDLESS, Behavior, Facts, State


@dataclass(frozen=True, kw_only=True)
class MatchedCut(Method):
    paper = "https://arxiv.org/abs/2606.09471"
    status = "control"
    neutral: ClassVar = {"lengths": (ENDLESS,)}

    run: str | None = None
    lengths: tuple[int, ...] = ()

    def check(self, facts: Facts) -> None:
        if not self.lengths:
            raise ValueError("method.run must be the folder of a run with method=kat or a variant of it, got none")

    def behavior(self, plain: Behavior, step: int, state: State) -> Behavior:
        return replace(plain, limit=self.draw)

    def draw(self, seed: int, uid_B: Tensor, group_B: Tensor) -> Tensor:
        """The cut of each rollout."""
        lengths_C = torch.tensor(self.lengths)
        return lengths_C[(uniform(seed, uid_B) * len(lengths_C)).long()]
