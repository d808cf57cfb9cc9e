"""The signals pass: hidden states x LM head -> every per-token signal asked for, chunk by chunk.

Nothing of shape [rollouts, time, vocabulary] ever exists. Hidden states [N, H] are projected a chunk of tokens at a
time. A chunk's loss and its gradient with respect to the hidden states and the head are computed at once, in the
forward pass, and the logits are freed; so there is one head projection per model, no recomputation, exact gradients,
and the whole is one autograd node whose backward is a multiplication. What the diagnostics record is read off the
same chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.types import LOGP_OLD, LOGP_STUDENT, Signal, Tokens, TopK


@dataclass(frozen=True, slots=True)
class Head:
    """Hidden states -> logits, in fp32 or better: softcap(scale * (h W^T + bias))."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_NH: Tensor, weight_VH: Tensor | None = None, bias_V: Tensor | None = None) -> Tensor:
        weight_VH = self.weight_VH if weight_VH is None else weight_VH
        bias_V = self.bias_V if bias_V is None else bias_V
        logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH, bias_V)
        logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
        logits_NV = logits_NV * self.scale if self.scale != 1.0 else logits_NV
        return self.softcap * torch.tanh(logits_NV / self.softcap) if self.softcap else logits_NV


class States(NamedTuple):
    """What a model knows of N tokens: the hidden states that predict them, and the head that reads them."""

    hidden_NH: Tensor
    head: Head

    def at(self, index: slice | Tensor) -> States:
        return States(self.hidden_NH[index], self.head)


Scores = Mapping[Signal, Tensor]  # what a teacher without states says of N tokens
TeacherView = States | Scores


class UndeclaredSignalError(LookupError):
    """A method read a signal that nobody was asked to compute."""


class Declared(Mapping[Signal, Any]):
    """Only the declared signals of a mapping; reading another one says how to declare it."""

    def __init__(self, signals: Mapping[Signal, Any], declared: frozenset[Signal], where: str) -> None:
        self._signals, self._declared, self._where = signals, declared, where

    def __getitem__(self, signal: Signal) -> Any:
        if signal not in self._declared:
            have = ", ".join(sorted(map(str, self._declared))) or "nothing"
            raise UndeclaredSignalError(f"{signal} is not in {self._where} (declared: {have}); add it there to read it")
        return self._signals[signal]

    def __iter__(self) -> Iterator[Signal]:
        return iter(self._declared)

    def __len__(self) -> int:
        return len(self._declared)


class Chunk(Mapping[Signal, Any]):
    """Some tokens under both models; a signal is computed when it is first asked for."""

    def __init__(self, ids_N: Tensor, student_NV: Tensor | None, teacher: Tensor | Scores | None) -> None:
        self.ids_N = ids_N
        self._logits_NV, self._teacher = student_NV, teacher
        self._known: dict[Any, Any] = dict(teacher) if isinstance(teacher, Mapping) else {}

    @property
    def logp_NV(self) -> Tensor:
        return self._once("logp_NV", lambda: _present(self._logits_NV, "student").log_softmax(-1))

    @property
    def logq_NV(self) -> Tensor:
        teacher = None if isinstance(self._teacher, Mapping) else self._teacher
        return self._once("logq_NV", lambda: _present(teacher, "teacher").log_softmax(-1))

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def __getitem__(self, signal: Signal) -> Any:
        return self._once(signal, lambda: COMPUTE[signal.name](self, **dict(signal.args)))

    def __iter__(self) -> Iterator[Signal]:
        return (key for key in self._known if isinstance(key, Signal))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _present(logits_NV: Tensor | None, owner: str) -> Tensor:
    if logits_NV is None:
        raise UndeclaredSignalError(
            f"this needs the {owner}'s full next-token distribution, which is not available here"
        )
    return logits_NV


def _sampled(logp_NV: Tensor, ids_N: Tensor) -> Tensor:
    return logp_NV.gather(-1, ids_N[:, None])[:, 0]


def _support(c: Chunk, k: int, support: str) -> tuple[Tensor, Tensor]:
    """Token ids [N, K], and which of them count."""
    k = min(k, c.logp_NV.shape[-1])
    if support in ("student", "teacher"):
        ids_NK = (c.logp_NV if support == "student" else c.logq_NV).detach().topk(k).indices
        return ids_NK, torch.ones_like(ids_NK, dtype=torch.bool)
    student_NK, teacher_NK = c.logp_NV.detach().topk(k).indices, c.logq_NV.topk(k).indices
    shared_NK = (teacher_NK[:, :, None] == student_NK[:, None, :]).any(-1)
    if support == "intersection":
        return teacher_NK, shared_NK
    # union: the student's, then those of the teacher's that are new
    return torch.cat([student_NK, teacher_NK], -1), torch.cat([torch.ones_like(shared_NK), ~shared_NK], -1)


