"""What models say of some tokens: heads, states, and chunks whose signals are computed when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.types import AFTER, Signal, hidden

IN_CACHE = 1 << 18  # log-probs at a time
LAST_AFTER = hidden("", (-1,), "token")  # the last block's states after each token
HALF = (torch.bfloat16, torch.float16)
NOWHERE = -1e9  # a logit whose probability is exactly 0 in any type; finite, so that no difference of two is NaN


@dataclass(frozen=True, slots=True)
class Head:
    """Hidden states -> logits, in fp32 or better: softcap(scale * (h W^T + bias)). The ids of `one_event` are one event
    to this head: the first holds the mass of all, the others hold none."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    one_event: tuple[int, ...] = ()
    floor_nats: float | None = None  # of the log-probs: none is lower, whatever then becomes of their sum

    def log_probs(self, hidden_NH: Tensor) -> Tensor:
        logp_NV = self.logits(hidden_NH).log_softmax(-1)
        return logp_NV if self.floor_nats is None else logp_NV.clamp(min=self.floor_nats)

    def logits(self, hidden_NH: Tensor, weight_VH: Tensor | None = None, bias_V: Tensor | None = None) -> Tensor:
        weight_VH = self.weight_VH if weight_VH is None else weight_VH
        bias_V = self.bias_V if bias_V is None else bias_V
        logits_NV = _Project.apply(hidden_NH, weight_VH)
        logits_NV = logits_NV if bias_V is None else logits_NV + bias_V
        logits_NV = logits_NV * self.scale if self.scale != 1.0 else logits_NV
        logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap) if self.softcap else logits_NV
        return merged(logits_NV, self.one_event) if self.one_event else logits_NV


