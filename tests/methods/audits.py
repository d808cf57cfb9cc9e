"""A step whose every number is given: logits of student and reference, and what the teacher's texts are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opd_lab.chunk import Head, States
from opd_lab.methods.base import Continued, Method
from opd_lab.step import Gradient, Models, accumulate_gradient, whole_batch
from opd_lab.types import Batch, Rollouts, Signal, Source

CHUNK = "aaaaaaaaaa"  # what every chunk reads like
LETTERS = "abcdefgh"


def worth(*phi: float) -> list[str]:
    """Texts of these similarities to a chunk, in tenths."""
    return [CHUNK[: round(10 * one)] + "z" * round(10 - 10 * one) for one in phi]


@dataclass
class Teacher:
    """Can write and nothing else. `texts` says what, by (row of the step, cut)."""

    texts: dict[tuple[int, int], list[str]]
    otherwise: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    name: str = "fake"
    provides: frozenset[str] = frozenset({"text"})

    def view(self, rollouts: Rollouts, signals: frozenset[Signal]) -> States:
        raise AssertionError("a teacher that only writes was asked for scores")

    def continue_(self, rollouts: Rollouts, cuts_B: Tensor, **how: Any) -> list[Continued]:
        uids, cuts = rollouts.uid_B.tolist(), cuts_B.tolist()
        ends = [rollouts.prompt_columns + cut for cut in cuts]
        prefixes = [
            ids_L[:end][real_L[:end]].tolist() for ids_L, real_L, end in zip(*_rows(rollouts), ends, strict=True)
        ]
        self.asked.append({"uid": uids, "cut": cuts, "prefix": prefixes, **how})
        answers = [self.texts.get(owner, self.otherwise) for owner in zip(uids, cuts)]
        return [Continued(texts, 7 * len(texts)) for texts in answers]


def _rows(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    return rollouts.ids_BL, rollouts.attention_BL


class Same:
    """Every chunk reads alike."""

    def texts(self, rollouts: Rollouts) -> list[str]:
        return [f"  {CHUNK}\n"] * len(rollouts)

    def shortened(self, text: str, tokens: int) -> str:
        return text[:tokens]


class Letters(Same):
    """Every token is a letter."""

    def texts(self, rollouts: Rollouts) -> list[str]:
        there_BT = rollouts.source_BT != Source.PADDING
        return ["".join(LETTERS[i] for i in row[there].tolist()) for row, there in zip(rollouts.response_BT, there_BT)]


@dataclass
class Step:
    """Rollouts of given tokens under given logits [B, T, V], all in float64, each after the prompt 90, 91."""

    method: Method
    logits_BTV: Tensor
    reference_BTV: Tensor
    responses: Sequence[Sequence[int]]
    teacher: Teacher
    seed: int = 0
    step: int = 0
    language: Same = field(default_factory=Same)

    @property
    def rollouts(self) -> Rollouts:
        width = self.logits_BTV.shape[1]
        ids_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in self.responses])
        mask_BT = torch.arange(width) < torch.tensor([len(row) for row in self.responses])[:, None]
        logp_BTV = self.logits_BTV.detach().log_softmax(-1)
        logp_BT = logp_BTV.gather(2, ids_BT[..., None])[..., 0].masked_fill(~mask_BT, math.nan)
        entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1).masked_fill(~mask_BT, math.nan)
        b = len(ids_BT)
        return Rollouts(
            ids_BL=torch.cat([torch.tensor([[90, 91]]).expand(b, 2), ids_BT], 1),
            attention_BL=torch.cat([torch.ones(b, 2, dtype=torch.bool), mask_BT], 1),
            source_BT=torch.where(mask_BT, int(Source.STUDENT), int(Source.PADDING)).to(torch.int8),
            behavior_logp_BT=logp_BT, logp_BT=logp_BT, entropy_BT=entropy_BT,
            stopped_B=torch.ones(b, dtype=torch.bool),
            uid_B=torch.arange(b), group_B=torch.arange(b), reward_B=torch.full((b,), math.nan),
        )  # fmt: skip

    def models(self, leaf_BTV: Tensor) -> Models:
        def states(logits_BTV: Tensor):
            head = Head(torch.eye(logits_BTV.shape[2], dtype=torch.float64))
            return lambda some, signals: States(logits_BTV[some.uid_B][some.mask_BT], head)

        return Models(states(leaf_BTV), self.teacher, states(self.reference_BTV), self.language)

    def batch(self) -> Batch:
        return self._whole(self.models(self.logits_BTV))[0]

    def _whole(self, models: Models) -> tuple[Batch, Any]:
        return whole_batch(
            self.method, self.rollouts, models, state={}, step=self.step, seed=self.seed, micro_batch=8, chunk=3
        )

    def run(self) -> tuple[Gradient, Tensor, Batch]:
        """What the trainer would compute, and the gradient with respect to the student's logits."""
        leaf_BTV = self.logits_BTV.clone().requires_grad_()
        models = self.models(leaf_BTV)
        batch, views = self._whole(models)
        weights = self.method.weights(batch)
        found = accumulate_gradient(self.method, batch, weights, models.student, views, micro_batch=8, chunk=3)
        return found, torch.zeros_like(leaf_BTV) if leaf_BTV.grad is None else leaf_BTV.grad, batch


def waves(shape: tuple[int, int, int], function: Any, start: float, b: float, t: float, v: float) -> Tensor:
    """1.5 function(start + b.. + t.. + v..)"""
    b_B11, t_1T1, v_11V = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    return 1.5 * function(start + b * b_B11 + t * t_1T1 + v * v_11V)
