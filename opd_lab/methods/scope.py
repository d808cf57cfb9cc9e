"""SCOPE, two paths routed by correctness: `method=scope`.

arXiv 2604.10688 (equation numbers of v2). Rollouts are graded. Wrong ones are distilled from the teacher, correct ones
reinforce themselves and never see it. On either path a rollout is weighed by a softmax over the length-normalised NLL
of the rollouts of the same prompt and path: up with the student's perplexity where correct, down with the teacher's
where wrong.

    rho_t  = pi(y_t) / pi_old(y_t)                                                  (1)
    L_MLE  = -sum_t rho_t                                   correct                 (2)
    L_OPD  = sum_t rho_t A_t,  A_t = stop(log pi(y_t) - log pi_T(y_t))   wrong      (3)
    w_stu  = softmax(+nll_S / tau) over the correct rollouts of the prompt          (4)
    w_tea  = softmax(-nll_T / tau) over its wrong rollouts                          (5)
    J      = mean over prompts of  sum w_stu L_MLE + sum w_tea L_OPD                (6)
    nll(y) = -1/|y| sum_t log pi(y_t),  PPL = exp(nll), which is never computed for a weight

Ours: correct_coef, route, wrong_loss full, denominators other than prompts and official. wrong_loss topk is reverse KL
renormalised on the teacher's likeliest tokens, a switch that the released code has and leaves off.
A wrong rollout that the teacher did not score, or rules out, leaves its group (a score of 0 would win the largest
weight there); so does a rollout without a verdict.

Neutral: route all_wrong, truncated wrong, wrong_loss full, teacher_weight uniform, weight_scale mean_one, denominator
         path_tokens.
Not zero at teacher := student: the correct path raises its own likelihood.
Code: github.com/machine981/SCOPE
Differs: the released scripts weigh correct rollouts *down* with perplexity (`scope_official_code`, student_weight
         low_ppl), against their own documentation; the repository's default also reverses the teacher's direction.
Differs: they scale weights to mean 1, take -w log pi over the correct tokens and the wrong path over all tokens
         (weight_scale mean_one, correct_loss nll, denominator official), so token counts decide between the paths.
Differs: they average within micro-batches, not over the step, clip the ratio (clip, dual_clip), and cannot run
         unmodified: the loss asks for an argument that its caller does not pass.
Differs: they take student log-probs at the sampling temperature and the teacher's at 1 (logprob_temperature rollout):
         then (3) is unbiased for KL(pi_T || teacher), T the temperature; with `unit` tempered sampling biases it a
         little. The exact losses full and topk stay at 1.

Metrics, all scope/: {correct_rollout,all_correct_prompt,mixed_prompt,all_wrong_prompt,singleton_group,truncated,
teacher_missing}_fraction; {correct,wrong}_{group_mean_rollouts,ess_fraction,weight_max}; {correct,wrong}_loss, each
path's part of J; ppl_student_correct_mean, ppl_teacher_wrong_mean, correct_nll_mean_nats, gap_wrong_mean_nats,
gap_wrong_square_mean_nats2, length_ppl_teacher_correlation (wrong rollouts); clipped_fraction (of wrong tokens, in the
updates after the first: in the first nothing can be clipped); histograms nll_student_correct_nats,
nll_teacher_wrong_nats, {correct,wrong}_weight, gap_wrong_q{1,2,3,4}_nats (by quarter of teacher perplexity). (2) has
the constant value -1 per token: read correct_nll_mean_nats instead of correct_loss, and *_ess_fraction before crediting
the weights. Table scope_extremes, every step: the rollouts of either path with the highest perplexity, with weight and
text.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.base import Ask, Method, choice, rollout_mean, within
from opd_lab.methods.scope_report import Path, report, shares, show_extremes
from opd_lab.types import (
    LOGP_TEACHER,
    REVERSE_KL,
    Batch,
    Facts,
    Needs,
    Signal,
    Tokens,
    logp_old,
    logp_student,
    topk,
)

DIRECTION = {"high_ppl": 1.0, "low_ppl": -1.0, "uniform": 0.0}


@dataclass(frozen=True, kw_only=True)
class SCOPE(Method):
    paper = "https://arxiv.org/abs/2604.10688"
    gradient_norms: ClassVar = {"correct": "scope/correct_gradient_norm", "wrong": "scope/wrong_gradient_norm"}
    neutral: ClassVar = {
        **{"route": "all_wrong", "truncated": "wrong", "wrong_loss": "full", "teacher_weight": "uniform"},
        **{"weight_scale": "mean_one", "denominator": "path_tokens"},
    }
    towards_teacher: ClassVar = {"route": "all_wrong", "wrong_loss": "full"}
    not_zero_at_teacher = "the correct path raises its own likelihood, whatever the teacher says"

    tau: float = 1.0
    student_weight: str = "high_ppl"
    teacher_weight: str = "low_ppl"
    weight_scale: str = "sum_one"
    denominator: str = "prompts"
    correct_loss: str = "ratio"
    wrong_loss: str = "sampled"
    topk: int = 16
    correct_coef: float = 1.0
    logprob_temperature: str | float = "unit"  # a number once bound
    clip: float | None = None
    dual_clip: float = 3.0
    route: str = "verifier"
    truncated: str = "wrong"

    def __post_init__(self) -> None:
        uniform = "for uniform weights use student_weight=uniform teacher_weight=uniform"
        within("tau", self.tau, "> 0", self.tau > 0, uniform)
        choice("student_weight", self.student_weight, ("high_ppl", "low_ppl", "uniform"))
        choice("teacher_weight", self.teacher_weight, ("low_ppl", "high_ppl", "uniform"))
        choice("weight_scale", self.weight_scale, ("sum_one", "mean_one"))
        choice("denominator", self.denominator, ("prompts", "rollout_mean", "path_tokens", "all_tokens", "official"))
        choice("correct_loss", self.correct_loss, ("ratio", "nll", "none"))
        choice("wrong_loss", self.wrong_loss, ("sampled", "full", "topk", "none"))
        within("topk", self.topk, "in [1, vocabulary]", self.topk >= 1)
        within("correct_coef", self.correct_coef, ">= 0", self.correct_coef >= 0)
        if isinstance(self.logprob_temperature, str):
            choice("logprob_temperature", self.logprob_temperature, ("unit", "rollout"))
        if self.clip is not None:
            within("clip", self.clip, "in (0, 1) or null", 0 < self.clip < 1)
        within("dual_clip", self.dual_clip, "> 1", self.dual_clip > 1)
        choice("route", self.route, ("verifier", "all_wrong"))
        choice("truncated", self.truncated, ("wrong", "drop"))
        if self.wrong_loss == "none" and (self.correct_loss == "none" or self.route == "all_wrong"):
            raise ValueError("method.scope has nothing to train: set correct_loss or wrong_loss")

    def check(self, facts: Facts) -> None:
        if self.route == "verifier" and not facts.graded:
            raise ValueError(f"method=scope needs graded prompts (reward 0 or 1); data={facts.data} has none")
        choice("logprob_temperature", str(self.logprob_temperature), ("unit", "rollout"))
        if facts.per_prompt == 1:
            warnings.warn(
                "method=scope weighs the rollouts of one prompt against each other: with rollout.per_prompt=1 every "
                "weight is 1; the paper uses 8",
                stacklevel=2,
            )

    def bind(self, facts: Facts) -> Self:
        same = self.logprob_temperature != "rollout"
        return self if same else replace(self, logprob_temperature=float(facts.behavior.temperature))

    @property
    def temperature(self) -> float:
        """Of the student's log-probs; 1 until `bind` has said what the rollouts' is."""
        return 1.0 if isinstance(self.logprob_temperature, str) else self.logprob_temperature

    @property
    def logp(self) -> Signal:
        """The student's log-prob of the sampled token."""
        return logp_student(self.temperature)

    @property
    def trains(self) -> dict[str, bool]:
        return {"correct": self.correct_loss != "none", "wrong": self.wrong_loss != "none"}

    def needs(self) -> Needs:
        wrong = {"sampled": LOGP_TEACHER, "full": REVERSE_KL, "topk": topk(self.topk, "teacher")}.get(self.wrong_loss)
        own = {self.logp, logp_old(self.temperature)}
        ratio = own if self.correct_loss != "none" or self.wrong_loss == "sampled" else set()
        return Needs(
            batch=frozenset({self.logp} | ({LOGP_TEACHER} if self.trains["wrong"] else set())),
            tokens=frozenset(ratio | ({wrong} if wrong else set())),
        )

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        mask_BT, length_B = batch.rollouts.mask_BT, batch.rollouts.length_B
        paths = self.paths(batch)
        size = {term: length_B[path.member_B].sum() for term, path in paths.items()}
        size["all"] = size["correct"] + size["wrong"]
        prompts = len(batch.rollouts.group_B.unique())
        out = {}
        for term, path in paths.items():
            counted = length_B[path.weight_B != 0].sum()  # the platform divides by these, which cancels here
            divisor = {
                "prompts": prompts,  # (6)
                "rollout_mean": prompts * length_B.clamp(min=1),
                "path_tokens": size[term].clamp(min=1),
                "all_tokens": size["all"].clamp(min=1),
                "official": size["correct" if term == "correct" else "all"].clamp(min=1),
            }[self.denominator]
            coef = self.correct_coef if term == "correct" else 1.0
            out[term] = (coef * path.weight_B * counted / divisor)[:, None] * mask_BT
        return {term: weight_BT for term, weight_BT in out.items() if self.trains[term]}

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        out = {}
        if self.correct_loss == "ratio":
            out["correct"] = -ratio(tokens, self.temperature)  # (2)
        if self.correct_loss == "nll":
            out["correct"] = -tokens[self.logp]
        if self.wrong_loss == "sampled":
            out["wrong"] = self.importance(ratio(tokens, self.temperature), self.gap(tokens))  # (3)
        if self.wrong_loss == "full":
            out["wrong"] = tokens[REVERSE_KL]
        if self.wrong_loss == "topk":
            out["wrong"] = d.topk_kl(tokens[topk(self.topk, "teacher")], direction="reverse", tail="renormalise")
        return out

    def gap(self, tokens: Tokens) -> Tensor:
        """A; 0 where the teacher says nothing: of weight 0, but 0 * NaN would reach the other path's gradient."""
        gap_N = tokens[self.logp].detach() - tokens[LOGP_TEACHER]
        return gap_N.masked_fill(~gap_N.isfinite(), 0.0)

    def importance(self, rho_N: Tensor, gap_N: Tensor) -> Tensor:
        """rho A, or its dual-clipped form."""
        if self.clip is None:
            return rho_N * gap_N
        loss_N = torch.maximum(rho_N * gap_N, rho_N.clamp(1 - self.clip, 1 + self.clip) * gap_N)
        return torch.where(gap_N > 0, torch.minimum(loss_N, self.dual_clip * gap_N), loss_N)

    def paths(self, batch: Batch) -> dict[str, Path]:
        """(4) and (5). A rollout without tokens, verdict or score is on no path."""
        correct_B, wrong_B = self.routed(batch)
        mask_BT = batch.rollouts.mask_BT
        nll_S_B = -rollout_mean(batch[self.logp], mask_BT)
        nll_T_B = torch.full_like(nll_S_B, torch.nan)
        if self.trains["wrong"]:
            nll_T_B = -rollout_mean(batch[LOGP_TEACHER], mask_BT)
            wrong_B = wrong_B & nll_T_B.isfinite()
        return {
            "correct": Path(correct_B, nll_S_B, self.compete(batch, correct_B, nll_S_B, self.student_weight)),
            "wrong": Path(wrong_B, nll_T_B, self.compete(batch, wrong_B, nll_T_B, self.teacher_weight)),
        }

    def routed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The correct and the wrong rollouts, before anyone asks whether they could be scored."""
        rollouts = batch.rollouts
        present_B = (rollouts.length_B > 0) & (rollouts.stopped_B | (self.truncated == "wrong"))
        if self.route == "all_wrong":
            return torch.zeros_like(present_B), present_B
        reward_B = rollouts.reward_B
        partial_B = (reward_B != 0) & (reward_B != 1) & ~reward_B.isnan()
        if partial_B.any():
            raise ValueError(f"method=scope needs reward 0 or 1, got {reward_B[partial_B][0]:g}; use another grader")
        return present_B & (reward_B > 0), present_B & (reward_B == 0)

    def compete(self, batch: Batch, member_B: Tensor, nll_B: Tensor, direction: str) -> Tensor:
        """The softmax over each prompt's members. What fp32 cannot hold is 0, so that its tokens are not counted."""
        weight_B = torch.zeros_like(nll_B)
        for group in batch.rollouts.group_B[member_B].unique():
            inside_B = member_B & (batch.rollouts.group_B == group)
            share_B = (DIRECTION[direction] * nll_B[inside_B] / self.tau).softmax(0)
            weight_B[inside_B] = share_B * (len(share_B) if self.weight_scale == "mean_one" else 1)
        return weight_B.masked_fill(weight_B < torch.finfo(torch.float32).tiny, 0.0)

    def consult(self, ask: Ask, batch: Batch) -> dict[str, Tensor]:
        paths = self.paths(batch)
        show_extremes(ask, batch, paths)
        return {"wrong": paths["wrong"].member_B}

    def tally(self, tokens: Tokens) -> dict[str, Tensor]:
        """Tokens of wrong rollouts, and those whose loss the clip holds."""
        wrong_N = tokens.consulted["wrong"]
        if self.clip is None or self.wrong_loss != "sampled":
            return {}
        rho_N, gap_N = ratio(tokens, self.temperature), self.gap(tokens)
        return {"wrong": wrong_N.sum(), "clipped": (wrong_N & (self.importance(rho_N, gap_N) != rho_N * gap_N)).sum()}

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        paths, logp_BT = self.paths(batch), batch[self.logp]
        missing_B = self.routed(batch)[1] & ~paths["wrong"].member_B
        logq_BT = batch.signals.get(LOGP_TEACHER, torch.full_like(logp_BT, torch.nan))
        values = report(batch, paths, missing_B, logp_BT, logq_BT) | shares(batch, weights)
        return {f"scope/{name}": value for name, value in values.items()}

    def tables(self, batch: Batch) -> dict[str, list[dict[str, Any]]]:
        return {"scope_extremes": batch.shown}

    def conventions(self) -> dict[str, str]:
        alike = self.route == "all_wrong" and self.denominator in ("path_tokens", "all_tokens", "official")
        forms = {"full": "full_vocabulary", "topk": "topk_teacher_renormalise"}
        correct = {"likelihood": self.trains["correct"] and self.route == "verifier"}
        tempered = {} if self.temperature == 1 else {"loss_temperature": f"{self.temperature:g}"}
        return (
            tempered
            | ({"topk_k": str(self.topk)} if self.wrong_loss == "topk" else {})
            | {
                "divergence": "+".join(k for k, v in {"reverse_kl": self.trains["wrong"], **correct}.items() if v),
                "estimator": forms.get(self.wrong_loss, "k1_ratio"),
                "denominator": "tokens" if alike else self.denominator,
            }
        )


def ratio(tokens: Tokens, temperature: float) -> Tensor:
    """(1)"""
    return (tokens[logp_student(temperature)] - tokens[logp_old(temperature)].detach()).exp()
