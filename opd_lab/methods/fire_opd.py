"""FiRe-OPD, filter rollouts, then reweight tokens: `method=fire_opd`.

arXiv 2606.02684. The loss of a token stays reverse KL on student rollouts; only how much it counts changes. A rollout
whose mean teacher log-prob lies below the step's 20 % quantile is left out. In the rest a token counts more where the
teacher is sure and the student is not, and the weights of a rollout average to 1.

    gap   = log p_S(y_t) - log p_T(y_t), detached                                          (a)
    s_i   = mean_t log p_T(y_t)                                                            (b)
    keep  = s_i >= tau,  tau = quantile of s at skip_percentile, linear interpolation      (c)
    cT    = clip(1 - H_T / max H_T, 0, 1),   cS = clip(H_S / max H_S, 0, 1)                (d)
    raw   = (1 + alpha cT) (1 + beta cS),    w = raw / mean raw                            (Eq. 8)
    loss  = max(gap r, gap clip(r, 1 - eps, 1 + eps)),  r = p_S / p_S,old                  (e)
    objective = sum keep w loss / sum keep                                                 (token_mean)

(a) to (e) are our letters: of the paper only its abstract and the number of Eq. 8 were available, the rest is read off
the released code. With one update per rollout r is 1, and (e) has the gradient of the score function gap log p_S; in
later updates gap follows the current student. `token_loss: full` puts the exact reverse KL in place of (e).

Ours: filter_scope group; the soft filter u = 2 (rank + 1) / (N + 1), by ascending score; hard tokens, 1 for the
ceil(hard_token_fraction T) largest raw of a rollout.

Neutral: skip_percentile, alpha and beta 0 with token_loss full; with sampled, in expectation.
Code: github.com/YuYingLi0/FiRe-OPD
Differs: the released scripts take quantile, maxima and means inside micro-batches of one rollout, where nothing is ever
         dropped; here over the whole step. `fire_opd_official_code` replays them.
Differs: their "token mean" is then a mean of rollout means: `aggregation: sequence_mean`.
Differs: they give the plain-OPD arm alone truncated importance weights and a dual clip, and divide logits by the
         sampling temperature; here all arms are treated alike, at temperature 1.
Differs: their filter fails with two teachers; here it never sees which teacher scored. Scores are float64.

Metrics: fire_opd/kept_fraction, kept_tokens_fraction, score_mean_nats, score_threshold_nats (mean of tau),
weight_{mean,min,p5,p50,p95,max}_ratio, teacher_confidence_mean_fraction, student_confusion_mean_fraction,
kl_kept_mean_nats, {kept,dropped}_{length_mean_tokens,reward_mean_fraction}, score_correct_auc_fraction,
weighted_gap_top5pct_share_fraction; histograms score_nats, weight_ratio. Kept tokens are those of weight > 0; a loss
over them falls by construction of the filter: read progress off kl/reverse_mean_nats, which is over all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opd_lab.methods.base import TRAINED, Method, choice, quantile, rollout_mean, within
from opd_lab.types import (
    ENTROPY_STUDENT,
    ENTROPY_TEACHER,
    LOGP_OLD,
    LOGP_STUDENT,
    LOGP_TEACHER,
    REVERSE_KL,
    Batch,
    Facts,
    Needs,
    Tokens,
)


@dataclass(frozen=True, kw_only=True)
class FireOPD(Method):
    paper = "https://arxiv.org/abs/2606.02684"
    neutral: ClassVar = {
        **{"skip_percentile": 0.0, "alpha": 0.0, "beta": 0.0, "token_loss": "full"},
        **{"aggregation": "token_mean", "rollout_mode": "hard", "token_mode": "soft"},
    }
    towards_teacher: ClassVar = {"token_loss": "full"}

    skip_percentile: float = 20.0
    filter_scope: str = "batch"
    alpha: float = 1.0
    beta: float = 1.0
    entropy_max_scope: str = "rollout"
    weight_norm_scope: str = "rollout"
    aggregation: str = "token_mean"
    token_loss: str = "sampled"
    clip_ratio: float = 0.2
    rollout_mode: str = "hard"
    token_mode: str = "soft"
    hard_token_fraction: float = 0.5

    def __post_init__(self) -> None:
        skip, unsure = self.skip_percentile, "negative values would favour unsure teachers" if self.alpha < 0 else ""
        within("skip_percentile", skip, "in [0, 100)", 0 <= skip < 100, "use 0 to keep every rollout")
        choice("filter_scope", self.filter_scope, ("batch", "group", "rollout"))
        within("alpha", self.alpha, "in [0, 10]", 0 <= self.alpha <= 10, unsure)
        within("beta", self.beta, "in [0, 10]", 0 <= self.beta <= 10)
        choice("entropy_max_scope", self.entropy_max_scope, ("rollout", "batch"))
        choice("weight_norm_scope", self.weight_norm_scope, ("rollout", "batch"))
        choice("aggregation", self.aggregation, ("token_mean", "sequence_mean"))
        choice("token_loss", self.token_loss, ("sampled", "full"))
        within("clip_ratio", self.clip_ratio, "in (0, 1)", 0 < self.clip_ratio < 1)
        choice("rollout_mode", self.rollout_mode, ("hard", "soft"))
        choice("token_mode", self.token_mode, ("soft", "hard"))
        within("hard_token_fraction", self.hard_token_fraction, "in (0, 1]", 0 < self.hard_token_fraction <= 1)

    def check(self, facts: Facts) -> None:
        if self.filter_scope == "group" and facts.per_prompt < 2:
            raise ValueError(
                "method.filter_scope=group compares rollouts of one prompt: "
                f"set rollout.per_prompt to 2 or more, got {facts.per_prompt}"
            )
        if self.token_loss == "sampled" and not facts.behavior.plain:
            raise ValueError(
                "method.token_loss=sampled needs tokens drawn from the student itself (temperature 1, no filter), "
                f"got {facts.behavior}; use token_loss=full or change rollout"
            )

    def needs(self) -> Needs:
        return Needs(
            batch=frozenset({LOGP_TEACHER, ENTROPY_TEACHER, ENTROPY_STUDENT}),
            tokens=frozenset({REVERSE_KL} if self.token_loss == "full" else {LOGP_STUDENT, LOGP_OLD, LOGP_TEACHER}),
        )

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        keep_B, token_BT = self.keep(batch), self.token_weights(batch)
        counted_BT = batch.rollouts.mask_BT & (keep_B > 0)[:, None]
        weight_BT = torch.where(counted_BT, keep_B[:, None] * token_BT, 0.0)
        if self.aggregation == "sequence_mean":
            count_B = (weight_BT != 0).sum(1).double()
            weight_BT = weight_BT * (count_B.sum() / ((count_B > 0).sum() * count_B).clamp(min=1))[:, None]
        return {TRAINED: weight_BT}

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        if self.token_loss == "full":
            return {TRAINED: tokens[REVERSE_KL]}
        logp_N = tokens[LOGP_STUDENT]
        gap_N = logp_N.detach() - tokens[LOGP_TEACHER]
        ratio_N = (logp_N - tokens[LOGP_OLD].detach()).clamp(-20, 20).exp()
        clipped_N = ratio_N.clamp(1 - self.clip_ratio, 1 + self.clip_ratio)
        return {TRAINED: torch.maximum(gap_N * ratio_N, gap_N * clipped_N)}

    def keep(self, batch: Batch) -> Tensor:
        """1 or 0 per rollout, or its soft weight by rank; 0 for a rollout without a score."""
        score_B, scope_B = self.scores(batch)
        if self.rollout_mode == "hard":
            return (score_B >= thresholds(score_B, scope_B, self.skip_percentile)).double()
        rival_BB = (scope_B[:, None] == scope_B) & ~score_B.isnan()
        below_B = (rival_BB & (score_B[:, None] > score_B)).sum(1)
        tied_B = (rival_BB & (score_B[:, None] == score_B)).sum(1)
        rank_B = below_B + (tied_B - 1) / 2
        return (2 * (rank_B.double() + 1) / (rival_BB.sum(1) + 1)).masked_fill(score_B.isnan(), 0.0)

    def scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(b), and the number of the scope it is compared in. NaN, so that it takes no part, for a rollout without
        tokens or with one that the teacher rules out."""
        rollouts = batch.rollouts
        scope_B = {
            "batch": torch.zeros_like(rollouts.group_B),
            "group": rollouts.group_B,
            "rollout": torch.arange(len(rollouts), device=rollouts.group_B.device),
        }[self.filter_scope]
        score_B = rollout_mean(batch[LOGP_TEACHER], rollouts.mask_BT)
        return score_B.masked_fill(~score_B.isfinite(), torch.nan), scope_B

    def token_weights(self, batch: Batch) -> Tensor:
        """w per token, without the filter; anything outside the mask."""
        mask_BT = batch.rollouts.mask_BT
        confidence_BT, confusion_BT = self.certainties(batch)
        raw_BT = (1 + self.alpha * confidence_BT) * (1 + self.beta * confusion_BT)
        if self.token_mode == "hard":
            count_B = (self.hard_token_fraction * mask_BT.sum(1).double()).round(decimals=9).ceil()
            return (places(raw_BT.masked_fill(~mask_BT, -math.inf)) < count_B[:, None]).double()
        if self.weight_norm_scope == "batch":  # the mean includes what the filter drops
            return raw_BT / raw_BT[mask_BT].mean()
        return raw_BT / rollout_mean(raw_BT, mask_BT)[:, None]

    def certainties(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(d): the teacher's confidence and the student's confusion."""
        mask_BT = batch.rollouts.mask_BT

        def share_of_largest(entropy_BT: Tensor) -> Tensor:
            entropy_BT = entropy_BT.double()
            largest_B1 = entropy_BT.masked_fill(~mask_BT, 0.0).amax(1, keepdim=True)
            largest_B1 = largest_B1.amax() if self.entropy_max_scope == "batch" else largest_B1
            return (entropy_BT / largest_B1.clamp(min=1e-6)).clamp(0, 1)

        return 1 - share_of_largest(batch[ENTROPY_TEACHER]), share_of_largest(batch[ENTROPY_STUDENT])

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        rollouts, mask_BT = batch.rollouts, batch.rollouts.mask_BT
        kept_BT = weights[TRAINED] != 0
        weight_N = weights[TRAINED][kept_BT].double()
        score_B, scope_B = self.scores(batch)
        scored_B = ~score_B.isnan()
        sides = {"kept": kept_BT.any(1), "dropped": scored_B & ~kept_BT.any(1)}
        confidence_BT, confusion_BT = self.certainties(batch)
        kl_BT = batch.signals.get(REVERSE_KL, batch[LOGP_TEACHER] * torch.nan)
        pull_N = (weight_N * (rollouts.logp_BT - batch[LOGP_TEACHER])[kept_BT]).abs().sort(descending=True).values
        hard = self.rollout_mode == "hard"  # a soft filter has no threshold
        values: dict[str, float | Tensor] = {
            "kept_fraction": mean(sides["kept"][scored_B]),
            "kept_tokens_fraction": mean(kept_BT[mask_BT]),
            "score_mean_nats": mean(score_B[scored_B]),
            "score_threshold_nats": mean(thresholds(score_B, scope_B, self.skip_percentile)[scored_B & hard]),
            "weight_mean_ratio": mean(weight_N),
            **{f"weight_{name}_ratio": quantile(weight_N, percent).item() for name, percent in PERCENTILES.items()},
            "teacher_confidence_mean_fraction": mean(confidence_BT[kept_BT]),
            "student_confusion_mean_fraction": mean(confusion_BT[kept_BT]),
            "kl_kept_mean_nats": mean(kl_BT[kept_BT]),
            **{f"{side}_length_mean_tokens": mean(rollouts.length_B[side_B]) for side, side_B in sides.items()},
            **{f"{side}_reward_mean_fraction": mean(rollouts.reward_B[side_B]) for side, side_B in sides.items()},
            "score_correct_auc_fraction": auc(score_B[scored_B], rollouts.reward_B[scored_B]),
            "weighted_gap_top5pct_share_fraction": (pull_N[: math.ceil(len(pull_N) / 20)].sum() / pull_N.sum()).item(),
            "score_nats": score_B[scored_B],
            "weight_ratio": weight_N,
        }
        return {f"fire_opd/{name}": value for name, value in values.items()}

    def conventions(self) -> dict[str, str]:
        filters = self.rollout_mode == "hard" and self.skip_percentile > 0
        kept = "kept_" if filters or self.token_mode == "hard" else ""
        return {
            "divergence": "reverse_kl",
            "estimator": "full_vocabulary" if self.token_loss == "full" else "k1_ratio",
            "denominator": kept + ("tokens" if self.aggregation == "token_mean" else "rollouts"),
        }


PERCENTILES = {"min": 0.0, "p5": 5.0, "p50": 50.0, "p95": 95.0, "max": 100.0}


def thresholds(score_B: Tensor, scope_B: Tensor, percent: float) -> Tensor:
    """tau of (c) for every scored rollout, over the scored rollouts of its scope; NaN for the others."""
    tau_B = torch.full_like(score_B, torch.nan)
    for scope in scope_B.unique():
        inside_B = (scope_B == scope) & ~score_B.isnan()
        tau_B[inside_B] = quantile(score_B[inside_B], percent)
    return tau_B


def places(value_BT: Tensor) -> Tensor:
    """Place of every token in its row, 0 for the largest value, earlier positions first on ties."""
    return value_BT.sort(dim=1, descending=True, stable=True).indices.argsort(1)


def auc(score_N: Tensor, reward_N: Tensor) -> float:
    """How often a correct rollout outscores a wrong one, ties counting half; NaN when there is no such pair."""
    lead_CW = score_N[reward_N > 0][:, None] - score_N[reward_N == 0]
    return mean((lead_CW.sign() + 1) / 2)


def mean(value_N: Tensor) -> float:
    return value_N.double().mean().item()
