"""`opd-lab analyze rock gradients RUN`: do rocks push the student, and in which direction?

gradients.parquet     a row per type: id, text, count, group, norm (of the type's mean gradient), token_norm (mean norm
                      of one occurrence's), cosine (with the balanced sum), contribution (count * norm * cosine),
                      total_norm (count * norm)

The gradient of an occurrence's reverse KL l with respect to the student's logits, forward passes only:
    g_u = p_S(u) (log p_S(u) - log p_T(u) - l)
gbar_v is its mean over the occurrences of type v; G_balanced = sum_v gbar_v, every type once; G_global = sum of all g.
The contributions add up to <G_global, G_balanced> / ||G_balanced||. A vector of the vocabulary's width is kept for
every type; `--vectors compared` keeps them for the groups of `select` alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from opd_lab.analyze.outcome import Frame, Outcome, frame
from opd_lab.analyze.rock import figures
from opd_lab.analyze.rock.corpus import ends, stored_rollouts
from opd_lab.analyze.rock.select import grouped
from opd_lab.analyze.subject import open_run
from opd_lab.analyze.verdicts import p_of

GROUPS = ("rock", "high_kl", "random")


@torch.no_grad()
def answer(run: Path, *, vectors: str, after: int | None) -> Outcome:
    subject = open_run(run)
    groups = grouped(run)
    last = ends(run, None, after)[1]
    subject.at(str(last))
    rollouts = stored_rollouts(run, subject)
    ids_N = rollouts.response_BT[rollouts.mask_BT]
    count_V = torch.bincount(ids_N, minlength=subject.student.vocabulary).double().cpu()
    compared = sorted({i for name in GROUPS for i in groups[name]})
    kept = count_V.nonzero().flatten().tolist() if vectors == "all" else compared
    total = TypeGradients(count_V, kept)
    for _, part, student, teacher in subject.views(rollouts):
        part_ids_N = part.response_BT[part.mask_BT]
        for rows in torch.arange(len(part_ids_N)).split(subject.settings.optim.chunk_tokens):
            logits = (view.at(rows).logits().double().log_softmax(-1) for view in (student, teacher))
            total.add(part_ids_N[rows].cpu(), logit_gradient(*logits).cpu())
    types = total.table()
    group = {i: name for name in GROUPS for i in groups[name]}
    types.insert(1, "text", [subject.decode([i]) for i in types["id"]])
    types.insert(3, "group", [group.get(i, "") for i in types["id"]])
    shown = types[types["group"] != ""].groupby("group")
    medians = shown[["norm", "token_norm", "cosine"]].median()
    medians.insert(0, "types", shown.size())
    medians["contribution"] = shown["contribution"].sum()
    medians["share of contribution"] = medians["contribution"] / types["contribution"].sum()
    tests = [_test(types, name, "rock", other) for name in ("norm", "cosine") for other in ("high_kl", "random")]
    return Outcome(
        f"Do the rocks of {run.name} push the student at step {last}, and along with the other types?",
        "Medians over types. Two-sided Mann-Whitney tests: " + "; ".join(tests) + ".",
        medians.reindex([name for name in GROUPS if name in medians.index]).reset_index(),
        {"gradients": types},
        {"gradients": figures.gradients(types)},
    )


def logit_gradient(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    """g, of KL(student || teacher) with respect to the student's logits; 0 where the student has no mass."""
    p_NV, ratio_NV = logp_NV.exp(), logp_NV - logq_NV
    part_NV = torch.where(p_NV > 0, p_NV * ratio_NV, 0.0)
    return part_NV - p_NV * part_NV.sum(-1, keepdim=True)


class TypeGradients:
    """Sums of gradients per type, with vectors for some types; `count_V` is known before the first gradient, so the
    balanced sum needs one pass."""

    def __init__(self, count_V: Tensor, kept: list[int]) -> None:
        self.count_V, self.kept = count_V, torch.tensor(kept)
        self._place_V = torch.full((len(count_V),), -1)
        self._place_V[self.kept] = torch.arange(len(kept))
        width = len(count_V)
        self.sum_SV = torch.zeros(len(kept), width, dtype=torch.float64)
        self.norm_S = torch.zeros(len(kept), dtype=torch.float64)
        self.balanced_V, self.global_V = (torch.zeros(width, dtype=torch.float64) for _ in range(2))

    def add(self, ids_N: Tensor, g_NV: Tensor) -> None:
        self.balanced_V += (g_NV / self.count_V[ids_N, None]).sum(0)
        self.global_V += g_NV.sum(0)
        place_N = self._place_V[ids_N]
        mine_N = place_N >= 0
        self.sum_SV.index_add_(0, place_N[mine_N], g_NV[mine_N])
        self.norm_S.index_add_(0, place_N[mine_N], g_NV[mine_N].norm(dim=1))

    @property
    def mean_SV(self) -> Tensor:
        """gbar of the kept types."""
        return self.sum_SV / self.count_V[self.kept, None]

    def table(self) -> Frame:
        count_S, norm_S = self.count_V[self.kept], self.mean_SV.norm(dim=1)
        along_S = self.mean_SV @ self.balanced_V / self.balanced_V.norm()
        return frame(
            {
                "id": self.kept.tolist(),
                "count": count_S.long().tolist(),
                "norm": norm_S.tolist(),
                "token_norm": (self.norm_S / count_S).tolist(),
                "cosine": (along_S / norm_S).tolist(),
                "contribution": (count_S * along_S).tolist(),
                "total_norm": (count_S * norm_S).tolist(),
            }
        )


def _test(types: Frame, name: str, a: str, b: str) -> str:
    a_S, b_S = (types.loc[types["group"] == group, name].dropna() for group in (a, b))
    if not len(a_S) or not len(b_S):
        return f"{name} of {a} against {b}: no types"
    return f"{name} of {a} against {b} p = {p_of(mannwhitneyu(a_S, b_S)):.3g}"
