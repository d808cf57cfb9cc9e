"""One step in two halves: what is known of the whole batch without gradient, and the gradient, in micro-batches.

The trainer, `doctor` and the contract tests all come through here, so there is one denominator in the code base:
`kept`, counted over the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from opd_lab.chunk import Declared, States, TeacherView, UndeclaredSignalError, measure, reads
from opd_lab.methods.base import Continued, Method, Writer
from opd_lab.signals import add, objective
from opd_lab.types import (
    ENTROPY_STUDENT,
    LOGP_OLD,
    LOGP_STUDENT,
    Batch,
    Rollouts,
    Signal,
    Source,
    State,
    Tokens,
    scatter,
)

FREE = {LOGP_STUDENT: "logp_BT", ENTROPY_STUDENT: "entropy_BT"}  # what the rollouts carry anyway


class Scorer(Writer, Protocol):
    """A teacher, as the step sees it."""

    name: str
    provides: frozenset[str]

    def view(self, rollouts: Rollouts, signals: frozenset[Signal]) -> TeacherView:
        """What these signals need it to say of the generated tokens, in the order of `rollouts.mask_BT`."""
        ...


StatesOf = Callable[[Rollouts, frozenset[Signal]], States]  # states for these signals, in the order of the mask


class Language(Protocol):
    """What the student's tokens read like."""

    def texts(self, rollouts: Rollouts) -> list[str]: ...

    def shortened(self, text: str, tokens: int) -> str: ...


class Models(NamedTuple):
    """Everyone who has a say in a step."""

    student: StatesOf
    teacher: Scorer
    reference: StatesOf | None = None  # the frozen initial student
    language: Language | None = None  # the student's, for methods that ask the teacher for text


class Asking:
    """The `Ask` of a step: what a method asks in `consult`, counted."""

    def __init__(self, models: Models, allowed: bool, where: str) -> None:
        self._models, self._allowed, self._where = models, allowed, where
        self.cost: dict[str, int] = {}
        self.shown: list[dict[str, Any]] = []

    @property
    def _language(self) -> Language:
        assert self._models.language is not None, "models without a tokenizer have no text"
        return self._models.language

    def continue_(self, rollouts: Rollouts, cuts_B: Tensor, **how: Any) -> list[Continued]:
        if not self._allowed:
            raise UndeclaredSignalError(f"text is not in needs() of {self._where}; add text=True there to ask for it")
        found = self._models.teacher.continue_(rollouts, cuts_B, **how)
        prompts = int(rollouts.attention_BL[:, : rollouts.prompt_columns].sum())
        for name, count in (
            ("teacher_queries_count", len(rollouts)),
            ("teacher_prefix_tokens", prompts + int(cuts_B.sum())),
            ("teacher_generated_tokens", sum(written.tokens for written in found)),
        ):
            self.cost[name] = self.cost.get(name, 0) + count
        return found

    def texts(self, rollouts: Rollouts, begin_B: Tensor, end_B: Tensor) -> list[str]:
        t_T = torch.arange(rollouts.source_BT.shape[1], device=begin_B.device)
        outside_BT = (t_T < begin_B[:, None]) | (t_T >= end_B[:, None])
        part = replace(
            rollouts,
            source_BT=rollouts.source_BT.masked_fill(outside_BT, int(Source.PADDING)),
            stopped_B=rollouts.stopped_B & (end_B == rollouts.length_B),
        )
        return self._language.texts(part)

    def shortened(self, text: str, tokens: int) -> str:
        return self._language.shortened(text, tokens)

    def show(self, **row: Any) -> None:
        self.shown.append(row)


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
    asked = needs.batch | needs.tokens | record
    ask_for = frozenset(needs.batch - FREE.keys())
    signals = {s: getattr(rollouts, FREE[s]) for s in needs.batch & FREE.keys()}
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
        ask = Asking(models, needs.text, type(method).__name__)
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
) -> Gradient:
    """Add the gradient of the step's objective to the student's parameters, one micro-batch after the other.

    `old` holds `LOGP_OLD` from the second update on the same rollouts on.
    """
    mask_BT = batch.rollouts.mask_BT
    kept = {term: int((weight_BT != 0).sum()) for term, weight_BT in weights.items()}
    out = Gradient(values=dict.fromkeys(weights, 0.0))
    losses: dict[str, list[Tensor]] = {}
    signals: dict[Signal, list[Tensor]] = {}
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
            tally=method.tally if old is None else None,
        )
        add(out.tallies, seen.tallies)
        if value.requires_grad:
            value.backward()
        for term, share in seen.values.items():
            out.values[term] += share
        size = len(tokens.ids_N)
        for signal in record:
            signals.setdefault(signal, []).append(seen.signals.get(signal, tokens.behavior_logp_N.new_empty(size)))
        for term in weights:
            missing_N = torch.full((size,), torch.nan, device=mask_BT.device)
            losses.setdefault(term, []).append(seen.losses.get(term, missing_N).to(missing_N.dtype))
    out.signals = {signal: scatter(torch.cat(parts), mask_BT) for signal, parts in signals.items()}
    out.losses = {term: scatter(torch.cat(parts), mask_BT) for term, parts in losses.items()}
    if LOGP_STUDENT in out.signals:
        out.signals[LOGP_OLD] = out.signals[LOGP_STUDENT]
    return out