def _topk(c: Chunk, k: int, support: str) -> TopK:
    ids_NK, inside_NK = _support(c, k, support)
    inside_NV = torch.zeros_like(c.logp_NV).scatter_add(-1, ids_NK, inside_NK.to(c.logp_NV.dtype)) > 0
    rests_N1 = (_log_mass(c.logp_NV, ~inside_NV), _log_mass(c.logq_NV, ~inside_NV))
    return TopK(c.logp_NV.gather(-1, ids_NK), c.logq_NV.gather(-1, ids_NK), inside_NK, ids_NK, *rests_N1)


def _log_mass(logp_NV: Tensor, where_NV: Tensor) -> Tensor:
    """log sum p, [N, 1]. Added up, for 1 - sum drowns in rounding, with its gradient, once a model is confident."""
    logp_NV = logp_NV.masked_fill(~where_NV, -torch.inf)
    none_N1 = logp_NV.isneginf().all(-1, keepdim=True)
    return logp_NV.masked_fill(none_N1, 0.0).logsumexp(-1, keepdim=True).masked_fill(none_N1, -torch.inf)


def _overlap(c: Chunk, k: int) -> Tensor:
    _, shared_NK = _support(c, k, "intersection")
    return shared_NK.double().mean(-1).to(c.logp_NV.dtype)


COMPUTE: dict[str, Callable[..., Any]] = {
    "logp_student": lambda c: _sampled(c.logp_NV, c.ids_N),
    "logp_old": lambda c: c[LOGP_STUDENT].detach(),
    "logp_teacher": lambda c: _sampled(c.logq_NV, c.ids_N),
    "entropy_student": lambda c: d.entropy(c.logp_NV),
    "entropy_teacher": lambda c: d.entropy(c.logq_NV),
    "reverse_kl": lambda c: d.reverse_kl(c.logp_NV, c.logq_NV),
    "forward_kl": lambda c: d.forward_kl(c.logp_NV, c.logq_NV),
    "jsd": lambda c, beta: d.jsd(c.logp_NV, c.logq_NV, beta),
    "topk": _topk,
    "overlap": _overlap,
    "rank_teacher": lambda c: (c.logq_NV > _sampled(c.logq_NV, c.ids_N)[:, None]).sum(-1).to(c.logq_NV.dtype),
}

_STUDENT_ALONE = {"logp_student", "logp_old", "entropy_student"}
_TEACHER_ALONE = {"logp_teacher", "entropy_teacher", "rank_teacher"}


def reads_student(signal: Signal) -> bool:
    return signal.name not in _TEACHER_ALONE


def teacher_must(signals: frozenset[Signal]) -> frozenset[str]:
    """What a teacher must be able to say for these signals: nothing, `sampled` log-probs, or `full` distributions."""
    names = {signal.name for signal in signals} - _STUDENT_ALONE
    return frozenset("sampled" if name == "logp_teacher" else "full" for name in names)


def _look(ids_N: Tensor, student: States | None, teacher: TeacherView | None, rows: slice | Tensor) -> Chunk:
    """A chunk without gradient to the teacher; the student's logits are projected from `student` as given."""
    teacher_NV: Tensor | Scores | None
    if isinstance(teacher, States):
        teacher_NV = teacher.head.logits(teacher.hidden_NH[rows]).detach()
    else:
        teacher_NV = None if teacher is None else {signal: value_N[rows] for signal, value_N in teacher.items()}
    student_NV = None if student is None else student.head.logits(student.hidden_NH[rows])
    return Chunk(ids_N[rows], student_NV, teacher_NV)


@torch.no_grad()
def measure(
    wanted: frozenset[Signal], ids_N: Tensor, student: States | None, teacher: TeacherView | None, *, chunk: int
) -> dict[Signal, Tensor]:
    """The wanted signals of N tokens, each of shape N, without gradient."""
    parts: dict[Signal, list[Tensor]] = {signal: [] for signal in wanted}
    for start in range(0, len(ids_N), chunk):
        seen = _look(ids_N, student, teacher, slice(start, start + chunk))
        for signal, values in parts.items():
            values.append(seen[signal])
    return {s: torch.cat(values) if values else torch.zeros(0, device=ids_N.device) for s, values in parts.items()}


Losses = Callable[[Tokens], dict[str, Tensor]]


