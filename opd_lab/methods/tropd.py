"""TrOPD, reverse KL where the teacher would accept the token, forward KL elsewhere: `method=tropd`.

arXiv 2606.01249. Where the teacher gives a sampled token almost no mass, its log-ratio R is hugely negative and
dominates a policy gradient. So the log-ratio teaches on a random trust region only, the tokens that speculative
decoding would accept; every other token, an outlier, learns the teacher's k likeliest tokens instead. Rollouts begin
with tokens of the teacher, fewer at every step, which are imitated a little.

    P_t = min(1, q(y_t) / p(y_t)),   M_t = 1[u_t < P_t],   u_t a coin of (seed, step, rollout, position)
    trust     M       R = log q(y) - log p(y) as the reward of a policy gradient            y ~ student
    outlier   1 - M   sum over the teacher's top k of q (log q - log p)                     y ~ student
    guidance  beta    log q(y) - log p(y), which is supervised learning                     y ~ teacher
    objective = sum of the three / all trained tokens; denominator regions: the sum of three means
    prefix    of at most L/2 (1 + cos(pi min(step / T, 1))) tokens: teacher_prefix.py

E P = 1 - TV(p, q), so the share of outliers measures the total variation; E_M[M R] >= -1/e. P and R are made of the
same two log-probs, so R >= 0 implies M = 1. The truncated sum is no divergence: it may be negative and is not clamped,
for that kills its gradient, whose L1 norm is at most twice the teacher's mass on its top k.

Other regions: expected puts P in the place of M, threshold has M = 1[R > threshold], everything M = 1, nothing M = 0.
Other lessons for outliers: the forward KL as a cost of the sampled token (fkl_reward), the threshold as R (clip), none
(mask). Teacher := student teaches nothing but what stands in the teacher's own tokens, which is zero on average, and in
a truncated forward KL on all tokens.

Status: experimental. Unknown: whether the outliers' forward KL is back-propagated (fkl, as printed) or a reward of the
        policy gradient (fkl_reward); whether a prefix is as long as allowed or of uniform length; tau of the static
        variants (here the floor of REOPOLD). Region nothing is a control: the paper's run with forward KL on all tokens
        collapsed; as a reward it has an expected gradient of zero.
Neutral: region everything, trust_estimator exact, prefix_schedule none. With trust_estimator sampled it is opd_sampled.
Differs: where the student has no mass on the teacher's top k, the paper has the forward KL vanish; it diverges, with a
         bounded gradient, and nothing is suppressed. Nor is log(p/q) clipped, as the paper's text prints, but R.
Differs: no released code was seen. One update per batch, no ratio, no clipping of it.

Metrics, tropd/. Of student tokens: outlier_fraction, trust_probability_mean_fraction, below_threshold_fraction (in any
region), gap_{trust,outlier}_{mean,p99}_nats, reverse_kl_mean_nats, total_variation_mean_fraction, teacher_topk_mass_
fraction, student_mass_on_teacher_topk_fraction. Of outliers: fkl_outlier_mean_nats, fkl_negative_fraction. Those of
teacher_prefix.py. Histograms: trust_probability_fraction, gap_{trust,outlier}_nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.base import choice, quantile, within
from opd_lab.methods.coins import token_coins
from opd_lab.methods.fire_opd import mean
from opd_lab.methods.policy_gradient import BASES, ON_AVERAGE, log_ratio, own_tokens
from opd_lab.methods.teacher_prefix import TeacherPrefix, students, teachers
from opd_lab.types import (
    LOGP_STUDENT,
    LOGP_TEACHER,
    REVERSE_KL,
    TOTAL_VARIATION,
    Batch,
    Facts,
    Needs,
    Source,
    Tokens,
    topk,
)

OUTLIERS = {"fkl": "forward_kl", "fkl_reward": "reward_forward_kl", "clip": "reward_clip", "mask": "masked"}


@dataclass(frozen=True, kw_only=True)
class TrOPD(TeacherPrefix):
    paper = "https://arxiv.org/abs/2606.01249"
    neutral: ClassVar = {"region": "everything", "trust_estimator": "exact", "prefix_schedule": "none"}
    gradient_norms: ClassVar = {term: f"tropd/gradient_{term}_norm" for term in ("trust", "outlier", "guidance")}

    region: str = "speculative"
    outlier: str = "fkl"
    threshold_nats: float = -1.386294
    k: int = 64
    tail: str = "truncate"
    trust_estimator: str = "sampled"
    guidance_weight: float = 0.001
    denominator: str = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("region", self.region, ("speculative", "expected", "threshold", "everything", "nothing"))
        choice("outlier", self.outlier, tuple(OUTLIERS))
        if (self.region, self.outlier) == ("nothing", "mask"):
            raise ValueError("method.region=nothing with method.outlier=mask trains nothing")
        if not self.threshold_nats < 0:
            what = "it is a floor for log p_teacher - log p_student"
            raise ValueError(f"method.threshold_nats must be < 0, got {self.threshold_nats:g}: {what}")
        within("k", self.k, ">= 1", self.k >= 1)
        choice("tail", self.tail, d.TAILS)
        choice("trust_estimator", self.trust_estimator, ("sampled", "exact"))
        within("guidance_weight", self.guidance_weight, ">= 0", self.guidance_weight >= 0)
        choice("denominator", self.denominator, ("tokens", "regions"))

    def check(self, facts: Facts) -> None:
        if not facts.behavior.unfiltered:
            raise ValueError(
                "the trust probability assumes tokens drawn from the student itself; set rollout.temperature=1, "
                f"rollout.top_p=1, rollout.top_k=0 and rollout.suppressed=[], got {facts.behavior}"
            )
        own_tokens(facts)
        super().check(facts)

    def bind(self, facts: Facts) -> Self:
        return replace(self, k=min(self.k, facts.vocabulary))

    @property
    def status(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "control" if self.region == "nothing" else "experimental"

    @property
    def not_zero_at_teacher(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.first_prefix > 0 and self.guidance_weight > 0:
            return "on tokens that the teacher wrote the gradient is zero on average only"
        truncated = (self.region, self.outlier, self.tail) == ("nothing", "fkl", "truncate")
        return "a truncated forward KL pulls mass onto the teacher's top k even between equals" if truncated else None

    @property
    def not_towards_teacher(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if (self.region, self.outlier) == ("nothing", "fkl_reward"):
            return "a reward that does not depend on the sampled token has an expected gradient of zero"
        return None if (self.region, self.outlier) == ("nothing", "fkl") else ON_AVERAGE

    @property
    def weighs(self) -> bool:
        """M depends on what both models say of the token."""
        return self.region in ("speculative", "expected", "threshold")

    @property
    def covers(self) -> bool:
        """Some token may learn from the teacher's likeliest ones."""
        return self.region != "everything" and self.outlier in ("fkl", "fkl_reward")

    def needs(self) -> Needs:
        batch = BASES["sampled"] if self.weighs else frozenset()
        exact = BASES["full"] if self.trust_estimator == "exact" else frozenset()
        cover = {topk(self.k, "teacher")} if self.covers else set()
        return Needs(batch=batch, tokens=BASES["sampled"] | exact | cover)

    def consult(self, ask: object, batch: Batch) -> dict[str, Tensor]:
        """`trust`, M or what stands in its place, on the student's tokens; `gap` = -R."""
        own_BT = students(batch)
        if not self.weighs:
            return {"trust": own_BT.double() * (self.region == "everything")}
        gap_BT = batch[LOGP_STUDENT] - batch[LOGP_TEACHER]
        accepted_BT = acceptance(gap_BT)
        trust_BT = {
            "speculative": token_coins(batch) < accepted_BT,
            "expected": accepted_BT,
            "threshold": -gap_BT > self.threshold_nats,
        }[self.region]
        return {"trust": trust_BT.double().masked_fill(~own_BT, 0.0), "gap": gap_BT}

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        own_BT, trust_BT = students(batch), batch.consulted["trust"]
        weights = {
            "trust": trust_BT,
            "outlier": (1 - trust_BT) * own_BT * (self.outlier != "mask"),
            "guidance": self.guidance_weight * teachers(batch).double(),
        }
        if self.denominator == "regions":
            return weights
        trained = own_BT.sum() + (weights["guidance"] > 0).sum()
        return {term: weight_BT * (weight_BT > 0).sum() / trained.clamp(min=1) for term, weight_BT in weights.items()}

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        logp_N = tokens[LOGP_STUDENT]
        gap_N = tokens.consulted["gap"].to(logp_N.dtype) if self.weighs else -log_ratio(tokens)
        outlier_N = self.cover(tokens) if self.covers else gap_N.clamp(max=-self.threshold_nats)
        return {
            "trust": tokens[REVERSE_KL] if self.trust_estimator == "exact" else costing(gap_N, logp_N),
            "outlier": outlier_N if self.covers and self.outlier == "fkl" else costing(outlier_N, logp_N),
            "guidance": tokens[LOGP_TEACHER] - logp_N,
        }

    def cover(self, tokens: Tokens) -> Tensor:
        """The forward KL on the teacher's top k."""
        return d.topk_kl(tokens[topk(self.k, "teacher")], direction="forward", tail=self.tail)

    def tally(self, tokens: Tokens) -> dict[str, Tensor]:
        if not self.covers:
            return {}
        on, cover_N = tokens[topk(self.k, "teacher")], self.cover(tokens)
        own_N = (tokens.source_N != Source.TEACHER).double()
        outlier_N = (1 - tokens.consulted["trust"]) * own_N
        sums = {
            "students": own_N,
            "outliers": outlier_N,
            "fkl_outlier_mean_nats": (outlier_N * cover_N).masked_fill(outlier_N == 0, 0.0),
            "fkl_negative_fraction": outlier_N * (cover_N < 0),
            "teacher_topk_mass_fraction": own_N * (1 - on.log_rest_teacher_N1[:, 0].exp()),
            "student_mass_on_teacher_topk_fraction": own_N * (1 - on.log_rest_student_N1[:, 0].exp()),
        }
        return {name: value_N.sum() for name, value_N in sums.items()}

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        own_BT = students(batch)
        trust_N = batch.consulted["trust"][own_BT]
        values: dict[str, float | Tensor] = {"outlier_fraction": 1 - mean(trust_N), **self.prefix_metrics(batch)}
        for name, signal in (("reverse_kl_mean_nats", REVERSE_KL), ("total_variation_mean_fraction", TOTAL_VARIATION)):
            if (value_BT := batch.signals.get(signal)) is not None:
                values[name] = mean(value_BT[own_BT])
        logp_BT, logq_BT = batch.signals.get(LOGP_STUDENT), batch.signals.get(LOGP_TEACHER)
        if logp_BT is not None and logq_BT is not None:
            values |= self.of_gaps((logp_BT - logq_BT)[own_BT].double(), trust_N)
        for name, total in batch.tallies.items():
            if name not in ("students", "outliers"):
                values[name] = float(total / batch.tallies["outliers" if name.startswith("fkl") else "students"])
        return {f"tropd/{name}": value for name, value in values.items()}

    def of_gaps(self, gap_N: Tensor, trust_N: Tensor) -> dict[str, float | Tensor]:
        accepted_N = acceptance(gap_N)
        values: dict[str, float | Tensor] = {
            "trust_probability_mean_fraction": mean(accepted_N),
            "trust_probability_fraction": accepted_N,
            "below_threshold_fraction": mean(-gap_N <= self.threshold_nats),
        }
        split = {} if self.region == "expected" else {"trust": gap_N[trust_N == 1], "outlier": gap_N[trust_N == 0]}
        for name, some_N in split.items():
            values[f"gap_{name}_nats"] = some_N
            values[f"gap_{name}_mean_nats"] = mean(some_N)
            values[f"gap_{name}_p99_nats"] = float(quantile(some_N, 99))
        return values

    def conventions(self) -> dict[str, str]:
        trust = {"reverse_kl": "full_vocabulary" if self.trust_estimator == "exact" else "k1_score"}
        outlier = {OUTLIERS[self.outlier]: f"top{self.k}" if self.covers else "k1_score"}
        parts = {} if self.region == "nothing" else trust
        parts |= {} if self.region == "everything" else outlier
        return {
            "divergence": "+".join(parts),
            "estimator": "+".join(dict.fromkeys(parts.values())),
            "denominator": self.denominator,
            "region": self.region,
        } | ({"topk_k": str(self.k), "topk_tail": self.tail} if self.covers else {})


def acceptance(gap: Tensor) -> Tensor:
    """P = min(1, q / p)."""
    return (-gap).clamp(max=0.0).exp()


def costing(cost_N: Tensor, logp_N: Tensor) -> Tensor:
    """The cost as a value; its gradient is cost * grad log p(y)."""
    return cost_N.detach() + d.score_function(logp_N - logp_N.detach(), cost_N)
