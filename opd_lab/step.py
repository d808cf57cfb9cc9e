"""One step in two halves: what is known of the whole batch without gradient, and the gradient, in micro-batches.

The trainer, `doctor` and the contract tests all come through here, so there is one denominator in the code base:
`kept`, counted over the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from opd_lab.asking import Asking, Language
from opd_lab.chunk import Declared, States, TeacherView, measure, reads
from opd_lab.methods.base import Method, Writer
from opd_lab.signals import add, objective
from opd_lab.types import (
    ENTROPY_STUDENT,
    LOGP_STUDENT,
    Batch,
    Rollouts,
    Signal,
    State,
    Tokens,
    scatter,
)

FREE = {LOGP_STUDENT: "logp_BT", ENTROPY_STUDENT: "entropy_BT"}  # what the rollouts carry of sampled tokens


class Scorer(Writer, Protocol):
    """A teacher, as the step sees it."""

    name: str
    provides: frozenset[str]

    def view(self, rollouts: Rollouts, signals: frozenset[Signal]) -> TeacherView:
        """What these signals need it to say of the generated tokens, in the order of `rollouts.mask_BT`."""
        ...


StatesOf = Callable[[Rollouts, frozenset[Signal]], States]  # states for these signals, in the order of the mask


class Models(NamedTuple):
    """Everyone who has a say in a step."""

    student: StatesOf
    teacher: Scorer
    reference: StatesOf | None = None  # the frozen initial student
    language: Language | None = None  # the student's, for methods that ask the teacher for text


class View(NamedTuple):
    """What everyone but the student says of the tokens of a micro-batch."""

    teacher: TeacherView | None
    reference: States | None


def micro_batches(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def whole_batch(
    method: Method,
    rollouts: Rollouts,
    models: Models,
    *,
    state: State,
    step: int,
    seed: int,
    micro_batch: int,
    chunk: int,
    record: frozenset[Signal] = frozenset(),
) -> tuple[Batch, list[View]]:
    """Everything that exists before the first gradient: what the others say of each micro-batch, and the signals that
    the method declared for the whole batch, computed only where the rollouts do not carry them. `record` names the
    signals that the diagnostics will want beside the method's."""
    needs = method.needs()
    asked = needs.all | record
    free = {s: getattr(rollouts, FREE[s]) for s in needs.batch & FREE.keys()}
    signals = {s: value_BT for s, value_BT in free.items() if not bool(value_BT[rollouts.mask_BT].isnan().any())}
    ask_for = needs.batch - signals.keys()
    parts: dict[Signal, list[Tensor]] = {signal: [] for signal in ask_for}
    views: list[View] = []
    with torch.no_grad():
        for rows in micro_batches(len(rollouts), micro_batch):
            part = rollouts.rows(rows)
            view = View(
                models.teacher.view(part, asked) if "teacher" in reads(asked) else None,
                models.reference(part, asked) if models.reference and "reference" in reads(asked) else None,
            )
            views.append(view)
            if ask_for:
                states = models.student(part, ask_for) if "student" in reads(ask_for) else None
                ids_N = part.response_BT[part.mask_BT]
                seen = measure(ask_for, ids_N, states, view.teacher, chunk=chunk, reference=view.reference)
                for signal, value_N in seen.items():
                    parts[signal].append(value_N)
        signals |= {signal: scatter(torch.cat(values), rollouts.mask_BT) for signal, values in parts.items()}
        declared = Declared(signals, needs.batch, f"needs().batch of {type(method).__name__}")
        batch = Batch(rollouts, declared, {}, state, step, seed)
        ask = Asking(models.teacher if needs.text else None, models.language, type(method).__name__)
        consulted = method.consult(ask, batch)
        return replace(batch, consulted=consulted, cost=ask.cost, shown=ask.shown), views


def tokens_of(batch: Batch, rows: slice, old: Mapping[Signal, Tensor] | None = None) -> Tokens:
    """The generated tokens of some rollouts, in the order of their mask."""
    part = batch.rollouts.rows(rows)
    mask_BT = part.mask_BT
    row_BT = torch.arange(len(batch.rollouts), device=mask_BT.device)[rows][:, None].expand_as(mask_BT)
    position_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device).expand_as(mask_BT)
    return Tokens(
        ids_N=part.response_BT[mask_BT],
        row_N=row_BT[mask_BT],
        position_N=position_BT[mask_BT],
        source_N=part.source_BT[mask_BT],
        behavior_logp_N=part.behavior_logp_BT[mask_BT],
        signals={signal: value_BT[rows][mask_BT] for signal, value_BT in (old or {}).items()},
        consulted={name: _per_token(value[rows], mask_BT) for name, value in batch.consulted.items()},
        step=batch.step,
        state=batch.state,
    )


def _per_token(value: Tensor, mask_BT: Tensor) -> Tensor:
    value_BT = value[:, None].expand(mask_BT.shape) if value.dim() == 1 else value
    return value_BT[mask_BT]


@dataclass(slots=True)
class Gradient:
    """What one gradient computation left behind. Per-token entries have shape BT, NaN where there is nothing."""

    values: dict[str, float] = field(default_factory=dict)  # per term, its share of the objective
    losses: dict[str, Tensor] = field(default_factory=dict)
    signals: dict[Signal, Tensor] = field(default_factory=dict)
    tallies: dict[str, Tensor] = field(default_factory=dict)  # sums over the trained tokens, made by `Method.tally`

    @property
    def objective(self) -> float:
        return sum(self.values.values())


def accumulate_gradient(
    method: Method,
    batch: Batch,
    weights: Mapping[str, Tensor],
    student: StatesOf,
    views: list[View],
    *,
    micro_batch: int,
    chunk: int,
    record: frozenset[Signal] = frozenset(),
    old: Mapping[Signal, Tensor] | None = None,
    collect: Callable[[], None] = lambda: None,
) -> Gradient:
    """Add the gradient of the step's objective to the student's parameters, one micro-batch after the other; `collect`
    is called after each, and may take it away.

    `old` holds the constants from before the first update, from the second update on.
    """
    mask_BT = batch.rollouts.mask_BT
    kept = {term: int((weight_BT != 0).sum()) for term, weight_BT in weights.items()}
    out = Gradient(values=dict.fromkeys(weights, 0.0))
    losses: dict[str, list[Tensor]] = {}
    recorded: list[Tensor] = []
    for rows, view in zip(micro_batches(len(batch.rollouts), micro_batch), views, strict=True):
        tokens = tokens_of(batch, rows, old)
        value, seen = objective(
            method.losses,
            tokens,
            method.needs().tokens,
            {term: weight_BT[rows][mask_BT[rows]] for term, weight_BT in weights.items()},
            kept,
            student(batch.rollouts.rows(rows), method.needs().tokens),
            view.teacher,
            chunk=chunk,
            record=record,
            reference=view.reference,
            tally=method.tally,
        )
        add(out.tallies, seen.tallies)
        if value.requires_grad:
            value.backward()
            collect()
        for term, share in seen.values.items():
            out.values[term] += share
        none_N = torch.full((len(tokens.ids_N),), torch.nan, device=mask_BT.device)
        if record:
            recorded.append(torch.stack([seen.signals.get(signal, none_N) for signal in record]))
        for term in weights:
            losses.setdefault(term, []).append(seen.losses.get(term, none_N).to(none_N.dtype))
    if recorded:
        out.signals = dict(zip(record, scatter(torch.cat(recorded, 1), mask_BT)))
    out.losses = {term: scatter(torch.cat(parts), mask_BT) for term, parts in losses.items()}
    return out
