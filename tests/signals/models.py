"""A student and a teacher in miniature, with every property a head may have, and the plain formula of the pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.chunk import Chunk, Head, States
from opd_lab.signals import Recorded, objective
from opd_lab.types import (
    FORWARD_KL,
    LOGP_STUDENT,
    LOGP_TEACHER,
    REVERSE_KL,
    Signal,
    Source,
    Tokens,
    jsd,
    topk,
)

N, V, H = 11, 23, 4
Losses = Callable[[Tokens], dict[str, Tensor]]


@dataclass(frozen=True)
class Loss:
    losses: Losses
    declared: frozenset[Signal]


def one(loss: Callable[[Tokens], Tensor], *declared: Signal) -> Loss:
    return Loss(lambda tokens: {"opd": loss(tokens)}, frozenset(declared))


def on_support(support: str, direction: str, tail: str) -> Loss:
    signal = topk(5, support)
    return one(lambda tokens: d.topk_kl(tokens[signal], direction=direction, tail=tail), signal)


LOSSES = {
    "reverse": one(lambda tokens: tokens[REVERSE_KL], REVERSE_KL),
    "forward": one(lambda tokens: tokens[FORWARD_KL], FORWARD_KL),
    "jsd": one(lambda tokens: tokens[jsd(0.3)], jsd(0.3)),
    "k2": one(lambda tokens: d.k2(tokens[LOGP_STUDENT] - tokens[LOGP_TEACHER]), LOGP_STUDENT, LOGP_TEACHER),
    "constant cost": one(lambda tokens: d.score_function(tokens[LOGP_STUDENT], tokens.consulted["cost"]), LOGP_STUDENT),
    "two terms": Loss(
        lambda tokens: {"opd": tokens[REVERSE_KL], "sft": -tokens[LOGP_STUDENT]}, frozenset({REVERSE_KL, LOGP_STUDENT})
    ),
    **{
        f"topk {support} {direction} {tail}": on_support(support, direction, tail)
        for support in ("student", "teacher", "union", "intersection")
        for direction in ("reverse", "forward")
        for tail in d.TAILS
    },
}
# The cost is a constant, so finite differences of the value say nothing of the gradient.
SCORE = one(
    lambda tokens: d.score_function(tokens[LOGP_STUDENT], tokens[LOGP_STUDENT] - tokens[LOGP_TEACHER]),
    *(LOGP_STUDENT, LOGP_TEACHER),
)


@dataclass(frozen=True)
class Models:
    """N tokens under both models. `run` is the signals pass, `plain` the same objective with all logits at once."""

    student: States
    teacher: States
    tokens: Tokens
    weights: Mapping[str, Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        head = self.student.head
        return [self.student.hidden_NH, head.weight_VH] + ([] if head.bias_V is None else [head.bias_V])

    def with_leaves(self, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None = None) -> Models:
        head = replace(self.student.head, weight_VH=weight_VH, bias_V=bias_V)
        return replace(self, student=States(hidden_NH, head))

    @property
    def kept(self) -> dict[str, int]:
        return {term: int((weight_N != 0).sum()) for term, weight_N in self.weights.items()}

    def run(
        self, loss: Loss, *, chunk: int = 3, record: frozenset[Signal] = frozenset(), kept: dict[str, int] | None = None
    ) -> tuple[Tensor, Recorded]:
        return objective(
            loss.losses, self.tokens, loss.declared, self.weights, kept or self.kept, self.student, self.teacher,
            chunk=chunk, record=record,
        )  # fmt: skip

    def plain(self, loss: Loss) -> Tensor:
        head, teacher = self.student.head, self.teacher
        logits_NV = plain_logits(self.student.hidden_NH, head)
        seen = Chunk(self.tokens.ids_N, logits_NV, plain_logits(teacher.hidden_NH, teacher.head).detach())
        losses = loss.losses(replace(self.tokens, signals=seen))
        return torch.stack([(self.weights[t] * x_N).sum() / self.kept[t] for t, x_N in losses.items()]).sum()

    def gradients(self, value: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(value, self.leaves, materialize_grads=True))


def plain_logits(hidden_NH: Tensor, head: Head) -> Tensor:
    logits_NV = hidden_NH @ head.weight_VH.T
    if head.bias_V is not None:
        logits_NV = logits_NV + head.bias_V
    logits_NV = logits_NV * head.scale
    return logits_NV if head.softcap is None else head.softcap * torch.tanh(logits_NV / head.softcap)


def models(
    n: int = N,
    v: int = V,
    *,
    bias: bool = True,
    scale: float = 0.7,
    softcap: float | None = 5.0,
    untrained: bool = True,
) -> Models:
    """Float64. Every third token carries weight 0 in every term, unless `untrained` is False."""
    generator = torch.Generator().manual_seed(n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def states() -> States:
        head = Head(normal(v, H).requires_grad_(), normal(v).requires_grad_() if bias else None, scale, softcap)
        return States(normal(n, H).requires_grad_(), head)

    count_N = torch.arange(n)
    weight_N = torch.where((count_N % 3 == 2) & untrained, 0.0, torch.rand(n, generator=generator).double() + 0.5)
    tokens = Tokens(
        ids_N=torch.randint(v, (n,), generator=generator),
        row_N=count_N // 4,
        position_N=count_N % 4,
        source_N=torch.full((n,), int(Source.STUDENT)),
        behavior_logp_N=normal(n),
        signals={},
        consulted={"cost": normal(n)},
    )
    other_N = torch.where(count_N % 4 == 0, 0.0, weight_N)  # the second term leaves out more
    return Models(states(), states(), tokens, {"opd": weight_N, "sft": other_N})
