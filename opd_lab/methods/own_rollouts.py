"""Plain OPD on rollouts tempered or cut: `method=temperature_warmup`, `method=fixed_prefix1024`, `method=random_cut`.

arXiv 2605.31159 has the temperature, arXiv 2606.09471 the cuts, each as a baseline. They are the controls of methods
that change the sampler: one that does better than these does more than to sharpen the rollouts, or to shorten them.

    temperature_warmup  temperature_k = t0 + (1 - t0) min(k, K) / K  at step k; the loss stays at temperature 1
    fixed_prefix        nobody writes beyond so many tokens, so the rest costs nothing
    random_cut          with a probability a rollout counts up to a position drawn from 1 ... its own length only; it is
                        written to its end, and the rest is neither trained nor in the denominator

The coin and the position of a rollout are pure functions of (seed, uid).

Neutral: t0 1; a prefix of at least the response limit; probability 0. The first two are the same rollouts bit for bit.
Differs: unknown, the papers describe neither in full. The uniform position of random_cut is our reading.

Metrics: temperature_warmup/temperature_ratio; fixed_prefix/limited_fraction, rollouts cut by the prefix;
random_cut/kept_fraction of the tokens, random_cut/kept_mean_tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from opd_lab.methods.base import TRAINED, Method, within
from opd_lab.methods.coins import uniform
from opd_lab.methods.support_loss import SupportLoss
from opd_lab.types import ENDLESS, Batch, Behavior, Facts, State


@dataclass(frozen=True, kw_only=True)
class TemperatureWarmup(SupportLoss):
    """Plain OPD on rollouts that are a little sharper at first."""

    paper = "https://arxiv.org/abs/2605.31159"
    neutral: ClassVar = {"initial_temperature": 1.0, "support": "full"}

    initial_temperature: float = 0.9
    warmup_steps: int = 15

    def __post_init__(self) -> None:
        super().__post_init__()
        t0 = self.initial_temperature
        within("initial_temperature", t0, "> 0", t0 > 0, "1 is plain OPD, the paper tried 0.8 to 0.95")
        within("warmup_steps", self.warmup_steps, ">= 1", self.warmup_steps >= 1, "for none set initial_temperature=1")

    def check(self, facts: Facts) -> None:
        if facts.behavior.temperature != 1.0:
            raise ValueError(
                "temperature_warmup ends at temperature 1; set rollout.temperature=1, "
                f"got {facts.behavior.temperature:g}"
            )

    def temperature(self, step: int) -> float:
        """Of the rollouts of a step, from 0 on."""
        return self.initial_temperature + (1 - self.initial_temperature) * min(step / self.warmup_steps, 1.0)

    def behavior(self, plain: Behavior, step: int, state: State) -> Behavior:
        return replace(plain, temperature=self.temperature(step))

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        # the report of step k is numbered k + 1
        return {"temperature_warmup/temperature_ratio": self.temperature(batch.step - 1)}


@dataclass(frozen=True, kw_only=True)
class FixedPrefix(Method):
    """Plain OPD on the beginning of rollouts."""

    paper = "https://arxiv.org/abs/2606.09471"
    neutral: ClassVar = {"prefix_tokens": ENDLESS}

    prefix_tokens: int = 1024

    def __post_init__(self) -> None:
        within("prefix_tokens", self.prefix_tokens, ">= 1", self.prefix_tokens >= 1)

    def behavior(self, plain: Behavior, step: int, state: State) -> Behavior:
        return replace(plain, limit=self.prefix_tokens)

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        rollouts = batch.rollouts
        limited_B = ~rollouts.stopped_B & (rollouts.length_B >= self.prefix_tokens)
        return {"fixed_prefix/limited_fraction": float(limited_B.double().mean())}


@dataclass(frozen=True, kw_only=True)
class RandomCut(Method):
    """Plain OPD on rollouts that count up to a random position."""

    paper = "https://arxiv.org/abs/2606.09471"
    neutral: ClassVar = {"probability": 0.0}

    probability: float = 1.0

    def __post_init__(self) -> None:
        within("probability", self.probability, "in [0, 1]", 0 <= self.probability <= 1)

    def kept_B(self, batch: Batch) -> Tensor:
        """Tokens of each rollout that count."""
        uid_B, length_B = batch.rollouts.uid_B.cpu(), batch.rollouts.length_B.cpu()
        coin_B, place_B = (uniform(batch.seed, uid_B, which) for which in (0, 1))
        cut_B = 1 + (place_B * length_B).long()
        return torch.where(coin_B < self.probability, cut_B, length_B).to(batch.rollouts.uid_B.device)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        mask_BT = batch.rollouts.mask_BT
        position_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        return {TRAINED: (mask_BT & (position_T < self.kept_B(batch)[:, None])).float()}

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        kept_B = (weights[TRAINED] > 0).sum(1).double()
        return {
            "random_cut/kept_fraction": float(kept_B.sum() / batch.rollouts.length_B.sum().clamp(min=1)),
            "random_cut/kept_mean_tokens": float(kept_B.mean()),
        }
