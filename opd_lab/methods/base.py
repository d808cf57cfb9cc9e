"""The method contract. Every default answer is plain on-policy distillation.

    behavior     who samples the rollouts?                     the student
    asks         what must the rollout engine be able to do?   nothing but that
    needs        which signals must exist?                     what reverse KL needs
    consult      what else is computed once per step?          nothing
    weights      how much does each token count?               every generated token once
    losses       what is minimised on each token?              reverse KL, full vocabulary
    init_state,
    update       what is remembered between steps?             nothing
    check        what cannot work, before the first token?     nothing is refused
    bind         what follows from this run's models?          nothing; called once, after check
    preparation,
    prepare      what is fitted once before the first step?    nothing; the result is kept and shared between runs
    tally        what is added up over the trained tokens?     nothing
    metrics      what does the method report of itself?        nothing
    tables       which rows does it leave at every step?       none
    notes        what should be said before the first step?    nothing

`weights` sees the whole step and no gradient, so batch statistics are batch statistics. `losses` sees any number of
tokens of any rollouts and may look at nothing but each token itself, so memory is bounded and the micro-batch changes
nothing. Both name the same terms. The objective is

    sum over terms of   sum_tokens(weight * loss) / #(tokens of the step with weight != 0 in that term)

A method is immutable. Its fields are the YAML keys, the MLflow params and the search space at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from opd_lab.types import REVERSE_KL, Batch, Behavior, Facts, Needs, Rollouts, Signal, State, Tokens

TRAINED = "opd"  # the name of a method's only term


class Continued(NamedTuple):
    """What a teacher wrote after one prefix."""

    texts: list[str]  # without special tokens
    tokens: int  # written for all of them, their ends included
    cached: int = 0  # tokens of the prefix that were not read for it, but for another question


class Writer(Protocol):
    """Who can go on with a text."""

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
        """`samples` texts per rollout, each going on from its prompt and the response before token `cuts_B[b]`: nothing
        from there on is shown. What is drawn depends on the seed, the rollout's uid and the cut alone."""
        ...


class Ask(Writer, Protocol):
    """What `consult` may ask: the teacher for text (declared by `Needs.text`), and what the student's tokens read like.
    For several questions about one rollout give its row several times: `rollouts.rows(row_C)`."""

    def texts(self, rollouts: Rollouts, begin_B: Tensor, end_B: Tensor) -> list[str]:
        """Response tokens begin, ..., end - 1 of each rollout as text, without special tokens."""
        ...

    def shortened(self, text: str, tokens: int) -> str:
        """The beginning of a text that the student's tokenizer makes so many tokens of."""
        ...

    def show(self, **row: Any) -> None:
        """A row of the step's table `consulted`, for people to read; `uid` says which rollout it speaks of."""
        ...


class Frozen(Protocol):
    """The student and the teacher before the first step, as `prepare` may ask them. No gradient."""

    def rollouts(self, prompts: int, max_tokens: int) -> Rollouts:
        """One rollout of the student, at temperature 1, for each of so many training prompts."""
        ...

    def states(self, rollouts: Rollouts, signals: frozenset[Signal]) -> dict[Signal, Tensor]:
        """These `hidden` signals of the generated tokens, shape NDH, in the order of `mask_BT`."""
        ...


