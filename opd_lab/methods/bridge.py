"""Linear bridges between the hidden states of two models: not a method, but how `OprdBridge` fits its maps.

One pair of maps per pair of blocks, for teacher states t and student states s of the same tokens:

    P_T = leading eigenvectors of the covariance of t, as rows                        (12)
    P_S = argmin sum || P_S (s - m) - P_T (t - mu_T) ||^2,   m = 0 or mu_S            (13)

All that the closed form needs of the tokens is their moments, which add up over batches; so no row is ever kept, and
rank r is the first r rows of any larger rank.
Axes beside the legend's: L pairs of blocks, S and D student width, E teacher width, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

Rows = tuple[Tensor, Tensor]  # states of student and teacher, NLD and NLE
Moments = dict[str, Tensor]


def layer_map(student_depth: int, teacher_depth: int) -> tuple[int, ...]:
    """The teacher's block for each of the student's, spread evenly, both counted from 1; ties go to the even (11)."""
    if student_depth == 1:
        return (teacher_depth,)
    return tuple(round(Fraction(block * (teacher_depth - 1), student_depth - 1)) + 1 for block in range(student_depth))


class Maps(NamedTuple):
    """A fitted bridge: what is subtracted, then what is multiplied, for each pair of blocks."""

    pairs: tuple[tuple[int, int], ...]
    student_LRD: Tensor
    student_mean_LD: Tensor  # zeros unless the student is centred
    teacher_LRE: Tensor
    teacher_mean_LE: Tensor

    def student(self, state_NLD: Tensor) -> Tensor:
        return project(state_NLD, self.student_LRD, self.student_mean_LD)

    def teacher(self, state_NLE: Tensor) -> Tensor:
        return project(state_NLE, self.teacher_LRE, self.teacher_mean_LE)

    def single(self) -> Self:
        """In fp32, as the steps use it."""
        return self._replace(**{name: value.float() for name, value in self._asdict().items() if name != "pairs"})


def project(state_NLD: Tensor, map_LRD: Tensor, mean_LD: Tensor) -> Tensor:
    """P (h - mean), shape NLR."""
    return torch.einsum("nld,lrd->nlr", state_NLD - mean_LD.to(state_NLD.dtype), map_LRD.to(state_NLD.dtype))


def moments(student_NLD: Tensor, teacher_NLE: Tensor) -> Moments:
    """Count, sums and products of some rows, float64."""
    s_LND, t_LNE = student_NLD.double().transpose(0, 1), teacher_NLE.double().transpose(0, 1)
    return {
        "rows": torch.tensor(s_LND.shape[1], device=s_LND.device),
        "s_LD": s_LND.sum(1),
        "t_LE": t_LNE.sum(1),
        "ss_LDD": s_LND.mT @ s_LND,
        "st_LDE": s_LND.mT @ t_LNE,
        "tt_LEE": t_LNE.mT @ t_LNE,
    }


def gathered(batches: Iterable[Rows], keep_N: Tensor) -> Moments:
    """The moments of the kept rows of all batches."""
    total: Moments = {}
    start = 0
    for student_NLD, teacher_NLE in batches:
        rows_N = keep_N[start : start + len(student_NLD)]
        start += len(student_NLD)
        part = moments(student_NLD[rows_N], teacher_NLE[rows_N])
        total = {name: total[name] + value if total else value for name, value in part.items()}
    return total


def principal(m: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the teacher's covariance as rows, shape LEE, and its eigenvalues, both from the largest on. The
    largest entry of a vector is positive."""
    n = m["rows"]
    covariance_LEE = (m["tt_LEE"] - _outer(m["t_LE"], m["t_LE"]) / n) / (n - 1)
    value_LE, vector_LEE = torch.linalg.eigh(covariance_LEE)
    value_LE, vector_LEE = value_LE.flip(-1), vector_LEE.mT.flip(-2)
    largest_LE1 = vector_LEE.gather(-1, vector_LEE.abs().argmax(-1, keepdim=True))
    return vector_LEE * largest_LE1.sign(), value_LE


def regress(m: Mapping[str, Tensor], maps: Maps) -> Tensor:
    """P_S of (13) in closed form, given everything else."""
    ss_LDD, sz_LDR = _normal_equations(m, maps)
    return (torch.linalg.pinv(ss_LDD, hermitian=True) @ sz_LDR).mT


