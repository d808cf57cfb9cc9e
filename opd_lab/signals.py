"""The signals pass: hidden states x LM head -> every per-token signal asked for, chunk by chunk.

Nothing of shape [rollouts, time, vocabulary] ever exists. Hidden states [N, H] are projected a chunk of tokens at a
time. A chunk's loss and its gradient with respect to the hidden states and the head are computed at once, in the
forward pass, and the logits are freed; so there is one head projection per model, no recomputation, exact gradients,
and the whole is one autograd node whose backward is a multiplication. What the diagnostics record is read off the
same chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.chunk import Chunk, Declared, States, TeacherView, cut, measure
from opd_lab.types import Signal, Tokens

Losses = Callable[[Tokens], dict[str, Tensor]]
Tally = Callable[[Tokens], dict[str, Tensor]]  # sums over tokens


@dataclass(slots=True)
class Recorded:
    """What one signals pass saw, detached, every entry of shape N in the order of the tokens given."""

    signals: dict[Signal, Tensor] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)  # per term, NaN where its weight is 0
    tallies: dict[str, Tensor] = field(default_factory=dict)  # what `tally` said of the trained tokens, added up
    values: dict[str, float] = field(default_factory=dict)  # per term, its share of the objective


def objective(
    losses: Losses,
    tokens: Tokens,
    declared: frozenset[Signal],
    weights: Mapping[str, Tensor],
    kept: Mapping[str, int],
    student: States,
    teacher: TeacherView | None,
    *,
    chunk: int,
    record: frozenset[Signal] = frozenset(),
    reference: States | None = None,
    tally: Tally | None = None,
) -> tuple[Tensor, Recorded]:
    """The objective of N tokens, as a scalar with gradient to the student's hidden states and head, and the record.

    `weights` has shape N per term, `kept` the whole step's count of non-zero weights per term: summed over the
    micro-batches of a step, the scalars are the step's objective. Tokens whose every weight is 0 never enter the
    losses; they are only recorded. Tokens that count in the same terms share chunks, so that what a term says of a
    token on which it has no weight, be it NaN, reaches no gradient.
    """
    bit = {term: 1 << i for i, term in enumerate(reversed(list(weights)))}
    kind_N = torch.stack([(weight_N != 0) * bit[term] for term, weight_N in weights.items()]).sum(0)
    trained_N = kind_N > 0
    parts = [
        (rows, frozenset(term for term, value in bit.items() if kind & value))
        for kind in kind_N[trained_N].unique().tolist()
        for rows in (kind_N == kind).nonzero()[:, 0].split(chunk)
    ]
    job = _Job(losses, tokens, declared, weights, kept, student, teacher, reference, record, tally, parts)
    head = student.head
    value = _Objective.apply(job, student.hidden_NH, head.weight_VH, head.bias_V, *student.layers.values())
    untrained_M = (~trained_N).nonzero()[:, 0] if record else trained_N.new_empty(0)
    if len(untrained_M):
        rest = tokens.ids_N[untrained_M], student.at(untrained_M), cut(teacher, untrained_M)
        job.read.append((untrained_M, measure(record, *rest, chunk=chunk)))
    job.out.signals = _together(job.read, record)
    job.out.values = {term: float(value) for term, value in job.totals.items()}
    return value, job.out


def _together(read: list[tuple[Tensor, dict[Signal, Tensor]]], record: frozenset[Signal]) -> dict[Signal, Tensor]:
    """What was read of some tokens at a time, in the order of all; in one go, for to move a signal costs more than it
    holds."""
    if not read or not record:
        return {}
    order_N = torch.cat([rows for rows, _ in read])
    value_SN = torch.cat([torch.stack([seen[signal] for signal in record]) for _, seen in read], 1)
    return dict(zip(record, torch.empty_like(value_SN).index_copy_(1, order_N, value_SN)))


def add(total: dict[str, Tensor], part: Mapping[str, Tensor]) -> None:
    """Add sums to sums."""
    for name, value in part.items():
        total[name] = total[name] + value if name in total else value


@dataclass(slots=True)
class _Job:
    losses: Losses
    tokens: Tokens
    declared: frozenset[Signal]
    weights: Mapping[str, Tensor]
    kept: Mapping[str, int]
    student: States
    teacher: TeacherView | None
    reference: States | None
    record: frozenset[Signal]
    tally: Tally | None
    parts: list[tuple[Tensor, frozenset[str]]]  # chunks of the tokens that are trained, and the terms they count in
    totals: dict[str, Tensor] = field(default_factory=dict)
    read: list[tuple[Tensor, dict[Signal, Tensor]]] = field(default_factory=list)  # what was recorded of which tokens
    out: Recorded = field(default_factory=Recorded)

    def rebuild(self, leaves: list[Tensor | None]) -> States:
        """The student's states on the leaves of a chunk."""
        hidden_NH, weight_VH, bias_V, *layers = leaves
        assert hidden_NH is not None and weight_VH is not None
        head = replace(self.student.head, weight_VH=weight_VH, bias_V=bias_V)
        return States(
            hidden_NH, head, {s: t for s, t in zip(self.student.layers, layers, strict=True) if t is not None}
        )

    def step(self, rows: Tensor, terms: frozenset[str], student: States) -> Tensor:
        """One chunk: its share of the objective, with gradient to `student`."""
        old = {signal: value_N[rows] for signal, value_N in self.tokens.signals.items()}
        frozen = None if self.reference is None else self.reference.at(rows)
        seen = Chunk(self.tokens.ids_N[rows], student, cut(self.teacher, rows), frozen, old)
        view = at(self.tokens, rows, Declared(seen, self.declared, "needs().tokens of the method"))
        losses = self.losses(view)
        total = student.hidden_NH.new_zeros((), dtype=_wide(student.hidden_NH))
        for term, loss_N in losses.items():
            if term in terms:
                part = d.weighted_mean(loss_N, self.weights[term][rows].to(loss_N.dtype), self.kept[term])
                total = total + part
                add(self.totals, {term: part.detach()})
                self._keep(term, rows, loss_N.detach())
        with torch.no_grad():
            self.read.append((rows, seen.read(self.record)))
            if self.tally:
                add(self.out.tallies, self.tally(view))
        return total

    def _keep(self, term: str, rows: Tensor, loss_N: Tensor) -> None:
        if term not in self.out.losses:
            self.out.losses[term] = loss_N.new_full(self.tokens.ids_N.shape, torch.nan)
        self.out.losses[term][rows] = loss_N


