"""Rewards of whole answers beside or instead of the teacher: `method=reward_mix`, `method=grpo`, `method=kdrl`.

The code of slime at the address below for the mix; arXiv 2402.03300 (GRPO); arXiv 2506.02208 (KDRL), read second-hand.
An answer's reward, compared with those of the other answers to its prompt, is an advantage that every token of it
shares. It is added to what the teacher says of the token; GRPO is what is left without a teacher.

    A_i    = (r_i - mean) / (std + eps) over the rollouts of a prompt; with std none, r_i - mean
    reward_mix   loss_t = -sg(kl_coef R_t + reward_coef A_i) log p(y_t),   R_t = log q(y_t) - log p(y_t)
    grpo         the same with kl_coef 0
    kdrl         loss_t = -A_i log p(y_t) + beta gap_t^2 / 2,   beta linear from beta_start to beta_end in decay_steps

A group of one, or of equal rewards, has A = 0, never NaN, and is counted. A rollout without a reward has A = 0 and
takes no part in its group. kdrl is experimental: over how many steps beta falls is unknown; here over the whole run.

Neutral: none. reward_mix with reward_coef 0 is method=sampled, plain OPD in expectation.
Differs: slime clips the ratio over several updates; here one update per batch of rollouts, at ratio 1.

Metrics: group/degenerate_fraction; kdrl/beta_ratio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.base import TRAINED, choice, within
from opd_lab.methods.policy_gradient import (
    BASES,
    PolicyGradient,
    degenerate_fraction,
    graded_groups,
    group_advantage,
    log_ratio,
)
from opd_lab.types import LOGP_STUDENT, LOGP_TEACHER, Batch, Facts, Needs, Tokens


@dataclass(frozen=True, kw_only=True)
class GroupRewards(PolicyGradient):
    """What the three share: the advantage of a rollout among the answers to its prompt."""

    not_zero_at_teacher: ClassVar = "the rewards of the answers go on teaching"

    std: str = "sample"
    eps: float = 1e-4

    def __post_init__(self) -> None:
        choice("std", self.std, ("sample", "population", "none"))
        within("eps", self.eps, "at least 0", self.eps >= 0)

    def consult(self, ask: object, batch: Batch) -> dict[str, Tensor]:
        rollouts = batch.rollouts
        return {"advantage": group_advantage(rollouts.reward_B, rollouts.group_B, std=self.std, eps=self.eps)}

    def reward_advantage(self, tokens: Tokens) -> Tensor:
        return tokens.consulted["advantage"].to(tokens[LOGP_STUDENT].dtype)

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        return {"group/degenerate_fraction": degenerate_fraction(batch.rollouts.reward_B, batch.rollouts.group_B)}


@dataclass(frozen=True, kw_only=True)
class RewardMix(GroupRewards):
    """The answer's reward beside the teacher's log-ratio."""

    paper = "https://github.com/THUDM/slime"
    towards_teacher: ClassVar = {"kl_coef": 1.0, "reward_coef": 0.0}

    kl_coef: float = 1.0
    reward_coef: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        within("kl_coef", self.kl_coef, "at least 0", self.kl_coef >= 0)
        within("reward_coef", self.reward_coef, "at least 0", self.reward_coef >= 0)
        if self.kl_coef == self.reward_coef == 0:
            raise ValueError("method.kl_coef and method.reward_coef are both 0: nothing would be learned")

    def check(self, facts: Facts) -> None:
        super().check(facts)
        if self.reward_coef > 0:
            graded_groups("reward_mix" if self.kl_coef > 0 else "grpo", facts)

    def needs(self) -> Needs:
        return Needs(tokens=frozenset({LOGP_STUDENT} | ({LOGP_TEACHER} if self.kl_coef > 0 else set())))

    def advantage(self, tokens: Tokens) -> Tensor:
        advantage_N = self.reward_coef * self.reward_advantage(tokens)
        return advantage_N + self.kl_coef * log_ratio(tokens) if self.kl_coef > 0 else advantage_N

    def conventions(self) -> dict[str, str]:
        parts = {"reverse_kl": self.kl_coef, "reward": self.reward_coef}
        return super().conventions() | {"divergence": "+".join(name for name, coef in parts.items() if coef > 0)}


@dataclass(frozen=True, kw_only=True)
class GRPO(RewardMix):
    """The answer's reward alone, without a teacher."""

    paper = "https://arxiv.org/abs/2402.03300"

    kl_coef: float = 0.0


@dataclass(frozen=True, kw_only=True)
class KDRL(GroupRewards):
    """The answer's reward, and the k2 form of reverse KL with a falling coefficient."""

    paper = "https://arxiv.org/abs/2506.02208"
    towards_teacher: ClassVar = {"beta_start": 100.0, "beta_end": 100.0}
    status: ClassVar[str] = "experimental"

    beta_start: float = 5e-3
    beta_end: float = 1e-3
    decay_steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        within("beta_start", self.beta_start, "at least 0", self.beta_start >= 0)
        within("beta_end", self.beta_end, "at least 0", self.beta_end >= 0)
        within("decay_steps", self.decay_steps, "at least 1", self.decay_steps >= 1)

    def check(self, facts: Facts) -> None:
        super().check(facts)
        graded_groups("kdrl", facts)

    def needs(self) -> Needs:
        return Needs(tokens=BASES["sampled"])

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        logp_N = tokens[LOGP_STUDENT]
        reward_N = d.score_function(logp_N, -self.reward_advantage(tokens))
        return {TRAINED: reward_N + self.beta(tokens.step) * d.k2(logp_N - tokens[LOGP_TEACHER])}

    def beta(self, step: int) -> float:
        done = min(step / self.decay_steps, 1.0)
        return self.beta_start + (self.beta_end - self.beta_start) * done

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        return super().metrics(batch, weights) | {"kdrl/beta_ratio": self.beta(batch.step - 1)}

    def conventions(self) -> dict[str, str]:
        return super().conventions() | {"divergence": "reward+reverse_kl", "estimator": "k2_direct"}
