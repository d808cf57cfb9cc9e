"""OmniOPD, similarity to what the teacher writes from the same prefix: `method=omniopd`.

arXiv 2606.01476 (equation numbers are ours). A rollout is audited where the student was least sure: chunks of C of its
tokens, opened by the M highest entropies, are compared with N continuations that the teacher writes from the same
prefix. How alike they are becomes a bounded weight on the student's own likelihood of the chunk; all other response
tokens are held to the frozen initial student. Nothing is accepted, rejected or replaced, and no probability of the
teacher is read. `omniopd_lab` has chunks that fit into the lab's short rollouts.

    k      = sum_i phi(chunk, continuation_i)            phi in [0, 1], the similarity of two texts        (1)
    pi_bar = exp(mean over the chunk of log pi(y_t))     a geometric mean                                  (2)
    pi_hat = (k + alpha pi_bar) / (N + alpha)            constant; the prior is the student itself         (3)
    L      = - sum_chunks pi_hat sum_t log pi(y_t)  +  beta sum_{other t} KL(reference || student)         (4)
    tokens: L / #response tokens;   rollouts: L / #rollouts;   term_tokens: each sum / its own tokens

Which positions open chunks is told in peaks.py. The entropy is that of the untempered model over the full vocabulary,
which the rollout engine saw. Outer whitespace and special tokens are no part of a text.

Neutral: none. At alpha 0 the expected gradient is that of -sum_v p(v) q(v), the chance to agree, which is no
         divergence. In its place: without chunks, student = reference gives 0; alpha to infinity forgets the teacher;
         equal phi, equal loss.
Not zero at teacher := student: its texts resemble the student's own, and what resembles is reinforced.
Code: none was released.
Differs: a third-party implementation (github.com/benyucong/verl) sums over a rollout and averages over rollouts, as
         denominator rollouts does, and compares texts with their outer whitespace.
Unknown: how the paper's teacher is sampled, learning rate, batch, rollout temperature.

Metrics, all omniopd/: audit_loss_mean_nats, reference_kl_mean_nats (other tokens), reference_kl_audited_mean_nats,
{audited,unaudited_rollouts,match_mean,zero_match,interior,distinct,prior_share,pi_bar_mean,pi_hat_mean}_fraction,
chunks_mean_count, effort_ratio (tokens the teacher wrote and a tenth of its prefixes', cached or not, per response
token; cost/teacher_cached_tokens says how many of them a longer prefix had brought along); histograms
match_fraction, pi_bar_fraction, pi_hat_fraction, start_tokens, entropy_at_peaks_nats. And
entropy/student_at_peaks_mean_nats. Table `consulted`: every chunk with its continuations. distinct_fraction 1/N says
that the teacher is not sampling. Watch entropy, length and repetition: audited tokens sharpen onto favourites.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from opd_lab.methods import similarity
from opd_lab.methods.base import Ask, Method, choice, within
from opd_lab.methods.coins import token_coins
from opd_lab.methods.peaks import peaks
from opd_lab.types import ENTROPY_STUDENT, LOGP_STUDENT, REFERENCE_KL, Batch, Facts, Needs, Rollouts, Tokens

READ_PRICE = 0.1  # of a token that the teacher reads, in tokens that it writes
SAID = ("match", "prior", "target", "distinct", "start")  # of each chunk: k/N, pi_bar, pi_hat, distinct texts / N
INTERIOR = (0.05, 0.95)  # match fractions that are neither hardly nor nearly all


@dataclass(frozen=True, kw_only=True)
class OmniOPD(Method):
    paper = "https://arxiv.org/abs/2606.01476"
    neutral = None
    on_few_tokens: ClassVar[Mapping[str, Any]] = {"chunk_tokens": 2}
    not_zero_at_teacher = "its texts resemble the student's own, and what resembles is reinforced"
    not_towards_teacher = "the match rate rises, the KL need not fall: tests/methods/test_omniopd.py shows it"

    chunks: int = 10
    continuations: int = 10
    chunk_tokens: int = 50
    prior_count: float = 1.0
    anchor_weight: float = 0.1
    phi: str = "edit"
    phi_unit: str = "character"
    select: str = "entropy"
    placement: str = "start"
    denominator: str = "tokens"
    teacher_temperature: float = 1.0
    teacher_top_p: float = 1.0
    length_match: str = "none"

    def __post_init__(self) -> None:
        for name in ("chunks", "continuations", "chunk_tokens"):
            within(name, getattr(self, name), ">= 1", getattr(self, name) >= 1)
        for name in ("prior_count", "anchor_weight"):
            within(name, getattr(self, name), ">= 0", 0 <= getattr(self, name) < math.inf)
        choice("phi", self.phi, ("edit", "rouge1"))
        choice("phi_unit", self.phi_unit, ("character", "word"))
        if self.phi == "rouge1" and self.phi_unit == "character":
            raise ValueError("method.phi=rouge1 counts words; set method.phi_unit=word")
        choice("select", self.select, ("entropy", "random"))
        choice("placement", self.placement, ("start", "centre"))
        choice("denominator", self.denominator, ("tokens", "rollouts", "term_tokens"))
        if not self.teacher_temperature > 0:
            raise ValueError(
                f"method.teacher_temperature must be > 0, got {self.teacher_temperature}: greedy continuations are all "
                f"the same, so method.continuations={self.continuations} would buy nothing"
            )
        within("teacher_top_p", self.teacher_top_p, "in (0, 1]", 0 < self.teacher_top_p <= 1)
        choice("length_match", self.length_match, ("none", "student_tokens"))

    def check(self, facts: Facts) -> None:
        if self.chunk_tokens > facts.max_tokens:
            raise ValueError(
                f"method.chunk_tokens={self.chunk_tokens} exceeds the response limit {facts.max_tokens}: nothing could "
                "be audited; use method=omniopd_lab"
            )
        if not facts.behavior.plain:
            warnings.warn(
                "method=omniopd weighs the student's own likelihood, which is right on average for rollouts drawn from "
                f"the student itself: rollout.temperature 1, top_p 1, top_k 0, got {facts.behavior}",
                stacklevel=2,
            )

    def needs(self) -> Needs:
        return Needs(
            batch=frozenset({ENTROPY_STUDENT, LOGP_STUDENT}),
            tokens=frozenset({LOGP_STUDENT, REFERENCE_KL}),
            text=True,
        )

    def consult(self, ask: Ask, batch: Batch) -> dict[str, Tensor]:
        """What is `SAID` of a chunk, on each of its tokens; NaN elsewhere."""
        n, c, device = self.continuations, self.chunk_tokens, batch.rollouts.ids_BL.device
        row_C, start_C = self.opens(batch).nonzero(as_tuple=True)
        audited = batch.rollouts.rows(row_C)
        at = row_C[:, None], start_C[:, None] + torch.arange(c, device=device)
        chunks = [text.strip() for text in ask.texts(audited, start_C, start_C + c)] if len(row_C) else []
        texts_CN = self.continued(ask, audited, start_C, batch) if len(row_C) else []
        phi_CN = self.similarity(chunks, texts_CN).to(device)
        k_C = phi_CN.sum(1)  # (1)
        pi_bar_C = batch[LOGP_STUDENT][at].double().mean(1).exp()  # (2)
        pi_hat_C = (k_C + self.prior_count * pi_bar_C) / (n + self.prior_count)  # (3)
        distinct_C = torch.tensor([len(set(texts)) / n for texts in texts_CN], dtype=torch.float64, device=device)
        entropy_C = batch[ENTROPY_STUDENT][row_C, start_C]
        numbers = (x.tolist() for x in (audited.uid_B, start_C, entropy_C, pi_hat_C, phi_CN))
        for uid, start, entropy, pi_hat, phi, chunk, texts in zip(*numbers, chunks, texts_CN, strict=True):
            ask.show(uid=uid, start=start, entropy=entropy, pi_hat=pi_hat, phi=phi, chunk=chunk, texts=texts)
        out = {}
        for name, value_C in zip(SAID, (k_C / n, pi_bar_C, pi_hat_C, distinct_C, start_C), strict=True):
            out[name] = torch.full(batch.rollouts.mask_BT.shape, torch.nan, dtype=torch.float64, device=device)
            out[name][at] = value_C.double()[:, None]
        return out

    def opens(self, batch: Batch) -> Tensor:
        """True where a chunk opens, BT."""
        score_BT = batch[ENTROPY_STUDENT] if self.select == "entropy" else token_coins(batch)
        length_B = batch.rollouts.length_B
        return peaks(score_BT, length_B, size=self.chunk_tokens, most=self.chunks, placement=self.placement)

    def continued(self, ask: Ask, audited: Rollouts, start_C: Tensor, batch: Batch) -> list[list[str]]:
        """The teacher's N texts in the place of each chunk."""
        written = ask.continue_(
            audited,
            start_C,
            samples=self.continuations,
            max_tokens=self.chunk_tokens,
            temperature=self.teacher_temperature,
            top_p=self.teacher_top_p,
            seed=(batch.seed, batch.step),
        )
        for uid, start, answer in zip(audited.uid_B.tolist(), start_C.tolist(), written, strict=True):
            if len(answer.texts) != self.continuations:
                raise ValueError(
                    f"the chunk at token {start} of rollout {uid} needs method.continuations={self.continuations} "
                    f"texts, the teacher gave {len(answer.texts)}; it must give all samples of a request"
                )
        texts_CN = [answer.texts for answer in written]
        if self.length_match == "student_tokens":
            texts_CN = [[ask.shortened(text, self.chunk_tokens) for text in texts] for texts in texts_CN]
        return [[text.strip() for text in texts] for texts in texts_CN]

    def similarity(self, chunks: list[str], texts_CN: list[list[str]]) -> Tensor:
        """phi of every chunk and each of its continuations."""
        left = [chunk for chunk in chunks for _ in range(self.continuations)]
        right = [text for texts in texts_CN for text in texts]
        symbols = list if self.phi_unit == "character" else str.split
        phi = similarity.edit if self.phi == "edit" else similarity.rouge1
        return phi(*([symbols(text) for text in side] for side in (left, right))).reshape(-1, self.continuations)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        target_BT, mask_BT = batch.consulted["target"], batch.rollouts.mask_BT
        audited_BT = ~target_BT.isnan()
        other_BT = mask_BT & ~audited_BT
        audit_BT, anchor_BT = target_BT.masked_fill(~audited_BT, 0.0), self.anchor_weight * other_BT.double()
        size = {"tokens": mask_BT.sum(), "rollouts": torch.tensor(len(mask_BT))}
        out = {}
        for term, weight_BT, mine_BT in (("audit", audit_BT, audited_BT), ("anchor", anchor_BT, other_BT)):
            counted = (weight_BT != 0).sum()  # the platform divides by these, which cancels here
            out[term] = weight_BT * counted / size.get(self.denominator, mine_BT.sum()).clamp(min=1)
        return out

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        return {"audit": -tokens[LOGP_STUDENT], "anchor": tokens[REFERENCE_KL]}

    def tally(self, tokens: Tokens) -> dict[str, Tensor]:
        audited_N, kl_N = ~tokens.consulted["target"].isnan(), tokens[REFERENCE_KL].double()
        out = {"distinct": tokens.consulted["distinct"][audited_N].sum()}
        for name, mine_N in (("audited", audited_N), ("other", ~audited_N)):
            out |= {name: mine_N.sum(), f"{name}_reference_kl": kl_N[mine_N].sum()}
        return out

    def notes(self, tallies: Mapping[str, Tensor]) -> list[str]:
        n = self.continuations
        if n == 1 or not tallies.get("audited") or float(tallies["distinct"] / tallies["audited"]) > 1.001 / n:
            return []
        return [f"the teacher's {n} continuations of every chunk are all the same: it is not sampling"]

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        mask_BT, seen, tallies = batch.rollouts.mask_BT, batch.consulted, batch.tallies
        audited_BT = ~seen["target"].isnan()
        position_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        opens_BT = seen["start"] == position_T
        match_C, pi_bar_C, pi_hat_C, distinct_C, start_C = (
            seen[name][opens_BT] for name in ("match", "prior", "target", "distinct", "start")
        )
        entropy_C = batch[ENTROPY_STUDENT][opens_BT].double()
        prior_C = self.prior_count * pi_bar_C
        cost, tokens = batch.cost, int(mask_BT.sum())
        written, read = (cost.get(f"teacher_{name}_tokens", 0) for name in ("generated", "prefix"))
        own: dict[str, float | Tensor] = {
            "audit_loss_mean_nats": mean((-seen["target"] * batch[LOGP_STUDENT])[audited_BT]),
            "audited_fraction": mean(audited_BT[mask_BT]),
            "chunks_mean_count": mean(opens_BT.sum(1)),
            "unaudited_rollouts_fraction": mean(~audited_BT.any(1)),
            "match_mean_fraction": mean(match_C),
            "zero_match_fraction": mean(match_C == 0),
            "interior_fraction": mean((match_C > INTERIOR[0]) & (match_C < INTERIOR[1])),
            "distinct_fraction": mean(distinct_C),
            "prior_share_fraction": mean(prior_C / (self.continuations * match_C + prior_C)),
            "pi_bar_mean_fraction": mean(pi_bar_C),
            "pi_hat_mean_fraction": mean(pi_hat_C),
            "effort_ratio": effort(written, read, tokens) if tokens else math.nan,
            "match_fraction": match_C,
            "pi_bar_fraction": pi_bar_C,
            "pi_hat_fraction": pi_hat_C,
            "start_tokens": start_C,
            "entropy_at_peaks_nats": entropy_C,
        }
        for name, key in (("reference_kl_mean_nats", "other"), ("reference_kl_audited_mean_nats", "audited")):
            own[name] = float(tallies[f"{key}_reference_kl"] / tallies[key]) if tallies.get(key) else math.nan
        return {f"omniopd/{k}": v for k, v in own.items()} | {"entropy/student_at_peaks_mean_nats": mean(entropy_C)}

    def conventions(self) -> dict[str, str]:
        return {
            "divergence": "text_likelihood" + ("+forward_kl_reference" if self.anchor_weight else ""),
            "estimator": f"{self.phi}_{self.phi_unit}",
            "denominator": self.denominator,
            "omniopd_entropy_source": "rollout_engine",
        }


def effort(written: float, read: float, tokens: float) -> float:
    """What the teacher does per response token, in tokens that it writes."""
    return (written + READ_PRICE * read) / tokens


def mean(value_N: Tensor) -> float:
    return value_N.double().mean().item()