def at(tokens: Tokens, rows: Tensor, signals: Mapping[Signal, Any]) -> Tokens:
    """Some of the tokens, with the signals of a chunk."""
    return replace(
        tokens,
        ids_N=tokens.ids_N[rows],
        row_N=tokens.row_N[rows],
        position_N=tokens.position_N[rows],
        source_N=tokens.source_N[rows],
        behavior_logp_N=tokens.behavior_logp_N[rows],
        consulted={name: value_N[rows] for name, value_N in tokens.consulted.items()},
        signals=signals,
    )


class _Objective(torch.autograd.Function):
    """Gradients are computed in the forward pass, chunk by chunk; the backward only scales them."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *inputs: Tensor | None) -> Tensor:
        """`inputs`: hidden states, head weight, head bias, and the layers. Those of the tokens are cut into chunks."""
        wide = _wide(job.student.hidden_NH)
        per_token = [place not in (1, 2) for place in range(len(inputs))]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        # A token's gradient is written once; the head's is a sum over chunks, which bf16 would not carry. What no loss
        # looks at keeps None, and costs nothing.
        grads: list[Tensor | None] = [None] * len(inputs)
        value = torch.zeros((), dtype=wide, device=job.tokens.ids_N.device)
        for rows, terms in job.parts:
            with torch.enable_grad():
                leaves = [
                    None if t is None else (t[rows] if per_token[i] else t).detach() for i, t in enumerate(inputs)
                ]
                asked = [leaf.requires_grad_() for i, leaf in enumerate(leaves) if leaf is not None and i in wanted]
                part = job.step(rows, terms, job.rebuild(leaves))
            value = value + part.detach()
            if not part.requires_grad:
                continue
            for i, piece in zip(wanted, torch.autograd.grad(part, asked, allow_unused=True), strict=True):
                if piece is None:
                    continue
                grad = grads[i]
                if grad is None:
                    grad = torch.zeros_like(inputs[i], dtype=None if per_token[i] else wide)  # type: ignore[arg-type]
                    grads[i] = grad
                if per_token[i]:
                    grad[rows] = piece
                else:
                    grad += piece
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if t is None else t.dtype for t in inputs]
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (scale,) = grad_outputs
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (None, *(None if grad is None else (grad * scale).to(dtype) for grad, dtype in grads))


def _wide(hidden_NH: Tensor) -> torch.dtype:
    return torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