class Prepared(NamedTuple):
    """What `prepare` leaves: the state of step 0, and what the report of step 0 says of it."""

    state: State
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Method:
    """Plain on-policy distillation, and the questions every other method answers differently."""

    paper: ClassVar[str]  # an address
    # ship | control (expected to fail or to do nothing: it proves that the platform can tell) | experimental (something
    # essential is unknown; the card names it)
    status: ClassVar[str] = "ship"
    # Settings under which the method is plain OPD in loss and gradient; None, where there are none (then `laws` says
    # what is tested in their place).
    neutral: ClassVar[Mapping[str, Any] | None] = {}
    # Settings whose loss has a full-vocabulary form: with them a small step must lower the exact reverse KL.
    towards_teacher: ClassVar[Mapping[str, Any]] = {}
    # Settings that fit rollouts of a few tokens, where the method's own do not: the contract tests try it with them.
    on_few_tokens: ClassVar[Mapping[str, Any]] = {}
    # Teacher := student must give loss 0 and gradient 0; else the reason why it does not.
    not_zero_at_teacher: ClassVar[str | None] = None
    # Term -> the further name under which the norm of its gradient is logged, where the paper's page has one.
    gradient_norms: ClassVar[Mapping[str, str]] = {}
    # With `towards_teacher` a small step lowers the exact reverse KL on any tokens; else the reason why it need not.
    not_towards_teacher: ClassVar[str | None] = None

    def behavior(self, plain: Behavior, step: int, state: State) -> Behavior:
        """The behavior of this step; `plain` is what the rollout config says."""
        return plain

    def asks(self) -> Mapping[str, str]:
        """What any of its behaviors asks of the rollout engine (`Behavior.asks`), each with the setting that does
        without it, such as `method.initial_budget_nats=0`; empty where there is none."""
        return {}

    def needs(self) -> Needs:
        return Needs(tokens=frozenset({REVERSE_KL}))

    def consult(self, ask: Ask, batch: Batch) -> dict[str, Tensor]:
        """Constants for this step, shape B or BT, read as `batch.consulted[...]` and `tokens.consulted[...]`."""
        return {}

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Per term a weight >= 0 per token, shape BT, 0 outside the mask."""
        return {TRAINED: batch.rollouts.mask_BT.float()}

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        """Per term a loss per token, shape N, nats unless the card says otherwise."""
        return {TRAINED: tokens[REVERSE_KL]}

    def init_state(self) -> State:
        return {}

    def update(self, state: State, batch: Batch) -> State:
        return state

    def check(self, facts: Facts) -> None:
        """Raise ValueError, saying what, got, allowed and next, if this run cannot work."""

    def bind(self, facts: Facts) -> Self:
        """The method with what follows from these facts filled in, such as `layers: all` as a list of blocks."""
        return self

    def preparation(self) -> dict[str, Any] | None:
        """The fields that `prepare` depends on, beside the models and the prompts; None: nothing is prepared."""
        return None

    def prepare(self, ask: Frozen, state: State) -> Prepared:
        """What is fitted once, before step 0, with both models frozen. Only where `preparation` is not None."""
        return Prepared(state, {})

    def tally(self, tokens: Tokens) -> dict[str, Tensor]:
        """Sums over these tokens, without gradient; `update` and `metrics` get those of the step: `batch.tallies`."""
        return {}

    def notes(self, tallies: Mapping[str, Tensor]) -> list[str]:
        """What a person should hear before the first step, given the tallies of the first few rollouts."""
        return []

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        """The method's own metrics under names that begin with its own; a 1-D tensor is logged as a histogram.
        Beside `needs().batch`, `batch` holds the signals that the diagnostics recorded; use `batch.signals.get`."""
        return {}

    def tables(self, batch: Batch) -> dict[str, list[dict[str, Any]]]:
        """Rows of tables of its own, at every step, for later runs to read; the step is added to each."""
        return {}

    def conventions(self) -> dict[str, str]:
        """What a comparison must know before it draws two losses on one axis."""
        return {"divergence": "reverse_kl", "estimator": "full_vocabulary", "denominator": "tokens"}


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in allowed:
        raise ValueError(f"method.{name} must be one of {', '.join(allowed)}, got {value}")


def within(name: str, value: float, interval: str, ok: bool, hint: str = "") -> None:
    """Refuse a number outside its interval."""
    if not ok:
        raise ValueError(f"method.{name} must be {interval}, got {value:g}{'; ' + hint if hint else ''}")


def rollout_mean(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over each rollout's generated tokens, float64; NaN for a rollout without any."""
    total_B = value_BT.double().masked_fill(~mask_BT, 0.0).sum(1)
    return total_B / mask_BT.sum(1).double().masked_fill(~mask_BT.any(1), torch.nan)


def quantile(value_N: Tensor, percent: float) -> Tensor:
    """Linear between the sorted values. The position is multiplied first and divided last, so that a whole one stays
    whole and no value too many falls below it. NaN without values."""
    if not len(value_N):
        return value_N.new_tensor(torch.nan)
    sorted_N, position = value_N.sort().values, percent * (len(value_N) - 1) / 100
    return torch.lerp(sorted_N[math.floor(position)], sorted_N[math.ceil(position)], position % 1)
