"""What is reported of SCOPE's two paths: not a method. The names are listed in the card of methods/scope.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.base import Ask, rollout_mean
from opd_lab.types import Batch

SHOWN = 4  # rollouts of each path in the table, those of the highest perplexity


class Path(NamedTuple):
    """Who takes a path, the NLL in nats per token, and the weight, 0 for who does not."""

    member_B: Tensor
    nll_B: Tensor
    weight_B: Tensor


def report(
    batch: Batch, paths: Mapping[str, Path], missing_B: Tensor, logp_BT: Tensor, logq_BT: Tensor
) -> dict[str, float | Tensor]:
    """Every number of a step that speaks of paths. `missing_B`: wrong rollouts that the teacher did not score."""
    rollouts, mask_BT, length_B = batch.rollouts, batch.rollouts.mask_BT, batch.rollouts.length_B
    (correct_B, nll_S_B, _), (wrong_B, _, _) = paths.values()
    nll_T_B = -rollout_mean(logq_BT, mask_BT)  # recorded also where the wrong path does not ask for it
    inside_PB = rollouts.group_B.unique()[:, None] == rollouts.group_B
    size = {term: (inside_PB & path.member_B).sum(1) for term, path in paths.items()}
    gap_BT = logp_BT - logq_BT
    gap_N = gap_BT[wrong_B[:, None] & mask_BT]
    sizes = torch.cat(list(size.values()))
    values: dict[str, float | Tensor] = {
        "correct_rollout_fraction": mean(correct_B),
        "all_correct_prompt_fraction": mean((size["correct"] > 0) & (size["wrong"] == 0)),
        "mixed_prompt_fraction": mean((size["correct"] > 0) & (size["wrong"] > 0)),
        "all_wrong_prompt_fraction": mean((size["correct"] == 0) & (size["wrong"] > 0)),
        "singleton_group_fraction": mean(sizes[sizes > 0] == 1),
        "truncated_fraction": mean(~rollouts.stopped_B),
        "teacher_missing_fraction": mean(missing_B[missing_B | wrong_B]),
        "ppl_student_correct_mean": mean(nll_S_B[correct_B].exp()),
        "ppl_teacher_wrong_mean": mean(nll_T_B[wrong_B].exp()),
        "correct_nll_mean_nats": mean(-logp_BT[correct_B[:, None] & mask_BT]),
        "gap_wrong_mean_nats": mean(gap_N),
        "gap_wrong_square_mean_nats2": mean(gap_N.square()),
        "length_ppl_teacher_correlation": correlation(length_B[wrong_B].double(), nll_T_B[wrong_B].exp()),
        "clipped_fraction": (batch.later["clipped"] / batch.later["wrong"]).item() if batch.later else math.nan,
        "nll_student_correct_nats": nll_S_B[correct_B],
        "nll_teacher_wrong_nats": nll_T_B[wrong_B],
    }
    for term, path in paths.items():
        weight_N = path.weight_B[path.member_B]
        weight_PB = inside_PB * path.weight_B
        ess_P = weight_PB.sum(1).square() / weight_PB.square().sum(1)
        values[f"{term}_group_mean_rollouts"] = mean(size[term][size[term] > 0])
        values[f"{term}_ess_fraction"] = mean((ess_P / size[term])[size[term] > 1])
        values[f"{term}_weight_max"] = max(weight_N.tolist(), default=math.nan)
        values[f"{term}_weight"] = weight_N
    row_N = (wrong_B & nll_T_B.isfinite()).nonzero()[:, 0]
    row_N = row_N[nll_T_B[row_N].argsort(stable=True)]  # from the least to the most surprised teacher
    for quarter, rows in enumerate(row_N.tensor_split(4), 1):
        values[f"gap_wrong_q{quarter}_nats"] = gap_BT[rows][mask_BT[rows]]
    return values


def shares(batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Each path's part of the objective (6)."""
    return {
        f"{term}_loss": d.weighted_mean(batch.losses[term], weight_BT, int((weight_BT != 0).sum())).item()
        for term, weight_BT in weights.items()
        if term in batch.losses
    }


def show_extremes(ask: Ask, batch: Batch, paths: Mapping[str, Path]) -> None:
    """The rollouts of either path with the highest perplexity, to the student where correct, else to the teacher."""
    rollouts = batch.rollouts
    for name, path in paths.items():
        member_N = path.member_B.nonzero()[:, 0]
        row_N = member_N[path.nll_B[member_N].argsort(descending=True, stable=True)[:SHOWN]]
        if not len(row_N):
            continue
        some = rollouts.rows(row_N)
        columns = (some.uid_B, some.group_B, path.nll_B[row_N].exp(), path.weight_B[row_N], some.reward_B)
        texts = ask.texts(some, torch.zeros_like(some.length_B), some.source_BT.ne(0).sum(1))
        for uid, group, ppl, weight, reward, text in zip(*(x.tolist() for x in columns), texts, strict=True):
            ask.show(uid=uid, path=name, group=group, perplexity=ppl, weight=weight, reward=reward, text=text)


def mean(value_N: Tensor) -> float:
    return value_N.double().mean().item()


def correlation(x_N: Tensor, y_N: Tensor) -> float:
    """Pearson's; NaN where either does not vary."""
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    return ((x_N * y_N).sum() / (x_N.square().sum() * y_N.square().sum()).sqrt()).item()
