"""Off-policy baselines, on rollouts that others wrote: `method=sft`, `method=gkd`, `method=sft_warmup25`.

arXiv 2306.13649 for SFT, `method=seq_kd` and GKD; arXiv 2605.31159 has the SFT warm-up, arXiv 2605.09253 the KD start,
`method=kd_start`. The teacher answers the prompts of the step, through the same engine and filters as a student would,
always, by a coin, or at first; and its tokens are trained. With `source: dataset` (`method=sft_dataset`,
`method=gkd_dataset`) the data's own solution stands where the teacher would have written:

    sft, seq_kd   loss_t = -log p(y_t),  y ~ q: in expectation KL(q || p) + H(q) at the teacher's prefixes
    sft_dataset   the same loss, y the solution of the data
    gkd           with probability lambda the student writes a rollout, else the source does; on both the same JSD(beta)
    kd_start      first steps: (1 - r) (-log p(y_t)) + r KL(q || p) on the teacher's rollouts; then plain OPD
    sft_warmup    the same with r = 0

`refresh: never` means a prompt that comes back has the answers it had: the teacher's uniforms are then a pure function
of (seed, prompt, number of the rollout). They are decoded again all the same, so it saves no time. The coin is one of
(seed, step, prompt). The optimizer keeps its state across the switch to plain OPD.

A solution is the text of `data.solution_field` as it is, without the spaces around it, in the student's tokens and
closed by the id that ends a response; it follows the prompt's generation prompt at once. The embedded lab makes its
own: in the teacher's style, without a slip, one per problem for all time. Longer than `rollout.max_tokens`, it is cut
there and its end is not trained, as with a rollout that reaches the limit. Nobody sampled it: it costs no decoding, its
behavior log-prob is NaN, filters and temperature are not for it, and every rollout of its prompt is the same. It is
graded and scored like any other; evaluations know nothing of it.

Neutral: none for sft, whose tokens are others; lambda 1 with beta 1 for gkd; warmup_steps 0 for the starts.
Differs: TRL flips gkd's coin once per micro-batch; here per prompt, or per step.
Differs: the SFT warm-up of the paper passes several times over the prompts of the first 50 steps; here every step has
         its own, with rollout.per_prompt answers each. That makes runs of one seed see the same prompts.

Metrics: gkd/on_policy_fraction, rollouts that the student wrote. What the teacher wrote costs
cost/teacher_generated_tokens, what the data gave is counted in cost/dataset_tokens; both are in cost/generated_tokens.
kl/*, entropy/* and rollout/* speak of these tokens too, whoever wrote them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from opd_lab.methods.base import TRAINED, Method, choice, within
from opd_lab.methods.coins import uniform
from opd_lab.methods.divergences import JSD
from opd_lab.types import ENDLESS, FORWARD_KL, LOGP_STUDENT, REVERSE_KL, Batch, Behavior, Needs, Source, State, Tokens

SOURCES = ("teacher", "dataset")
START = "start"  # the term of the teacher's tokens before plain OPD begins


def teachers(batch: Batch) -> Tensor:
    """Which tokens the teacher wrote, BT."""
    return batch.rollouts.source_BT == Source.TEACHER


@dataclass(frozen=True, kw_only=True)
class SFT(Method):
    """The teacher's answers, or the data's solutions, are learnt token by token."""

    paper = "https://arxiv.org/abs/2306.13649"
    neutral: ClassVar = None
    not_zero_at_teacher: ClassVar = "its loss is zero at no student: the entropy of whoever wrote is in it"
    not_towards_teacher: ClassVar = "it makes the given tokens likelier, which only the teacher's own should be"

    source: str = "teacher"
    refresh: str = "every_step"

    def __post_init__(self) -> None:
        choice("source", self.source, SOURCES)
        choice("refresh", self.refresh, ("every_step", "never"))
        if self.source == "dataset" and self.refresh != "never":
            raise ValueError(
                f"method.refresh must be never with method.source=dataset, got {self.refresh}: a solution of the data "
                "stays what it is; method=sft_dataset has both"
            )

    def asks(self) -> Mapping[str, str]:
        return {"teacher_tokens": ""} if self.source == "teacher" else {"dataset": "method.source=teacher"}

    def behavior(self, plain: Behavior, step: int, state: State) -> Behavior:
        if self.source == "dataset":
            return replace(plain, dataset=ENDLESS)
        draws = "prompt" if self.refresh == "never" else "rollout"
        return replace(plain, teacher_first=ENDLESS, teacher_draws=draws)

    def needs(self) -> Needs:
        return Needs(tokens=frozenset({LOGP_STUDENT}))

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        return {TRAINED: -tokens[LOGP_STUDENT]}

    def conventions(self) -> dict[str, str]:
        return super().conventions() | {"divergence": "forward_kl", "estimator": "sft"}


@dataclass(frozen=True, kw_only=True)
class GKD(JSD):
    """A coin decides whether the student writes a rollout or another source does, any divergence on both."""

    neutral: ClassVar = {"lambda_": 1.0, "beta": 1.0}

    source: str = "teacher"
    lambda_: float = 0.5
    mix: str = "prompt"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("source", self.source, SOURCES)
        within(
            "lambda_", self.lambda_, "in [0, 1], the share of rollouts that the student writes", 0 <= self.lambda_ <= 1
        )
        choice("mix", self.mix, ("prompt", "step"))

    def asks(self) -> Mapping[str, str]:
        asked = {"teacher": "teacher_tokens", "dataset": "dataset"}[self.source]
        return {asked: "method.lambda_=1"} if self.lambda_ < 1 else {}

    def behavior(self, plain: Behavior, step: int, state: State) -> Behavior:
        if self.lambda_ == 1:
            return plain

        def first(seed: int, uid_B: Tensor, group_B: Tensor) -> Tensor:
            coin_B = uniform(seed, step, group_B if self.mix == "prompt" else torch.zeros_like(group_B))
            return torch.where(coin_B < self.lambda_, 0, ENDLESS)

        return replace(plain, **{"teacher_first" if self.source == "teacher" else "dataset": first})

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        own_BT = batch.rollouts.source_BT == Source.STUDENT
        return {"gkd/on_policy_fraction": float(own_BT.any(1).double().mean())}


@dataclass(frozen=True, kw_only=True)
class TeacherStart(Method):
    """Plain OPD after some steps on the teacher's answers."""

    paper = "https://arxiv.org/abs/2605.31159"
    neutral: ClassVar = {"warmup_steps": 0}

    warmup_steps: int = 25
    kd_ratio: float = 0.0

    def __post_init__(self) -> None:
        within("warmup_steps", self.warmup_steps, ">= 0", self.warmup_steps >= 0, "0 is plain OPD")
        within("kd_ratio", self.kd_ratio, "in [0, 1]", 0 <= self.kd_ratio <= 1, "0 is SFT, 1 forward KL")

    @property
    def not_zero_at_teacher(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "the teacher's tokens teach before plain OPD begins" if self.warmup_steps > 0 else None

    def asks(self) -> Mapping[str, str]:
        return {"teacher_tokens": "method.warmup_steps=0"} if self.warmup_steps > 0 else {}

    def behavior(self, plain: Behavior, step: int, state: State) -> Behavior:
        return replace(plain, teacher_first=ENDLESS) if step < self.warmup_steps else plain

    def needs(self) -> Needs:
        started = {LOGP_STUDENT} if self.kd_ratio == 0 else {LOGP_STUDENT, FORWARD_KL}
        return Needs(tokens=frozenset({REVERSE_KL} | started))

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        mask_BT, teacher_BT = batch.rollouts.mask_BT, teachers(batch)
        return {TRAINED: (mask_BT & ~teacher_BT).float(), START: teacher_BT.float()}

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        start_N = -(1 - self.kd_ratio) * tokens[LOGP_STUDENT]
        if self.kd_ratio > 0:
            start_N = start_N + self.kd_ratio * tokens[FORWARD_KL]
        return {TRAINED: tokens[REVERSE_KL], START: start_N}
