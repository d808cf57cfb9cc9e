"""OPRD, the teacher's hidden states instead of its distributions: `method=oprd`.

For models of different shape: `method=oprd_bridge`.

arXiv 2606.06021. On the student's own rollouts its hidden states are pulled towards the teacher's, block by block,
instead of its next-token distribution towards the teacher's. Nobody's LM head is run or gets a gradient. The squared
error stands in place of an OPD loss, or beside one with weight mu. The Bridge compares in R^r: two linear maps per pair
of blocks are fitted before the first step, with both models frozen, and never change (methods/bridge.py).

    rep_t = 1/|L| sum_l 1/d || h_S,t^l - sg h_T,t^l ||^2,   h^L after the final norm            (Eq. 6)
    objective = [opd] + mu * mean over rollouts of the mean of rep_t over its last k tokens     (Eq. 7)
    phi(l) = round((l - 1) (D_T - 1) / (D_S - 1)) + 1      teacher's block for the student's    (Eq. 11)
    z_S = P_S h_S,   z_T = P_T (h_T - mu_T)                the Bridge compares these,           (Eq. 12-15)
    rep_t = 1/|L| sum_l || z_S/|z_S| - z_T/|z_T| ||^2 = 2 - 2 cos                               (3.3.3)

The text contradicts itself in places; a key decides each: raw or normalised states (normalize), the state before or
after reading a token (align), mean per response or over all tokens (aggregation). Ours: the rank's error E(r) (Eq. 16)
and linear CKA in the report of the fit; `center_student`, `solver: least_squares`, `refit_every`. With least squares
the principal directions come from all rows, not from `pca_rows` of them.

Neutral: coef 0 with token_loss full.
Not zero at teacher := student: the Bridge, whose student side has no intercept.
Code: github.com/ShenzhiYang2000/OPRD, the Bridge in its default branch, Vanilla in main.
Differs: the released code reads states at the response tokens, not before them, and averages over a micro-batch's
         tokens; `oprd_official_code` replays both. It counts blocks from 0, so its even blocks are our odd ones.
Differs: its Bridge takes the mean over r times 10, where Eq. 14 sums: `oprd_bridge_official_code`. It normalises
         Vanilla too, skips the bridge where widths agree, and rounds phi in two ways that disagree on some shapes.
Differs: it feeds its cross-tokenizer teacher the student's ids; here such a pair is refused.

Metrics: oprd/{hidden_mse_mean_raw, cosine_mean_fraction, supervised_tokens, teacher_norm_mean_raw,
top5_dims_share_fraction}, oprd/cosine_layer<l>_fraction; of the Bridge, all of projected states, with
subspace_cosine_mean_fraction for cosine_mean_fraction, and once, of held-out rollouts, oprd/bridge_{cosine_before,
cosine_after,explained,cka}_fraction (also per layer), bridge_best_rank_dimensions, bridge_fit_loss_epoch<n>_raw; and
every refit_cosine_every steps bridge_refit_cosine_fraction: P_S fitted anew to the rollouts of one step, only measured,
on those of the next. A frozen cosine that rises where this one is flat is alignment, not a better map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from opd_lab import divergence as d
from opd_lab.methods.base import TRAINED, Method, choice, within
from opd_lab.methods.bridge import layer_map
from opd_lab.methods.policy_gradient import BASES, base_loss, own_tokens, per_rollout
from opd_lab.types import Batch, Facts, Needs, Signal, Tokens, hidden, topk

REP = "rep"  # the name of the term on hidden states
TOP16 = topk(16, "student")
TOKEN_SIGNALS = BASES | {"none": frozenset(), "topk": frozenset({TOP16})}
EPS = 1e-12  # the least norm that a state is divided by


@dataclass(frozen=True, kw_only=True)
class Oprd(Method):
    paper = "https://arxiv.org/abs/2606.06021"
    neutral: ClassVar = {"coef": 0.0, "token_loss": "full"}
    gradient_norms: ClassVar = {REP: "oprd/gradient_norm_rep_raw", TRAINED: "oprd/gradient_norm_opd_raw"}
    not_towards_teacher: ClassVar = "hidden states approach the teacher's; the KL may rise meanwhile"
    name: ClassVar[str] = "oprd"
    cosine_name: ClassVar[str] = "cosine_mean_fraction"

    layers: str | tuple[int, ...] | tuple[tuple[int, int], ...] = "all"  # pairs of blocks once bound
    positions: str = "last_k"
    k: int = 2000
    align: str = "predict"
    normalize: str = "none"
    reduce: str = "mean"
    aggregation: str = "sequence_mean"
    coef: float = 1.0
    token_loss: str = "none"
    warn_cosine: float = 0.8

    def __post_init__(self) -> None:
        choice("positions", self.positions, ("last_k", "first_k", "last", "all"))
        within("k", self.k, ">= 1 token", self.k >= 1)
        choice("align", self.align, ("predict", "token"))
        choice("normalize", self.normalize, ("none", "l2"))
        choice("reduce", self.reduce, ("mean", "sum"))
        choice("aggregation", self.aggregation, ("sequence_mean", "token_mean"))
        within("coef", self.coef, ">= 0", self.coef >= 0)
        choice("token_loss", self.token_loss, ("none", "sampled", "topk", "full"))
        within("warn_cosine", self.warn_cosine, "in [-1, 1]", -1 <= self.warn_cosine <= 1)
        if self.coef == 0 and self.token_loss == "none":
            raise ValueError("method.coef=0 with token_loss=none leaves nothing to minimise")

    def check(self, facts: Facts) -> None:
        if facts.teacher_shape is None or facts.student_shape is None:
            raise ValueError(
                f"teacher={facts.teacher} returns no hidden states, which method={self.name} needs; use teacher=local"
            )
        blocks(self.layers, facts.student_shape[0])
        if self.token_loss == "sampled":
            own_tokens(facts)
        self.check_shapes(facts.student_shape, facts.teacher_shape)

    def check_shapes(self, student: tuple[int, int], teacher: tuple[int, int]) -> None:
        if student != teacher:
            shapes = " and ".join(f"{n} {x[0]}x{x[1]}" for n, x in (("student", student), ("teacher", teacher)))
            raise ValueError(
                f"method=oprd compares raw hidden states: {shapes} (depth x width) differ; "
                "use method=oprd_bridge or a same-shape pair"
            )

    def bind(self, facts: Facts) -> Self:
        assert facts.student_shape and facts.teacher_shape, "checked before"
        if not isinstance(self.layers, str) and isinstance(self.layers[0], tuple):
            return self
        partner = layer_map(facts.student_shape[0], facts.teacher_shape[0])
        chosen = blocks(self.layers, facts.student_shape[0])
        return replace(self, layers=tuple((block, partner[block - 1]) for block in chosen))

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Blocks of student and teacher that are compared."""
        pairs = tuple(pair for pair in self.layers if isinstance(pair, tuple))
        assert pairs, "bind(facts) says which blocks there are"
        return pairs

    def states(self, owner: str) -> Signal:
        return hidden(owner, tuple(pair[owner == "teacher"] for pair in self.pairs), self.align)

    @property
    def both(self) -> frozenset[Signal]:
        return frozenset({self.states("student"), self.states("teacher")})

    def needs(self) -> Needs:
        return Needs(tokens=self.both | TOKEN_SIGNALS[self.token_loss])

    def consult(self, ask: object, batch: Batch) -> dict[str, Tensor]:
        return {"supervised": supervised(batch.rollouts.mask_BT, self.positions, self.k)}

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        on_BT = batch.consulted["supervised"]
        rep_BT = per_rollout(on_BT) if self.aggregation == "sequence_mean" else on_BT.float()
        return {REP: rep_BT} | (super().weights(batch) if self.token_loss != "none" else {})

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        sides = self.sides(tokens)
        if self.normalize == "l2":
            sides = tuple(functional.normalize(side_NLD, dim=-1, eps=EPS) for side_NLD in sides)
        error_NLD = (sides[0] - sides[1]).square()
        error_NL = error_NLD.mean(-1) if self.reduce == "mean" else error_NLD.sum(-1)
        return {REP: self.coef * error_NL.mean(-1)} | self.token_losses(tokens)

    def token_losses(self, tokens: Tokens) -> dict[str, Tensor]:
        if self.token_loss == "none":
            return {}
        if self.token_loss == "topk":
            return {TRAINED: d.topk_kl(tokens[TOP16], direction="reverse", tail="bucket")}
        return {TRAINED: base_loss(tokens, self.token_loss)}

    def raw(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """The hidden states of student and teacher, shape NLD, in fp32 or better."""
        return wide(tokens[self.states("student")]), wide(tokens[self.states("teacher")])

    def sides(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """What is compared."""
        return self.raw(tokens)

    def tally(self, tokens: Tokens) -> dict[str, Tensor]:
        on_N = tokens.consulted["supervised"]
        student_NLD, teacher_NLD = (side_NLD[on_N].double() for side_NLD in self.sides(tokens))
        return {
            "tokens": on_N.sum(),
            "cosine_L": functional.cosine_similarity(student_NLD, teacher_NLD, dim=-1, eps=EPS).sum(0),
            "error_LD": (student_NLD - teacher_NLD).square().sum(0),
            "teacher_norm_L": teacher_NLD.norm(dim=-1).sum(0),
        }

    def notes(self, tallies: Mapping[str, Tensor]) -> list[str]:
        cosine = float((tallies["cosine_L"] / tallies["tokens"]).mean())
        return [self.warning(cosine)] if cosine < self.warn_cosine else []

    def warning(self, cosine: float) -> str:
        return (
            f"initial cosine {cosine:.2f} (paper's pair: 0.93); equal shape is not shared representation, "
            "consider oprd_bridge"
        )

    def metrics(self, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        seen = batch.tallies
        if not seen or not seen["tokens"]:
            return {}
        cosine_L, error_LD = seen["cosine_L"] / seen["tokens"], seen["error_LD"] / seen["tokens"]
        worst_L5 = error_LD.topk(min(5, error_LD.shape[-1])).values
        layers = {f"oprd/cosine_layer{pair[0]}_fraction": float(x) for pair, x in zip(self.pairs, cosine_L)}
        means = {
            f"oprd/{self.cosine_name}": float(cosine_L.mean()),
            "oprd/hidden_mse_mean_raw": float(error_LD.mean()),
            "oprd/supervised_tokens": float(seen["tokens"]),
            "oprd/teacher_norm_mean_raw": float(seen["teacher_norm_L"].mean() / seen["tokens"]),
            "oprd/top5_dims_share_fraction": float((worst_L5.sum(-1) / error_LD.sum(-1).clamp_min(EPS)).mean()),
        }
        return {**layers, **means}

    def conventions(self) -> dict[str, str]:
        kinds = {"none": "", "sampled": "+k1_score", "topk": "+topk", "full": "+full_vocabulary"}
        return ({"topk_k": "16"} if self.token_loss == "topk" else {}) | {
            "divergence": ("hidden_l2" if self.normalize == "l2" else "hidden_raw")
            + ("" if self.token_loss == "none" else "+reverse_kl"),
            "estimator": f"{self.name}_{self.align}_{self.reduce}{kinds[self.token_loss]}",
            "denominator": "rollouts" if self.aggregation == "sequence_mean" else "tokens",
        }


def blocks(layers: Any, depth: int) -> tuple[int, ...]:
    """Which blocks of 1..depth are meant."""
    every = tuple(range(1, depth + 1))
    named = {"all": every, "last": every[-1:], "even": every[1::2], "odd": every[::2]}
    chosen = named.get(layers, ()) if isinstance(layers, str) else tuple(layers)
    if not chosen or not set(chosen) <= set(every):
        got = layers if isinstance(layers, str) else list(layers)
        raise ValueError(f"method.layers must be all, last, even, odd or blocks in 1..{depth}, got {got}")
    return chosen


def supervised(mask_BT: Tensor, positions: str, k: int) -> Tensor:
    """The chosen ones of each rollout's generated tokens; a rollout with fewer than k gives all."""
    place_BT = mask_BT.cumsum(1)  # 1 on the first
    last_B1 = place_BT[:, -1:]
    inside = {"all": mask_BT, "first_k": place_BT <= k, "last_k": place_BT > last_B1 - k, "last": place_BT == last_B1}
    return mask_BT & inside[positions]


def wide(state_NLD: Tensor) -> Tensor:
    """Large states of a residual stream are not subtracted in half precision."""
    return state_NLD if state_NLD.dtype == torch.float64 else state_NLD.float()