class _Project(torch.autograd.Function):
    """h W^T, for factors of half precision too in float32: their products are exact there, and logits rounded to 8
    bits would spoil the KL of two near models. What goes back is of the factors' own precision."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_NH, weight_VH)
        if hidden_NH.dtype not in HALF:
            return hidden_NH @ weight_VH.T
        if hidden_NH.device.type == "cuda":
            return torch.mm(hidden_NH, weight_VH.T, out_dtype=torch.float32)
        return hidden_NH.float() @ weight_VH.float().T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_NH, weight_VH = ctx.saved_tensors
        grad_NV = grad_outputs[0].to(hidden_NH.dtype)
        for_hidden, for_weight = ctx.needs_input_grad
        return grad_NV @ weight_VH if for_hidden else None, grad_NV.T @ hidden_NH if for_weight else None


def merged(logits_NV: Tensor, ids: tuple[int, ...]) -> Tensor:
    """The first of these ids with the mass of all, the others with none."""
    columns_E = torch.tensor(ids, device=logits_NV.device)
    together_N1 = logits_NV[:, columns_E].logsumexp(-1, keepdim=True)
    none_NE = together_N1.new_full((len(logits_NV), len(ids) - 1), NOWHERE)
    return logits_NV.index_copy(1, columns_E, torch.cat([together_N1, none_NE], -1))


@dataclass(frozen=True, slots=True)
class States:
    """What a model knows of N tokens: the hidden states that predict them, and the head that reads them. `layers` holds
    the hidden states of chosen blocks, shape NDH, under the `hidden` signal that asked for them."""

    hidden_NH: Tensor
    head: Head
    layers: Mapping[Signal, Tensor] = field(default_factory=dict)

    def at(self, index: slice | Tensor) -> States:
        return States(self.hidden_NH[index], self.head, {s: layers_NDH[index] for s, layers_NDH in self.layers.items()})

    def logits(self) -> Tensor:
        return self.head.logits(self.hidden_NH)

    def log_probs(self) -> Tensor:
        return self.head.log_probs(self.hidden_NH)


Scores = Mapping[Signal, Tensor]  # what a teacher without states says of N tokens
TeacherView = States | Scores


def cut(view: TeacherView | None, index: slice | Tensor) -> TeacherView | None:
    """Some of the tokens of a view."""
    if view is None or isinstance(view, States):
        return None if view is None else view.at(index)
    return {signal: value_N[index] for signal, value_N in view.items()}


class UndeclaredSignalError(KeyError):
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

    def get(self, key: Signal, default: Any = None) -> Any:
        """The signal if it is declared, else the default."""
        return self._signals[key] if key in self._declared else default

    def __iter__(self) -> Iterator[Signal]:
        return iter(self._declared)

    def __len__(self) -> int:
        return len(self._declared)


class Chunk(Mapping[Signal, Any]):
    """Some tokens under all models; a signal is computed when it is first asked for, and so are the logits behind it.
    Only the student's carry gradient. A model is given as its states, or as logits."""

    def __init__(
        self,
        ids_N: Tensor,
        student: States | Tensor | None,
        teacher: TeacherView | Tensor | None,
        reference: States | Tensor | None = None,
        known: Scores | None = None,
    ) -> None:
        self.ids_N, self._student, self._teacher, self._reference = ids_N, student, teacher, reference
        self._known: dict[Any, Any] = dict(known or {})
        if isinstance(teacher, Mapping):
            self._known |= teacher

    @property
    def logp_NV(self) -> Tensor:
        return self._once("logp_NV", lambda: _log_probs(self._student, "student"))

    @property
    def logq_NV(self) -> Tensor:
        return self._once("logq_NV", lambda: _log_probs(self._teacher, "teacher").detach())

    @property
    def p_NV(self) -> Tensor:
        return self._once("p_NV", lambda: self.logp_NV.exp())

    @property
    def q_NV(self) -> Tensor:
        return self._once("q_NV", lambda: self.logq_NV.exp())

    @property
    def logr_NV(self) -> Tensor:
        return self._once("logr_NV", lambda: _log_probs(self._reference, "reference").detach())

    def likeliest(self, owner: str, k: int) -> Tensor:
        """Ids [N, K] of the student's or the teacher's k likeliest tokens."""
        logp_NV = self.logp_NV if owner == "student" else self.logq_NV
        return self._once(("likeliest", owner, k), lambda: d.likeliest(logp_NV, k))

    def after(self, owner: str) -> Tensor:
        """[N, V] log-probs of what follows each token."""
        states = self._student if owner == "student" else self._teacher
        last_NH = self.layers(owner, LAST_AFTER)[:, 0]
        assert isinstance(states, States)
        return self._once(("after", owner), lambda: states.head.log_probs(last_NH))

    def layers(self, owner: str, signal: Signal) -> Tensor:
        states = self._student if owner == "student" else self._teacher
        if not isinstance(states, States) or signal not in states.layers:
            raise UndeclaredSignalError(f"the {owner}'s {signal} is not available here")
        return states.layers[signal]

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def __getitem__(self, signal: Signal) -> Any:
        return self._once(signal, lambda: COMPUTE[signal.name](self, **dict(signal.args)))

    @torch.no_grad()
    def read(self, signals: frozenset[Signal]) -> dict[Signal, Tensor]:
        """These signals, detached, one number per token each. On a CPU, those that nobody has asked for yet are
        computed for so few tokens at a time that what lies between log-probs and sums stays in the cache."""
        rest = frozenset(s for s in signals if s not in self._known and s.name != "hidden")
        found = {signal: self[signal].detach() for signal in signals - rest}
        full: dict[str, Tensor] = {}
        for owner in reads(rest):
            log_probs, probs = _FULL[owner]
            full[log_probs] = getattr(self, log_probs).detach()
            full |= {probs: self._known[probs].detach()} if probs in self._known else {}
        width = max((value.shape[-1] for value in full.values()), default=1)
        size = max(IN_CACHE // width, 1) if self.ids_N.device.type == "cpu" else len(self.ids_N)
        if size >= len(self.ids_N):
            return found | {signal: self[signal].detach() for signal in rest}
        parts: dict[Signal, list[Tensor]] = {signal: [] for signal in rest}
        for begin in range(0, len(self.ids_N), size):
            rows = slice(begin, begin + size)
            part = Chunk(self.ids_N[rows], None, None)
            part._known |= {name: value[rows] for name, value in full.items()}
            for signal, values in parts.items():
                values.append(part[signal])
        return found | {signal: torch.cat(values) for signal, values in parts.items()}

    def __iter__(self) -> Iterator[Signal]:
        return (key for key in self._known if isinstance(key, Signal))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _log_probs(view: TeacherView | Tensor | None, owner: str) -> Tensor:
    if isinstance(view, States):
        return view.log_probs()
    if not isinstance(view, Tensor):
        raise UndeclaredSignalError(
            f"this needs the {owner}'s full next-token distribution, which is not available here"
        )
    return view.log_softmax(-1)


def _sampled(logp_NV: Tensor, ids_N: Tensor) -> Tensor:
    return logp_NV.gather(-1, ids_N[:, None])[:, 0]


def _preferred(logp_NV: Tensor, than_N: Tensor) -> Tensor:
    """How many tokens are likelier. Compared into numbers, for truth values are added up at a third of the speed."""
    return torch.gt(logp_NV, than_N[:, None], out=torch.empty_like(logp_NV)).sum(-1)


def _logp_student(c: Chunk, temperature: float = 1.0) -> Tensor:
    return _sampled(c.logp_NV if temperature == 1 else (c.logp_NV / temperature).log_softmax(-1), c.ids_N)


def _overlap(c: Chunk, k: int) -> Tensor:
    shared_NK = d.shared(c.likeliest("teacher", k), c.likeliest("student", k), c.logp_NV.shape[-1])
    return shared_NK.double().mean(-1).to(c.logp_NV.dtype)


def _outside(c: Chunk, k: int) -> Tensor:
    return 1 - c.logp_NV.gather(-1, c.likeliest("teacher", k)).exp().sum(-1)


COMPUTE: dict[str, Callable[..., Any]] = {
    "logp_student": _logp_student,
    "logp_old": lambda c, **at: c[Signal("logp_student", tuple(at.items()))].detach(),
    "logp_teacher": lambda c: _sampled(c.logq_NV, c.ids_N),
    "entropy_student": lambda c: d.entropy(c.logp_NV, c.p_NV),
    "entropy_teacher": lambda c: d.entropy(c.logq_NV, c.q_NV),
    "reverse_kl": lambda c: d.reverse_kl(c.logp_NV, c.logq_NV, c.p_NV),
    "forward_kl": lambda c: d.forward_kl(c.logp_NV, c.logq_NV, c.q_NV),
    "total_variation": lambda c: d.total_variation(c.p_NV, c.q_NV),
    "jsd": lambda c, beta: d.jsd(c.logp_NV, c.logq_NV, beta, c.p_NV, c.q_NV),
    "topk": lambda c, k, support: d.topk(c.logp_NV, c.logq_NV, k, support),
    "topk_reverse_kl": lambda c, k, support: d.topk_kl(
        d.topk(c.logp_NV, c.logq_NV, k, support), direction="reverse", tail="bucket"
    ),
    "overlap": _overlap,
    "outside": _outside,
    "logp_reference": lambda c: _sampled(c.logr_NV, c.ids_N),
    "forward_kl_reference": lambda c: d.forward_kl(c.logp_NV, c.logr_NV),
    "full_student": lambda c, align="predict": c.logp_NV if align == "predict" else c.after("student"),
    "full_teacher": lambda c, align="predict": c.logq_NV if align == "predict" else c.after("teacher").detach(),
    "full_reference": lambda c: c.logr_NV,
    "hidden": lambda c, owner, layers, align: c.layers(owner, hidden("", layers, align)),
    "rank_teacher": lambda c: _preferred(c.logq_NV, _sampled(c.logq_NV, c.ids_N)),
}

_ALONE = {  # signals of one model
    "student": {"logp_student", "logp_old", "entropy_student", "full_student"},
    "teacher": {"logp_teacher", "entropy_teacher", "rank_teacher", "full_teacher"},
    "reference": {"logp_reference", "full_reference"},
}


_FULL = {"student": ("logp_NV", "p_NV"), "teacher": ("logq_NV", "q_NV"), "reference": ("logr_NV", "r_NV")}


def reads(signals: frozenset[Signal]) -> frozenset[str]:
    """Whose states these signals are made of: student, teacher, reference."""
    return frozenset(owner for signal in signals for owner in _owners(signal))


def _owners(signal: Signal) -> tuple[str, ...]:
    if signal.name == "hidden":
        return (str(dict(signal.args)["owner"]),)
    for owner, names in _ALONE.items():
        if signal.name in names:
            return (owner,)
    return ("student", "reference") if signal.name == "forward_kl_reference" else ("student", "teacher")


def teacher_must(signals: frozenset[Signal]) -> frozenset[str]:
    """What a teacher must be able to say: nothing, `sampled` log-probs, `full` distributions, `hidden` states."""
    asked = {signal.name for signal in signals if "teacher" in _owners(signal)}
    return frozenset({"logp_teacher": "sampled", "hidden": "hidden"}.get(name, "full") for name in asked)


def of_the_student(signals: frozenset[Signal]) -> frozenset[Signal]:
    """The same questions about hidden states, asked of the student instead of the teacher."""
    return frozenset(hidden("student", *(v for k, v in s.args if k != "owner")) for s in signals if s.name == "hidden")


def layers_of(owner: str, signals: frozenset[Signal]) -> frozenset[Signal]:
    """The blocks whose hidden states these signals ask of a model, as the keys of `States.layers`."""
    asked = (dict(signal.args) for signal in signals if signal.name == "hidden")
    found = frozenset(hidden("", a["layers"], a["align"]) for a in asked if a["owner"] == owner)
    return found | {LAST_AFTER} if Signal(f"full_{owner}", AFTER) in signals else found


@torch.no_grad()
def measure(
    wanted: frozenset[Signal],
    ids_N: Tensor,
    student: States | None,
    teacher: TeacherView | None,
    *,
    chunk: int,
    reference: States | None = None,
) -> dict[Signal, Tensor]:
    """The wanted signals of N tokens, each of shape N, without gradient."""
    parts: dict[Signal, list[Tensor]] = {signal: [] for signal in wanted}
    for start in range(0, len(ids_N), chunk):
        rows = slice(start, start + chunk)
        own, frozen = (None if states is None else states.at(rows) for states in (student, reference))
        seen = Chunk(ids_N[rows], own, cut(teacher, rows), frozen)
        for signal, value_N in seen.read(wanted).items():
            parts[signal].append(value_N)
    return {s: torch.cat(values) if values else torch.zeros(0, device=ids_N.device) for s, values in parts.items()}
