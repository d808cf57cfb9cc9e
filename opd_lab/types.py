"""The values that flow through one step of a run.

Shape letters, used as name suffixes everywhere in the package:
    B rollouts   P prompt columns   T response columns   L = P + T   N tokens in one flat list
    H hidden width   V vocabulary   K tokens of a support or bins of a histogram
Log-probabilities, entropies, divergences and gaps are in nats.

A per-token value is indexed by the token it speaks about. Its distribution comes from the hidden state one column
earlier, so response token t is predicted at column P + t - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

State = dict[str, Any]


class Source(IntEnum):
    """Where a response token came from. Only what stands above GIVEN is trained."""

    PADDING = 0
    GIVEN = 1
    STUDENT = 2
    TEACHER = 3
    BLEND = 4
    DATASET = 5


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What was sampled, and what the sampler knew for free."""

    ids_BL: Tensor  # prompts, padded on the left, then responses, padded on the right
    attention_BL: Tensor  # bool, False on padding
    source_BT: Tensor  # int8, a Source per response token
    # These three are NaN on tokens of the data, which nobody sampled.
    behavior_logp_BT: Tensor  # log-prob under the distribution that sampled the token (tempered, filtered)
    logp_BT: Tensor  # log-prob under the student itself: temperature 1, no filter
    entropy_BT: Tensor  # entropy of the student at the predicting position
    stopped_B: Tensor  # bool, ended by a stop id; False = cut at the response limit
    uid_B: Tensor  # int64, the rollout's number within its run: owner of its randomness
    group_B: Tensor  # int64, rollouts of one prompt share it
    reward_B: Tensor  # 1 correct, 0 wrong, NaN without a grader
    # What a behavior leaves beside, shape B or BT: the columns of its `mix`; `stop_score`, what its stop rule saw, on
    # cut tokens too; `generated`, tokens sampled, cut ones included; `teacher_decoded`, tokens the teacher looked at;
    # `first_slip`, the place of the first wrong word, -1 without one, where data can tell (a word is a token there);
    # `shared`, prompt tokens that were not read again, because another row of the batch begins with them.
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def mask_BT(self) -> Tensor:
        """True on generated response tokens: those that are trained."""
        return self.source_BT > Source.GIVEN

    @property
    def prompt_columns(self) -> int:
        return self.ids_BL.shape[1] - self.source_BT.shape[1]

    @property
    def response_BT(self) -> Tensor:
        return self.ids_BL[:, self.prompt_columns :]

    @property
    def length_B(self) -> Tensor:
        return self.mask_BT.sum(1)

    @property
    def generated_B(self) -> Tensor:
        """Tokens that were sampled, those included that a stop rule then cut off."""
        return self.extra.get("generated", self.length_B)

    @property
    def cut_B(self) -> Tensor:
        """Whether a stop rule cut it."""
        return self.length_B < self.generated_B

    def __len__(self) -> int:
        return len(self.ids_BL)

    def rows(self, index: slice | Tensor) -> Self:
        return self._each(lambda value: value[index])

    def to(self, device: torch.device | str) -> Self:
        return self._each(lambda value: value.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        own = {f.name: change(getattr(self, f.name)) for f in fields(self) if f.name != "extra"}
        return replace(self, **own, extra={name: change(value) for name, value in self.extra.items()})


@dataclass(frozen=True, slots=True)
class Signal:
    """The name of one number per token, with its parameters: `jsd(beta=0.5)`."""

    name: str
    args: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.name + (f"({', '.join(f'{k}={v}' for k, v in self.args)})" if self.args else "")


LOGP_STUDENT = Signal("logp_student")  # of the sampled token, at temperature 1
LOGP_OLD = Signal("logp_old")  # the same before the first update on these rollouts; a constant
LOGP_TEACHER = Signal("logp_teacher")
ENTROPY_STUDENT = Signal("entropy_student")
ENTROPY_TEACHER = Signal("entropy_teacher")
REVERSE_KL = Signal("reverse_kl")  # KL(student || teacher), full vocabulary
FORWARD_KL = Signal("forward_kl")  # KL(teacher || student), full vocabulary
TOTAL_VARIATION = Signal("total_variation")  # between student and teacher, in [0, 1], full vocabulary
LOGP_REFERENCE = Signal("logp_reference")  # the reference is the frozen initial student
REFERENCE_KL = Signal("forward_kl_reference")  # KL(reference || student), full vocabulary
FULL_STUDENT = Signal("full_student")  # log-probs of the whole vocabulary, shape NV: inside losses only
FULL_TEACHER = Signal("full_teacher")
FULL_REFERENCE = Signal("full_reference")
AFTER = (("align", "token"),)  # of what follows the token, the stop token included, in place of what predicted it
FULL_STUDENT_AFTER = Signal("full_student", AFTER)
FULL_TEACHER_AFTER = Signal("full_teacher", AFTER)
RANK_TEACHER = Signal("rank_teacher")  # tokens that the teacher prefers to the sampled one


def logp_student(temperature: float) -> Signal:
    """Log-prob of the sampled token under the student's tempered distribution, unfiltered."""
    return LOGP_STUDENT if temperature == 1 else Signal("logp_student", (("temperature", temperature),))


def logp_old(temperature: float) -> Signal:
    return Signal("logp_old", logp_student(temperature).args)


def remembered(signals: frozenset[Signal]) -> dict[Signal, Signal]:
    """Of these, what is a constant from before the first update, and the signal that it is then."""
    return {signal: Signal("logp_student", signal.args) for signal in signals if signal.name == "logp_old"}


def jsd(beta: float) -> Signal:
    """Generalised Jensen-Shannon divergence, GKD's convention: 0 = forward KL, 1 = reverse KL."""
    return Signal("jsd", (("beta", beta),))


def topk(k: int, support: str) -> Signal:
    """Log-probs of both models on a support of k tokens: student, teacher, union or intersection. A `TopK`."""
    return Signal("topk", (("k", k), ("support", support)))


def topk_reverse_kl(k: int, support: str) -> Signal:
    """KL(student || teacher) on a support of k tokens, the rest of the vocabulary being one more class."""
    return Signal("topk_reverse_kl", (("k", k), ("support", support)))


def overlap(k: int) -> Signal:
    """Share of the student's k likeliest tokens that are among the teacher's k likeliest."""
    return Signal("overlap", (("k", k),))


def outside(k: int) -> Signal:
    """The student's mass outside the teacher's k likeliest tokens."""
    return Signal("outside", (("k", k),))


def hidden(owner: str, layers: tuple[int, ...], align: str) -> Signal:
    """Hidden states of blocks 1..depth of the student or the teacher, shape NDH: inside losses only. The last block's
    are taken after the final norm. `align` predict: the state that predicts the token; token: the one that has read it.
    """
    return Signal("hidden", (("owner", owner), ("layers", layers), ("align", align)))


class TopK(NamedTuple):
    """Log-probs of the full vocabulary gathered on a support; `inside` is False where a row has fewer tokens."""

    logp_student_NK: Tensor
    logp_teacher_NK: Tensor
    inside_NK: Tensor
    ids_NK: Tensor
    log_rest_student_N1: Tensor  # log of the mass outside the support; -inf where nothing is left over
    log_rest_teacher_N1: Tensor


@dataclass(frozen=True, slots=True)
class Needs:
    """The signals a method reads: `batch` over the whole step before the gradient, `tokens` inside its losses, `update`
    over the whole step in `update`, which are read off the gradient's pass and cost no pass of their own."""

    batch: frozenset[Signal] = frozenset()
    tokens: frozenset[Signal] = frozenset()
    update: frozenset[Signal] = frozenset()
    text: bool = False  # the teacher is asked to continue texts

    @property
    def all(self) -> frozenset[Signal]:
        return self.batch | self.tokens | self.update


@dataclass(frozen=True, slots=True)
class Batch:
    """One whole step. No gradient. `batch[SIGNAL]` has shape BT and is NaN where nothing was generated."""

    rollouts: Rollouts
    signals: Mapping[Signal, Tensor]
    consulted: Mapping[str, Tensor] = field(default_factory=dict)  # what `Method.consult` made: shape B or BT
    state: State = field(default_factory=dict)  # what the method remembers from earlier steps
    step: int = 0
    seed: int = 0
    # There after the gradient: what `Method.tally` made, and per term each trained token's loss, shape BT, else NaN.
    tallies: Mapping[str, Tensor] = field(default_factory=dict)
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    later: Mapping[str, Tensor] = field(default_factory=dict)  # tallies of the further updates on these rollouts, added
    cost: Mapping[str, int] = field(default_factory=dict)  # of the questions that `Method.consult` asked
    shown: list[dict[str, Any]] = field(default_factory=list)  # what `Method.consult` shows to people

    def __getitem__(self, signal: Signal) -> Tensor:
        return self.signals[signal]


@dataclass(frozen=True, slots=True)
class Tokens:
    """N generated tokens on their way through the losses. `tokens[SIGNAL]` has shape N; the student's has gradient."""

    ids_N: Tensor
    row_N: Tensor  # the rollout's row in the batch
    position_N: Tensor  # response position t
    source_N: Tensor
    behavior_logp_N: Tensor
    signals: Mapping[Signal, Any]
    consulted: Mapping[str, Tensor] = field(default_factory=dict)  # shape N
    step: int = 0
    state: State = field(default_factory=dict)  # what the method remembers: a constant

    def __getitem__(self, signal: Signal) -> Any:
        return self.signals[signal]


ENDLESS = 2**31 - 1  # tokens: as many as the response limit allows

# A number of tokens for each rollout, a pure function of (seed of the run, uid_B, group_B); shape B.
PerRollout = Callable[[int, Tensor, Tensor], Tensor]
# Log-probs of student and teacher, [R, V] each -> those of the blend that is sampled, and further columns, [R] each.
Mix = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


class StopRule(NamedTuple):
    """Where a rollout is cut because of what the teacher says of it. Both are pure functions."""

    score: Callable[[Tensor, Tensor], Tensor]  # log-probs of student and teacher at a token, [R, V] -> [R]
    cut: Callable[[Tensor], Tensor]  # scores of the tokens so far, [R, t + 1] -> tokens kept, [R], -1 where it goes on


@dataclass(frozen=True, slots=True)
class Behavior:
    """Who samples a rollout, and how. The filters (the first four) apply to whoever writes."""

    temperature: float = 1.0
    top_p: float = 1.0  # 1 = off
    top_k: int = 0  # tokens, 0 = off
    suppressed: tuple[int, ...] = ()  # token ids that are never sampled
    limit: int | PerRollout = field(default=ENDLESS, repr=False)  # tokens, below the engine's own response limit
    teacher_first: int | PerRollout = field(
        default=0, repr=False
    )  # tokens the teacher writes, then the student goes on
    # What the teacher draws belongs to a rollout; or to a group, whose rollouts share it; or to a prompt, for all time
    teacher_draws: str = field(default="rollout", repr=False)
    # Rollouts that are the data's own solutions, whole: those with a number that is not 0. All else is not for them.
    dataset: int | PerRollout = field(default=0, repr=False)
    mix: Mix | None = field(default=None, repr=False)  # what is sampled in place of the student
    stop: StopRule | None = field(default=None, repr=False)

    @property
    def unfiltered(self) -> bool:
        return self.temperature == 1.0 and self.top_p == 1.0 and self.top_k == 0 and not self.suppressed

    @property
    def plain(self) -> bool:
        """Rollouts are the student's own: untempered, unfiltered, nobody's else, and whole."""
        return self == Behavior()

    @property
    def asks(self) -> frozenset[str]:
        """What a rollout engine must be able to do, beside sampling the student: keys of `CAPABILITIES`."""
        asked = {
            "blend": self.mix is not None,
            "teacher_tokens": self.teacher_first != 0,
            "stop": self.stop is not None,
            "dataset": self.dataset != 0,
        }
        return frozenset(name for name, yes in asked.items() if yes)

    @property
    def helped(self) -> bool:
        """Whether the teacher takes part."""
        return bool(self.asks - {"dataset"})


CAPABILITIES = {
    "blend": "blend two models token by token",
    "teacher_tokens": "let the teacher write tokens of a rollout",
    "stop": "stop a rollout on teacher scores",
    "dataset": "take rollouts from the data",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a method may know of its run before the first token, to refuse what cannot work."""

    steps: int
    behavior: Behavior
    max_tokens: int  # response limit
    per_prompt: int  # rollouts of one prompt in a step
    updates_per_rollout: int
    vocabulary: int
    graded: bool
    tokenizer: str  # digest of the tokenizer: what lists of token ids belong to
    data: str  # name of the data config, for messages
    teacher: str  # likewise
    engine: str  # likewise
    reference: str | None = None  # path of the reference model, None = the student's own beginning
    student_shape: tuple[int, int] | None = None  # depth, width; None = it gives no hidden states
    teacher_shape: tuple[int, int] | None = None  # likewise


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts over one of the fixed bin sets that all runs share, so that histograms can be added and compared."""

    counts_K: Tensor  # int64
    bins: str


@dataclass(slots=True)
class Report:
    """What one step leaves behind. Names are `area/quantity_unit`; rows of a table are flat records."""

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    time: float = 0.0  # seconds since 1970 at which the run folder took it; 0 = not yet


def scatter(value_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Put a flat list of tokens, or several of them, shape SN, back into its rollouts; NaN elsewhere.
    `value_BT[mask_BT]` undoes it."""
    value_BT = value_N.new_full((*value_N.shape[:-1], *mask_BT.shape), torch.nan)
    value_BT[..., mask_BT] = value_N
    return value_BT
