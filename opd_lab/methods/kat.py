"""KAT, rollouts end where a low divergence begins to persist: `method=kat`.

arXiv 2606.09471, the KL Agreement Trap, its body known to us second-hand. Once a student has drifted onto a prefix from
which it cannot recover, the teacher follows that prefix token by token: reverse KL is low although there is nothing to
learn. A single low value cannot tell this from healthy agreement, one that persists can. So the loss stays reverse KL,
and a rollout is cut where the first persistent stretch of low values begins, online or post hoc:

    d_t  = KL(p_t || q_t), on k tokens and one class for the rest (support full: all tokens)
    z_t  = mean(d_{t-W+1} .. d_t)
    s    = quantile_{1-eta} of the buffer, fixed during a step; the buffer holds min_t z_t of the latest rollouts
    trap : L windows in a row, `window_stride` apart, with z_t < s; it is confirmed at the last token of the last one
    kept = tokens before the first of these windows; all of them where there is no trap
    objective = sum_{t < kept} d_t / #kept tokens of the step | / #rollouts (denominator rollouts: the literal sum)

Nothing is cut before `warmup_steps` steps have been made and `min_buffer_rollouts` minima are stored. The threshold is
relative: about 1 - eta of the rollouts are cut whether or not they hold a trap, so compare with `method=matched_cut`.
Detector and loss see the same d, at temperature 1 and unfiltered whatever the sampler does; where the engine has
decided, the cut is the engine's. A minimum is taken over what was scanned, up to the trigger, so that both modes fill
the buffer alike. The scan is in kat_scan.py.

Ours, where the paper's text is not known to us: exempt_tokens and its rule (windows may not touch the zone | the
decision may not fall into it), whose top k, stride 1, cut rollouts feed the buffer (`uncut` makes the threshold climb),
the quantile read as 1 - eta (eta 0.7 is the other reading), the denominator.
`keep` (post hoc) also trains the agreement, to the end of the unbroken run of low windows, or what comes after it.

Neutral: threshold fixed at 0 with support full and denominator tokens; anything, before the first cut.
Differs: unknown; no released code was seen.

Metrics, all kat/: threshold_nats, buffer_rollouts, active_fraction (0 or 1), cut_fraction (of rollouts),
generated_mean_tokens, kept_mean_tokens, kept_fraction (of tokens), cut_mismatch_fraction (the rollouts that the scan
would cut elsewhere given the update's own d), segment_fraction and onset_median_tokens (rollouts with a trap if no
token were exempt, and where it begins), cut_after_slip_fraction (of cuts: the rollout had gone wrong before; only where
the data can grade steps, as the lab's: a trap, or harmless agreement?), kl_{pre,agreement,post}_mean_nats (tokens of
cut rollouts before the trap, in it, after it); histograms cut_position_tokens, lowest_nats, smoothed_nats. Table
rollout_lengths, every rollout of every step: uid, kept, generated. `rollout/*` speaks of kept tokens, its reward of
uncut rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.base import TRAINED, Ask, Method, choice, quantile, within
from opd_lab.methods.kat_scan import Trap, lowest, phases, report, scan, smoothed
from opd_lab.types import REVERSE_KL, Batch, Behavior, Facts, Needs, Signal, State, StopRule, Tokens, topk_reverse_kl


@dataclass(frozen=True, kw_only=True)
class KAT(Method):
    paper = "https://arxiv.org/abs/2606.09471"
    neutral: ClassVar = {"threshold": "fixed", "threshold_nats": 0.0, "support": "full", "denominator": "tokens"}

    window: int = 64
    consecutive: int = 4
    window_stride: int = 1
    eta: float = 0.3
    exempt_tokens: int = 128
    exempt_rule: str = "kept"
    buffer_rollouts: int = 4096
    min_buffer_rollouts: int = 512
    warmup_steps: int = 50
    buffer_source: str = "all"
    threshold: str = "quantile"
    threshold_nats: float = 0.0
    stop: str = "online"
    support: str = "student_top"
    top_k: int = 64
    keep: str = "pre"
    denominator: str = "tokens"

    def __post_init__(self) -> None:
        within("window", self.window, "an integer >= 1 (tokens)", self.window >= 1)
        within("consecutive", self.consecutive, ">= 1 (windows)", self.consecutive >= 1)
        stride = f"in [1, method.window={self.window}]"
        within("window_stride", self.window_stride, stride, 1 <= self.window_stride <= self.window)
        no_cut = "smaller cuts more; for no cut set method.threshold=fixed method.threshold_nats=0"
        within("eta", self.eta, "in (0, 1]", 0 < self.eta <= 1, no_cut)
        for name, least in (("exempt_tokens", 0), ("buffer_rollouts", 1), ("min_buffer_rollouts", 1)):
            within(name, getattr(self, name), f">= {least}", getattr(self, name) >= least)
        if self.min_buffer_rollouts > self.buffer_rollouts:
            raise ValueError(
                f"method.min_buffer_rollouts must be <= method.buffer_rollouts={self.buffer_rollouts}, "
                f"got {self.min_buffer_rollouts}: the cut would never start"
            )
        within("warmup_steps", self.warmup_steps, ">= 0", self.warmup_steps >= 0)
        within("threshold_nats", self.threshold_nats, ">= 0", self.threshold_nats >= 0)
        choice("exempt_rule", self.exempt_rule, ("kept", "decision"))
        choice("buffer_source", self.buffer_source, ("all", "uncut"))
        choice("threshold", self.threshold, ("quantile", "fixed"))
        choice("stop", self.stop, ("online", "posthoc"))
        choice("support", self.support, ("student_top", "teacher_top", "full"))
        choice("keep", self.keep, ("pre", "pre_agreement", "pre_post"))
        choice("denominator", self.denominator, ("tokens", "rollouts"))
        if self.keep != "pre" and self.stop == "online":
            raise ValueError(f"method.keep={self.keep} needs method.stop=posthoc")

    def check(self, facts: Facts) -> None:
        if self.top_k < 1:
            raise ValueError(
                f"method.top_k must be in [1, {facts.vocabulary}] for this vocabulary, got {self.top_k}; "
                "use method.support=full"
            )
        if self.shortest > facts.max_tokens:
            raise ValueError(
                f"method.window={self.window} and method.exempt_tokens={self.exempt_tokens} need at least "
                f"{self.shortest} response tokens to cut anything, the limit is {facts.max_tokens}: this run would be "
                "plain OPD; use method=kat_lab or a longer limit"
            )
        if self.warmup_steps >= facts.steps:
            raise ValueError(
                f"method.warmup_steps={self.warmup_steps} must be below steps={facts.steps}: "
                "this run would be plain OPD"
            )

    @property
    def shortest(self) -> int:
        """Tokens of the shortest rollout that can be cut."""
        streak = self.window + (self.consecutive - 1) * self.window_stride
        if self.exempt_rule == "kept":
            return self.exempt_tokens + streak
        late = max(0, self.exempt_tokens + 1 - streak)
        return streak + -(-late // self.window_stride) * self.window_stride

    def bind(self, facts: Facts) -> Self:
        return replace(self, top_k=min(self.top_k, facts.vocabulary))

    def asks(self) -> Mapping[str, str]:
        return {"stop": "method.stop=posthoc (same gradient, no saving)"} if self.stop == "online" else {}

    def needs(self) -> Needs:
        d_t = frozenset({self.divergence})
        return Needs(batch=d_t if self.stop == "posthoc" else frozenset(), tokens=d_t)

    @property
    def divergence(self) -> Signal:
        """d."""
        return REVERSE_KL if self.support == "full" else topk_reverse_kl(self.top_k, self.support.removesuffix("_top"))

    def score(self, logp_RV: Tensor, logq_RV: Tensor) -> Tensor:
        """d as the rollout engine sees it; no rounding below 0, which would be below a threshold of 0."""
        if self.support == "full":
            return d.reverse_kl(logp_RV, logq_RV).clamp(min=0)
        on = d.topk(logp_RV, logq_RV, self.top_k, self.support.removesuffix("_top"))
        return d.topk_kl(on, direction="reverse", tail="bucket").clamp(min=0)

    def behavior(self, plain: Behavior, step: int, state: State) -> Behavior:
        if self.stop == "posthoc":
            return plain
        s = self.threshold_of(step, state)
        return replace(plain, stop=StopRule(self.score, lambda d_RT: self.trap(d_RT, s).onset_B))

    def active(self, step: int, state: State) -> bool:
        enough = self.threshold == "fixed" or len(state["lowest"]) >= self.min_buffer_rollouts
        return step >= self.warmup_steps and enough

    def threshold_of(self, step: int, state: State) -> float:
        """s; NaN, which nothing is below, until rollouts may be cut."""
        if not self.active(step, state):
            return math.nan
        fixed = self.threshold == "fixed"
        return self.threshold_nats if fixed else float(quantile(state["lowest"], 100 * (1 - self.eta)))

    def trap(self, d_BT: Tensor, threshold: float, **changed: Any) -> Trap:
        rule: dict[str, Any] = {
            "window": self.window,
            "consecutive": self.consecutive,
            "stride": self.window_stride,
            "exempt": self.exempt_tokens,
            "exempt_rule": self.exempt_rule,
        }
        return scan(d_BT, threshold, **rule | changed)

    def seen(self, batch: Batch) -> Tensor:
        """The detector's d, of all tokens that were generated."""
        if self.stop == "posthoc":
            return batch[self.divergence].clamp(min=0)
        nothing_BT = torch.full_like(batch.rollouts.logp_BT, torch.nan)  # plain rollouts, as a check makes them
        return batch.rollouts.extra.get("stop_score", nothing_BT)

    def consult(self, ask: Ask, batch: Batch) -> dict[str, Tensor]:
        rollouts, s = batch.rollouts, self.threshold_of(batch.step, batch.state)
        d_BT = self.seen(batch)
        trap, whole_B = self.trap(d_BT, s), rollouts.generated_B
        none_B = trap.trigger_B < 0
        return {
            "kept": rollouts.length_B if self.stop == "online" else torch.where(none_B, whole_B, trap.onset_B),
            "end": torch.where(none_B, whole_B, trap.end_B),
            "lowest": lowest(d_BT, self.window, trap.trigger_B),
            "threshold": torch.full_like(whole_B, s, dtype=torch.float64),
        }

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        mask_BT = batch.rollouts.mask_BT
        part = phases(batch)
        kept_BT = {"pre": part.pre_BT, "pre_agreement": ~part.post_BT, "pre_post": ~part.agreement_BT}[self.keep]
        weight_BT = (kept_BT & mask_BT).double()
        if self.denominator == "rollouts":
            weight_BT = weight_BT * weight_BT.sum() / len(mask_BT)  # the platform divides by the sum, which cancels
        return {TRAINED: weight_BT}

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        return {TRAINED: tokens[self.divergence]}

    def init_state(self) -> State:
        return {"lowest": torch.zeros(0, dtype=torch.float64)}

    def update(self, state: State, batch: Batch) -> State:
        """The latest minima, in the order of the data."""
        lowest_B, kept_B = batch.consulted["lowest"], batch.consulted["kept"]
        if self.buffer_source == "uncut":
            lowest_B = lowest_B.masked_fill(kept_B < batch.rollouts.generated_B, torch.nan)
        lowest_B = lowest_B[batch.rollouts.uid_B.argsort()].cpu()
        return {"lowest": torch.cat([state["lowest"], lowest_B[~lowest_B.isnan()]])[-self.buffer_rollouts :]}

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        d_BT, s = self.seen(batch), float(batch.consulted["threshold"].max())
        updated_BT = batch.losses.get(TRAINED, d_BT)
        again = self.trap(torch.where(updated_BT.isnan(), d_BT, updated_BT), s)
        values = report(batch, d_BT, again, self.trap(d_BT, s, exempt=0, exempt_rule="kept"))
        values["smoothed_nats"] = smoothed(d_BT, self.window).flatten()
        values |= {"threshold_nats": s, "buffer_rollouts": float(len(batch.state["lowest"]))}
        values["active_fraction"] = float(not math.isnan(s))
        return {f"kat/{name}": value for name, value in values.items()}

    def tables(self, batch: Batch) -> dict[str, list[dict[str, Any]]]:
        rollouts = batch.rollouts
        columns = (rollouts.uid_B, batch.consulted["kept"], rollouts.generated_B)
        names = ("uid", "kept", "generated")
        return {"rollout_lengths": [dict(zip(names, row)) for row in zip(*(x.tolist() for x in columns))]}

    def conventions(self) -> dict[str, str]:
        said = super().conventions() | {
            "denominator": self.denominator if self.denominator == "rollouts" else "kept_tokens"
        }
        if self.support != "full":
            said |= {"estimator": "topk", "topk_k": str(self.top_k), "topk_tail": "bucket"}
            said["topk_support"] = self.support.removesuffix("_top")
        return said | {"stop": self.stop, "keep": self.keep}