@dataclass(slots=True)
class Recorded:
    """What one signals pass saw, detached, every entry of shape N in the order of the tokens given."""

    signals: dict[Signal, Tensor] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)  # per term, NaN where its weight is 0
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
) -> tuple[Tensor, Recorded]:
    """The objective of N tokens, as a scalar with gradient to the student's hidden states and head, and the record.

    `weights` has shape N per term, `kept` the whole step's count of non-zero weights per term: summed over the
    micro-batches of a step, the scalars are the step's objective. Tokens whose every weight is 0 never enter the
    losses; they are only recorded.
    """
    trained_N = torch.stack([weight_N != 0 for weight_N in weights.values()]).any(0)
    job = _Job(losses, tokens, declared, weights, kept, student, teacher, chunk, record, trained_N.nonzero()[:, 0])
    value = _Objective.apply(job, student.hidden_NH, student.head.weight_VH, student.head.bias_V)
    untrained_N = ~trained_N
    if record and bool(untrained_N.any()):
        rest = teacher.at(untrained_N) if isinstance(teacher, States) else None
        if isinstance(teacher, Mapping):
            rest = {signal: score_N[untrained_N] for signal, score_N in teacher.items()}
        seen = measure(record, tokens.ids_N[untrained_N], student.at(untrained_N), rest, chunk=chunk)
        for signal, value_N in seen.items():
            _into(job.out.signals, signal, untrained_N, value_N, len(trained_N))
    return value, job.out


def _into(table: dict[Any, Tensor], key: Any, index: Tensor, value_N: Tensor, size: int) -> None:
    if key not in table:
        table[key] = torch.full((size,), float("nan"), dtype=value_N.dtype, device=value_N.device)
    table[key][index] = value_N


@dataclass(slots=True)
class _Job:
    losses: Losses
    tokens: Tokens
    declared: frozenset[Signal]
    weights: Mapping[str, Tensor]
    kept: Mapping[str, int]
    student: States
    teacher: TeacherView | None
    chunk: int
    record: frozenset[Signal]
    index_N: Tensor  # the tokens that are trained
    out: Recorded = field(default_factory=Recorded)

    def step(self, rows: Tensor, student: States) -> Tensor:
        """One chunk: its share of the objective, with gradient to `student`."""
        seen = _look(self.tokens.ids_N, None, self.teacher, rows)
        seen._logits_NV = student.head.logits(student.hidden_NH)
        if LOGP_OLD in self.tokens.signals:
            seen._known[LOGP_OLD] = self.tokens.signals[LOGP_OLD][rows]
        view = at(self.tokens, rows, Declared(seen, self.declared, "needs().tokens of the method"))
        losses = self.losses(view)
        total = student.hidden_NH.new_zeros((), dtype=seen.logp_NV.dtype)
        for term, loss_N in losses.items():
            weight_N = self.weights[term][rows].to(loss_N.dtype)
            part = d.weighted_mean(loss_N, weight_N, self.kept[term])
            total = total + part
            self.out.values[term] = self.out.values.get(term, 0.0) + float(part.detach())
            shown_N = loss_N.detach().masked_fill(weight_N == 0, float("nan"))
            _into(self.out.losses, term, rows, shown_N, len(self.tokens.ids_N))
        with torch.no_grad():
            for signal in self.record:
                _into(self.out.signals, signal, rows, seen[signal].detach(), len(self.tokens.ids_N))
        return total


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
    def forward(ctx: Any, job: _Job, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
        need = [hidden_NH, weight_VH] + ([] if bias_V is None else [bias_V])
        wanted = [i for i in range(len(need)) if ctx.needs_input_grad[1 + i]]
        wide = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        # Each hidden state is written once; the head's gradients are sums over chunks, which bf16 would not carry.
        grads = [torch.zeros_like(need[i], dtype=wide if i else None) for i in wanted]
        value = hidden_NH.new_zeros((), dtype=wide)
        for start in range(0, len(job.index_N), job.chunk):
            rows = job.index_N[start : start + job.chunk]
            with torch.enable_grad():
                leaves = [hidden_NH[rows].detach()] + [t.detach() for t in need[1:]]
                for i in wanted:
                    leaves[i] = leaves[i].requires_grad_()
                head = replace(job.student.head, weight_VH=leaves[1], bias_V=leaves[2] if bias_V is not None else None)
                part = job.step(rows, States(leaves[0], head))
            value = value + part.detach()
            if not part.requires_grad:
                continue
            for grad, piece, i in zip(grads, torch.autograd.grad(part, [leaves[i] for i in wanted]), wanted):
                if i == 0:
                    grad[rows] = piece
                else:
                    grad += piece
        full: list[Tensor | None] = [None, None, None]
        for i, grad in zip(wanted, grads):
            full[i] = grad.to(need[i].dtype)
        ctx.save_for_backward(*full)
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (scale,) = grad_outputs
        return (None, *(None if grad is None else grad * scale.to(grad.dtype) for grad in ctx.saved_tensors))