def _normal_equations(m: Mapping[str, Tensor], maps: Maps) -> tuple[Tensor, Tensor]:
    """Products of the student's states with themselves and with the teacher's coordinates."""
    n, mean_LD, mu_LE = m["rows"], maps.student_mean_LD.double(), maps.teacher_mean_LE.double()
    ss_LDD = m["ss_LDD"] - _outer(m["s_LD"], mean_LD) - _outer(mean_LD, m["s_LD"] - n * mean_LD)
    st_LDE = m["st_LDE"] - _outer(m["s_LD"], mu_LE) - _outer(mean_LD, m["t_LE"] - n * mu_LE)
    return ss_LDD, st_LDE @ maps.teacher_LRE.double().mT


def r_squared(m: Mapping[str, Tensor], maps: Maps, value_LR: Tensor) -> Tensor:
    """Share of each of the teacher's coordinates, of variance `value_LR`, that least squares finds in the student."""
    caught_LR = (regress(m, maps).mT * _normal_equations(m, maps)[1]).sum(-2)
    return (caught_LR / ((m["rows"] - 1) * value_LR)).nan_to_num(0.0).clamp(0, 1)


def rank_errors(value_LR: Tensor, r2_LR: Tensor) -> Tensor:
    """E(r) for r = 0, 1, ...: what rank r leaves out of what the student knows, and what it gets wrong (16)."""
    known_LR, unknown_LR = value_LR * r2_LR, value_LR * (1 - r2_LR)
    none_L1 = torch.zeros_like(value_LR[..., :1])
    wrong_LR, inside_LR = (torch.cat([none_L1, x_LR.cumsum(-1)], -1) for x_LR in (unknown_LR, known_LR))
    return known_LR.sum(-1, keepdim=True) - inside_LR + wrong_LR


def descend(
    maps: Maps,
    batches: Callable[[], Iterable[Rows]],
    measure: Callable[[Maps], float],
    *,
    epochs: int,
    lr: float,
    select: str,
) -> tuple[Maps, list[float]]:
    """P_S of (13) by AdamW without decay, and each epoch's mean loss per row and dimension. `select` says which epoch
    is taken: the last, or the one that measured best."""
    map_LRD = maps.student_LRD.float().clone().requires_grad_()
    optimizer = torch.optim.AdamW([map_LRD], lr=lr, weight_decay=0.0)
    losses, best, found = [], -math.inf, maps
    for _ in range(epochs):
        total, rows = 0.0, 0
        for student_NLD, teacher_NLE in batches():
            if len(student_NLD):
                error_NLR = project(student_NLD, map_LRD, maps.student_mean_LD) - maps.teacher(teacher_NLE)
                loss = error_NLR.square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total, rows = total + loss.item() * len(student_NLD), rows + len(student_NLD)
        losses.append(total / rows)
        now = maps._replace(student_LRD=map_LRD.detach().clone())
        score = measure(now) if select == "best_cosine" else math.inf
        if select == "last" or score > best:
            best, found = score, now
    return found, losses


def cosines(maps: Maps, batches: Iterable[Rows]) -> Tensor:
    """Mean cosine between both sides of the bridge per pair of blocks, shape L."""
    cosine_NL = torch.cat([cosine_similarity(maps.student(s), maps.teacher(t), dim=-1, eps=1e-12) for s, t in batches])
    return cosine_NL.double().mean(0)


def cka(m: Mapping[str, Tensor]) -> Tensor:
    """Linear CKA of the two models' states per pair of blocks, shape L: 1 = equal up to rotation, scale and shift."""

    def squared(product: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return (product - _outer(left, right) / m["rows"]).square().sum((-2, -1))

    ss_L = squared(m["ss_LDD"], m["s_LD"], m["s_LD"])
    tt_L = squared(m["tt_LEE"], m["t_LE"], m["t_LE"])
    return squared(m["st_LDE"], m["s_LD"], m["t_LE"]) / (ss_L * tt_L).sqrt()


def _outer(left_LD: Tensor, right_LE: Tensor) -> Tensor:
    return left_LD[..., :, None] * right_LE[..., None, :]


def foretold(m: Mapping[str, Tensor], axes: Maps, value_LE: Tensor, rank: int) -> dict[str, Tensor]:
    """What the moments say of a bridge before it is fitted, shape L; `axes` has all of the teacher's directions."""
    return {
        "explained": value_LE[:, :rank].sum(-1) / value_LE.sum(-1),
        "best_rank": rank_errors(value_LE, r_squared(m, axes, value_LE)).argmin(-1),
        "cka": cka(m),
    }
