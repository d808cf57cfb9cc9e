"""Rock tokens, plain OPD without the types that stay hard: `method=rock_tokens`.

arXiv 2605.09253. After OPD has saturated, some token types keep a high divergence from the teacher, and are so frequent
that they dominate the gradient. The loss stays full reverse KL; where the *realised* token is in a fixed set R, chosen
from an earlier complete run, it counts rock_weight (0: "frozen") instead of 1. Only the loss term is frozen: no
parameter is, and the token stays in the vocabulary.

    l_t = sum_u p_S(u) (log p_S(u) - log p_T(u))              a function of the prefix             (Eq. 1)
    R   = top K types by  Freq(v) * mean of l_t over y_t = v                                       (v1 Eq. 2)
    w_t = lambda if y_t in R, else 1                                                               (v1 Eq. 5)
    objective = sum w l / N      all_tokens, N the tokens of the step, frozen ones included
              | sum w l / sum w  kept_weight
              | mean over rollouts of sum w l / sum w  rollout_kept_weight, the shipped code

A window freezes neighbours too: radius, or high_run, the unbroken stretch with l >= theta around a rock of which this
holds as well, theta = the step's quantile of l at window_quantile. It never leaves the response.
Ours: `source: online` chooses R during the run, from all tokens since its start, frozen ones included, with `min_count`
and the decay; `mask: random_positions`, a control, freezes as many other tokens, those with the smallest coin of (seed,
step, rollout, position), or all others where those are fewer. Online R may name any token, a stop id included.

Neutral: rock_weight 1 with normalizer all_tokens.
Code: github.com/YuxuanJiang1/Rock-Token
Differs: the released code tests the token *before* the label, so that the loss after each rock is frozen, and the last
         prompt token judges the first response token: `align: previous`.
Differs: its normaliser acts per micro-batch of one rollout, so that the learning rate grows as lambda falls, and short
         rollouts weigh more, even at lambda 1: `rollout_kept_weight`. `rock_tokens_official_code` has both.
Differs: it has neither windows nor the context-consistent set of the second version, whose thresholds have no numbers.
Differs: it multiplies computed losses by 0; here frozen tokens never enter the loss, so an infinite one does no harm.

Metrics, all rock_tokens/: frozen_fraction (of tokens), frozen_kl_share_fraction, frozen_enrichment_ratio (KL share over
token share: below 1 the set is frequent rather than hard), {frozen,other}_kl_mean_nats, effective_tokens (sum of w),
window_fraction (tokens that a window alone adds to the set's), set_size_types, set_jaccard_fraction (online: of the
last two sets); histograms {frozen,other}_kl_nats, rollout_frozen_fraction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from opd_lab.methods.base import TRAINED, Ask, Method, choice, quantile, rollout_mean, within
from opd_lab.methods.coins import token_coins
from opd_lab.methods.rock_scores import SCORES, TypeTable, tabulate, top
from opd_lab.types import REVERSE_KL, Batch, Facts, Needs, Signal, State


@dataclass(frozen=True, kw_only=True)
class RockTokens(Method):
    paper = "https://arxiv.org/abs/2605.09253"
    neutral: ClassVar = {"rock_weight": 1.0, "normalizer": "all_tokens"}

    rock_weight: float = 0.0
    source: str = "list"
    token_ids: tuple[int, ...] = ()
    tokenizer_digest: str = ""
    align: str = "label"
    window: str = "none"
    window_radius: int = 5
    window_quantile: float = 0.8
    normalizer: str = "all_tokens"
    mask: str = "tokens"
    online_score: str = "rock_score"
    online_k: int = 8
    online_warmup: int = 50
    online_refresh: int = 50
    online_decay: float = 1.0
    min_count: int = 2
    exclude_most_frequent: int = 0

    def __post_init__(self) -> None:
        within("rock_weight", self.rock_weight, "in [0, 1]", 0 <= self.rock_weight <= 1, "1 is plain OPD")
        choice("source", self.source, ("list", "online"))
        choice("align", self.align, ("label", "previous"))
        choice("window", self.window, ("none", "radius", "high_run"))
        used = self.window != "none"
        radius = ">= 1 when window is radius or high_run"
        within("window_radius", self.window_radius, radius, self.window_radius >= 1 or not used)
        within("window_quantile", self.window_quantile, "in (0, 1)", 0 < self.window_quantile < 1)
        choice("normalizer", self.normalizer, ("all_tokens", "kept_weight", "rollout_kept_weight"))
        choice("mask", self.mask, ("tokens", "random_positions"))
        choice("online_score", self.online_score, tuple(SCORES))
        for name in ("online_k", "online_warmup", "online_refresh", "min_count"):
            within(name, getattr(self, name), ">= 1", getattr(self, name) >= 1)
        within("online_decay", self.online_decay, "in (0, 1]", 0 < self.online_decay <= 1)
        within("exclude_most_frequent", self.exclude_most_frequent, ">= 0", self.exclude_most_frequent >= 0)

    def check(self, facts: Facts) -> None:
        if self.source == "online":
            self.leaves_something(facts.vocabulary, "token types of the vocabulary")
            return
        outside = [i for i in self.token_ids if not 0 <= i < facts.vocabulary]
        if outside or not self.token_ids:
            raise ValueError(
                f"method.token_ids must name at least one id in [0, {facts.vocabulary}), got {outside}; "
                "run 'opd-lab analyze rock corpus RUN', then 'rock select RUN', and use the method it writes"
            )
        if self.tokenizer_digest != facts.tokenizer:
            raise ValueError(
                f"token_ids were chosen with tokenizer {self.tokenizer_digest or '(none named)'}, "
                f"this run uses {facts.tokenizer}; select them again on this model"
            )

    def needs(self) -> Needs:
        kl, none = frozenset({REVERSE_KL}), frozenset[Signal]()
        online = self.source == "online"
        return Needs(batch=kl if self.window == "high_run" else none, tokens=kl, update=kl if online else none)

    def consult(self, ask: Ask, batch: Batch) -> dict[str, Tensor]:
        frozen_BT = self.with_window(batch, self.hits(batch))
        return {"frozen": frozen_BT if self.mask == "tokens" else others(batch, frozen_BT)}

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        mask_BT, w_BT = batch.rollouts.mask_BT, self.token_weights(batch)
        divisor = {
            "all_tokens": mask_BT.sum(),
            "kept_weight": w_BT.sum(),
            "rollout_kept_weight": mask_BT.any(1).sum() * w_BT.sum(1, keepdim=True).clamp(min=1),
        }[self.normalizer]
        counted = (w_BT != 0).sum()  # the platform divides by these, which cancels here
        return {TRAINED: w_BT * counted / divisor.clamp(min=1)}

    def token_weights(self, batch: Batch) -> Tensor:
        """w."""
        frozen_BT = batch.consulted["frozen"]
        w_BT = torch.ones_like(frozen_BT, dtype=torch.float64).masked_fill(frozen_BT, self.rock_weight)
        return w_BT * batch.rollouts.mask_BT

    def rocks(self, state: State) -> Tensor:
        """R."""
        return state["ids"] if self.source == "online" else torch.tensor(self.token_ids, dtype=torch.long)

    def hits(self, batch: Batch) -> Tensor:
        """Generated tokens in R, or after a token in R."""
        rollouts = batch.rollouts
        first = rollouts.prompt_columns - (self.align == "previous")
        ids_BT = rollouts.ids_BL[:, first : first + rollouts.source_BT.shape[1]]
        return rollouts.mask_BT & torch.isin(ids_BT, self.rocks(batch.state).to(ids_BT.device))

    def with_window(self, batch: Batch, hit_BT: Tensor) -> Tensor:
        """The hits, and the neighbours that their windows hold."""
        mask_BT = batch.rollouts.mask_BT
        if self.window == "none":
            return hit_BT
        if self.window == "radius":
            return spread(hit_BT, mask_BT, self.window_radius)
        kl_BT = batch[REVERSE_KL].clamp(max=torch.finfo(batch[REVERSE_KL].dtype).max)  # no inf - inf in the quantile
        high_BT = mask_BT & (kl_BT >= quantile(kl_BT[mask_BT], 100 * self.window_quantile))
        return hit_BT | spread(hit_BT & high_BT, high_BT, self.window_radius)

    def init_state(self) -> State:
        if self.source == "list":
            return {}
        empty = TypeTable(*(torch.zeros(0, dtype=torch.float64) for _ in TypeTable._fields))
        return empty._asdict() | {
            **{"ids": torch.zeros(0, dtype=torch.long), "jaccard": math.nan},
            **{"updates": 0, "last_refresh": None},
        }

    def update(self, state: State, batch: Batch) -> State:
        if self.source == "list":
            return state
        mask_BT = batch.rollouts.mask_BT
        old = TypeTable(*(state[name] for name in TypeTable._fields))
        new = tabulate(batch.rollouts.response_BT[mask_BT], batch[REVERSE_KL][mask_BT], len(old.count_V))
        table = TypeTable(*(b + self.online_decay * pad(a, (0, len(b) - len(a))) for a, b in zip(old, new)))
        updates, last = state["updates"] + 1, state["last_refresh"]
        state = state | table._asdict() | {"updates": updates}
        if updates < self.online_warmup or (last is not None and updates - last < self.online_refresh):
            return state
        self.leaves_something(int((table.count_V > 0).sum()), "observed token types")
        limits = {"min_count": self.min_count, "exclude_most_frequent": self.exclude_most_frequent}
        ids = top(SCORES[self.online_score](table), table, self.online_k, **limits)
        likeness = math.nan if last is None else jaccard(state["ids"], ids)
        return state | {"ids": ids, "jaccard": likeness, "last_refresh": updates}

    def leaves_something(self, types: int, of: str) -> None:
        if self.online_k >= types:
            raise ValueError(
                f"method.online_k must be smaller than the {types} {of}, got {self.online_k}: "
                "nothing would be left to train on"
            )

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        mask_BT, frozen_BT = batch.rollouts.mask_BT, batch.consulted["frozen"]
        kl_BT = batch.signals.get(REVERSE_KL, batch.rollouts.logp_BT * torch.nan).double()
        frozen_N, other_N = kl_BT[frozen_BT], kl_BT[mask_BT & ~frozen_BT]
        token_share, hit_BT = mean(frozen_BT[mask_BT]), self.hits(batch)
        kl_share = (frozen_N.sum() / kl_BT[mask_BT].sum()).item()
        share_B = rollout_mean(frozen_BT, mask_BT)
        values: dict[str, float | Tensor] = {
            "frozen_fraction": token_share,
            "frozen_kl_share_fraction": kl_share,
            "frozen_enrichment_ratio": kl_share / token_share if token_share > 0 else math.nan,
            "frozen_kl_mean_nats": mean(frozen_N),
            "other_kl_mean_nats": mean(other_N),
            "effective_tokens": self.token_weights(batch).sum().item(),
            "window_fraction": mean((self.with_window(batch, hit_BT) & ~hit_BT)[mask_BT]),
            "set_size_types": float(len(self.rocks(batch.state).unique())),
            "frozen_kl_nats": frozen_N,
            "other_kl_nats": other_N,
            "rollout_frozen_fraction": share_B[~share_B.isnan()],
        }
        if self.source == "online":
            values["set_jaccard_fraction"] = batch.state["jaccard"]
        return {f"rock_tokens/{name}": value for name, value in values.items()}

    def conventions(self) -> dict[str, str]:
        return super().conventions() | {
            "denominator": "tokens" if self.normalizer == "all_tokens" else self.normalizer,
            "normalizer": self.normalizer,
            "align": self.align,
            "window": self.window,
            "digest": self.tokenizer_digest if self.source == "list" else "online",
        }


def spread(seed_BT: Tensor, through_BT: Tensor, radius: int) -> Tensor:
    """The seeds, and what lies within `radius` positions of one, through an unbroken stretch."""
    left_BT = right_BT = seed_BT
    for _ in range(radius):
        left_BT = left_BT | (pad(left_BT[:, 1:], (0, 1)) & through_BT)
        right_BT = right_BT | (pad(right_BT[:, :-1], (1, 0)) & through_BT)
    return left_BT | right_BT


def others(batch: Batch, hit_BT: Tensor) -> Tensor:
    """As many generated tokens as there are hits, drawn from those that are none."""
    free_BT, coin_BT = batch.rollouts.mask_BT & ~hit_BT, token_coins(batch)
    coin_N = torch.cat([coin_BT[free_BT].sort().values, coin_BT.new_ones(1)])
    return free_BT & (coin_BT < coin_N[min(int(hit_BT.sum()), len(coin_N) - 1)])


def jaccard(a: Tensor, b: Tensor) -> float:
    """Shared over all members."""
    either = len(torch.cat([a, b]).unique())
    return torch.isin(a, b).sum().item() / either if either else math.nan


def mean(value_N: Tensor) -> float:
    return value_N.double().mean().item()
