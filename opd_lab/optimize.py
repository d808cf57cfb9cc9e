"""The updates on one batch: gradient, finiteness check, clipping, AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_lab.chunk import HALF
from opd_lab.methods.base import Method
from opd_lab.models import LM
from opd_lab.settings import OptimSettings
from opd_lab.signals import add
from opd_lab.step import Gradient, StatesOf, View, accumulate_gradient
from opd_lab.types import Batch, Signal, remembered


class DivergedError(RuntimeError):
    """The objective or its gradient is no longer a number."""


@dataclass(frozen=True, slots=True)
class Learned:
    """What the updates on one batch did. `gradient` is the first update's: what the diagnostics look at."""

    gradient: Gradient
    weights: dict[str, Tensor]
    gradient_norm: float  # before clipping, of the first update
    skipped: int  # updates left out because no token had weight
    clipped: float  # share of the updates whose gradient was longer than `optim.clip_norm`
    later: dict[str, Tensor]  # tallies of the updates after the first, added up


def learning_rate(optim: OptimSettings, step: int, steps: int) -> float:
    """The rate of a step, a pure function, so that a resumed run needs no scheduler's memory."""
    warm = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    left = 1 - max(0, step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    fall = {"constant": 1.0, "linear": left, "cosine": (1 + math.cos(math.pi * (1 - left))) / 2}[optim.schedule]
    return optim.lr * warm * fall


class AdamW(torch.optim.AdamW):
    """AdamW on float32 copies of the parameters that are of half precision: these have 8 bits, and an update of less
    than a 256th of a weight would be rounded away. A gradient is added up in the copy, the parameter keeps none."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], **how: Any) -> None:
        own = list(parameters)
        copies = [p.detach().float().requires_grad_() if p.dtype in HALF else p for p in own]
        self.copied = [(p, copy) for p, copy in zip(own, copies) if copy is not p]
        super().__init__(copies, **how)

    @torch.no_grad()
    def collect(self) -> None:
        """Take the gradients that a backward pass left at the parameters."""
        for own, copy in self.copied:
            if own.grad is not None:
                copy.grad = own.grad.float() if copy.grad is None else copy.grad.add_(own.grad)
                own.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().step(closure)
        for own, copy in self.copied:
            own.copy_(copy)

    def state_dict(self) -> dict[str, Any]:
        copies = {"copies": [copy.detach() for _, copy in self.copied]} if self.copied else {}
        return super().state_dict() | copies

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = dict(state_dict)
        for (_, copy), value in zip(self.copied, saved.pop("copies", []), strict=True):
            copy.copy_(value)
        super().load_state_dict(saved)


def adamw(student: LM, optim: OptimSettings) -> AdamW:
    beta1, beta2 = optim.betas
    return AdamW(
        student.module.parameters(),
        lr=optim.lr,
        betas=(beta1, beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )


def learn(
    method: Method,
    batch: Batch,
    views: list[View],
    student: StatesOf,
    optimizer: AdamW,
    optim: OptimSettings,
    *,
    rate: float,
    record: frozenset[Signal],
) -> Learned:
    """`optim.updates_per_rollout` optimizer steps on one batch, with the weights of its start.

    Raises:
        DivergedError: the objective or the gradient is not finite; nothing was updated.
    """
    weights = method.weights(batch)
    first, norm, skipped, clipped = None, 0.0, 0, 0
    later: dict[str, Tensor] = {}
    constants = remembered(method.needs().tokens) if optim.updates_per_rollout > 1 else {}
    for group in optimizer.param_groups:
        group["lr"] = rate
    for _ in range(optim.updates_per_rollout):
        optimizer.zero_grad(set_to_none=True)
        gradient = accumulate_gradient(
            method,
            batch,
            weights,
            student,
            views,
            micro_batch=optim.micro_batch,
            chunk=optim.chunk_tokens,
            record=record | set(constants.values()) if first is None else frozenset(),
            old=None if first is None else {old: first.signals[now] for old, now in constants.items()},
            collect=optimizer.collect,
        )
        now = _apply(optimizer, gradient, batch, optim.clip_norm)
        skipped += now == 0.0
        clipped += optim.clip_norm is not None and now > optim.clip_norm
        if first is None:
            first, norm = gradient, now
        else:
            add(later, gradient.tallies)
    assert first is not None
    return Learned(first, weights, norm, skipped, clipped / optim.updates_per_rollout, later)


def gradient_norms(
    method: Method,
    batch: Batch,
    views: list[View],
    student: StatesOf,
    optimizer: AdamW,
    optim: OptimSettings,
) -> dict[str, float]:
    """The gradient norm of each term of the objective alone, before clipping: one forward and backward per term, after
    which no gradient is left."""
    weights, norms = method.weights(batch), {}
    for term in weights:
        optimizer.zero_grad(set_to_none=True)
        alone = {name: weight_BT * (name == term) for name, weight_BT in weights.items()}
        accumulate_gradient(
            method,
            batch,
            alone,
            student,
            views,
            micro_batch=optim.micro_batch,
            chunk=optim.chunk_tokens,
            collect=optimizer.collect,
        )
        norms[term] = _norm(_trained(optimizer))
    optimizer.zero_grad(set_to_none=True)
    return norms


def _trained(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _norm(parameters: list[torch.nn.Parameter]) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def _apply(optimizer: AdamW, gradient: Gradient, batch: Batch, clip_norm: float | None) -> float:
    """One optimizer step, or none where the gradient is 0; returns the gradient's norm before clipping."""
    parameters = _trained(optimizer)
    norm = _norm(parameters)
    if not (math.isfinite(norm) and math.isfinite(gradient.objective)):
        raise DivergedError(_where(gradient, batch, norm))
    if norm == 0.0:
        return norm
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, torch.tensor(norm))
    optimizer.step()
    return norm


def _where(gradient: Gradient, batch: Batch, norm: float) -> str:
    """Which rollouts made the gradient something else than a number."""
    bad_B = torch.zeros(len(batch.rollouts), dtype=torch.bool)
    for loss_BT in gradient.losses.values():
        bad_B |= loss_BT.isinf().any(1).cpu()
    uids = batch.rollouts.uid_B.cpu()[bad_B].tolist()
    infinite = (
        f"; rollouts {uids[:5]} have an infinite loss: did the teacher rule a token out? model.teacher_floor_nats"
    )
    return (
        f"step {batch.step}: the objective is {gradient.objective} and its gradient norm {norm}, not finite"
        f"{infinite if uids else ''}. Nothing was updated and the run stops; "
        "try a lower optim.lr, or look at these rollouts in the run folder"
    )
