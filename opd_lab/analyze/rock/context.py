"""`opd-lab analyze rock context RUN`: which types stay hard in like contexts (the published definition, B)?

context.parquet   a row per type: id, text, count, high (occurrences at or above both quantiles), rock_score (nats),
                  consistency (CCR), context_score (R_ctx = rock_score * consistency, nats)

An occurrence counts if its KL is high before OPD and after it, on the same tokens, and if at least the share eta of its
type's other such occurrences have a like context: the window of w tokens on either side without the token itself, the
prompt included, cut at the ends. Ours, for the paper has no numbers and no code: the windows' mean input embedding (of
the initial student) and cosine, or `token_overlap`, the Jaccard index of the windows as multisets; all thresholds.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from opd_lab.analyze.figures import panels
from opd_lab.analyze.outcome import Frame, Outcome, frame
from opd_lab.analyze.rock import figures
from opd_lab.analyze.rock.corpus import SELECT, paired, stored_rollouts
from opd_lab.analyze.rock.select import table_of
from opd_lab.analyze.selectors import consistency, persistently_high
from opd_lab.analyze.subject import Subject, open_run
from opd_lab.methods.rock_scores import rock_score
from opd_lab.types import Rollouts


def answer(
    run: Path,
    *,
    w: int,
    context: str,
    gamma: float,
    eta: float,
    tau_pre: float,
    tau_post: float,
    k: int,
    max_occurrences: int,
    before: int | None,
    after: int | None,
    seed: int,
) -> Outcome:
    subject = open_run(run)
    rows, first, last = paired(run, half=SELECT, before=before, after=after)
    before_N, after_N = (torch.tensor(rows[name].to_numpy()) for name in ("kl_reverse_before", "kl_reverse"))
    rows = rows.assign(high=persistently_high(before_N, after_N, tau_pre, tau_post).numpy())
    rollouts = stored_rollouts(run, subject)
    table = table_of(rows, subject.student.vocabulary)
    alike = ALIKE[context](subject, rollouts, w)
    generator = torch.Generator().manual_seed(seed)

    def drawn(part: Frame) -> Tensor:
        """Places of at most so many occurrences, drawn, in the rollouts: shape O2, of rollout and token."""
        chosen = torch.randperm(len(part), generator=generator)[:max_occurrences].sort().values
        return torch.tensor(part[["rollout", "t"]].to_numpy()[chosen]).reshape(-1, 2)

    found, outside = [], []
    for i, part in rows.groupby("token_id"):
        high = part[part["high"]]
        like_OO = alike(drawn(high)) >= gamma
        share = consistency(like_OO, max(len(like_OO), 1), eta)
        scored = float(rock_score(table)[i])
        columns = {"id": i, "text": subject.decode([int(i)]), "count": len(part), "high": len(high)}
        ccr = share * len(high) / len(part)
        found.append(columns | {"rock_score": scored, "consistency": ccr, "context_score": scored * ccr})
        rest = alike(drawn(part[~part["high"]]))
        outside.append(rest[~torch.eye(len(rest), dtype=torch.bool)])
    types = frame(found).sort_values("context_score", ascending=False)
    below = (torch.cat(outside) < gamma).double().mean().item()
    chosen, plain = (types.nlargest(k, name)["id"] for name in ("context_score", "rock_score"))
    figure, (panel,) = panels(1, "Does a type stay hard in like contexts?")
    panel.scatter(types["rock_score"], types["consistency"], s=14)
    for row in types.head(k).itertuples():
        figures.name(panel, row.text, row.rock_score, row.consistency)
    panel.set(xscale="symlog", xlabel="rock score, nats", ylabel="context-consistent share of occurrences")
    return Outcome(
        f"Which types of {run.name} are hard at step {first} and still at step {last}, in contexts that are alike?",
        f"{int(rows['high'].sum())} of {len(rows)} occurrences are high at both; "
        f"{int((types['consistency'] > 0).sum())} types have consistent ones. {len(set(chosen) & set(plain))} of the "
        f"first {k} are also among the first {k} by rock score. gamma = {gamma:g} is the {below:.1%} quantile of the "
        "likeness of same-type occurrences that are not high: near 0 %, the context decides nothing.",
        types.head(k).reset_index(drop=True),
        {"context": types},
        {"context": figure},
    )


class _Embedded:
    """Cosine of the mean input embeddings of two windows."""

    def __init__(self, subject: Subject, rollouts: Rollouts, w: int) -> None:
        subject.at("0")
        embedding: Tensor = subject.student.module.get_input_embeddings().weight  # type: ignore[union-attr,assignment]
        self._table_VD, self._rollouts, self._w = embedding.detach().double().cpu(), rollouts, w

    def __call__(self, place_O2: Tensor) -> Tensor:
        ids_OW, real_OW = windows(self._rollouts, place_O2, self._w)
        mean_OD = (self._table_VD[ids_OW] * real_OW[..., None]).sum(1) / real_OW.sum(1, keepdim=True)
        unit_OD = torch.nn.functional.normalize(mean_OD, dim=1)
        return (unit_OD @ unit_OD.T).clamp(-1, 1)


class _Overlap:
    """Jaccard index of two windows as multisets of tokens: sum of minima over sum of maxima."""

    def __init__(self, subject: Subject, rollouts: Rollouts, w: int) -> None:
        self._types, self._rollouts, self._w = subject.student.vocabulary, rollouts, w

    def __call__(self, place_O2: Tensor) -> Tensor:
        ids_OW, real_OW = windows(self._rollouts, place_O2, self._w)
        return multiset_overlap(ids_OW, real_OW)


ALIKE = {"embedding_mean": _Embedded, "token_overlap": _Overlap}


def multiset_overlap(ids_OW: Tensor, real_OW: Tensor) -> Tensor:
    """Sum of minima over sum of maxima of the counts, between any two rows."""
    seen, place_OW = ids_OW.unique(return_inverse=True)
    count_OV = torch.zeros(len(ids_OW), len(seen), dtype=torch.float64)
    count_OV.scatter_add_(1, place_OW, real_OW.double())
    size_O, apart_OO = count_OV.sum(1), torch.cdist(count_OV, count_OV, p=1)
    total_OO = size_O[:, None] + size_O
    return (total_OO - apart_OO) / (total_OO + apart_OO)


def windows(rollouts: Rollouts, place_O2: Tensor, w: int) -> tuple[Tensor, Tensor]:
    """The ids of w tokens on either side of each place, without the token itself, and which of them exist."""
    row_of = {uid: row for row, uid in enumerate(rollouts.uid_B.tolist())}
    row_O1 = torch.tensor([row_of[uid] for uid in place_O2[:, 0].tolist()], dtype=torch.long)[:, None]
    offset_W = torch.tensor([o for o in range(-w, w + 1) if o])
    column_OW = rollouts.prompt_columns + place_O2[:, 1:] + offset_W
    columns = rollouts.ids_BL.shape[1]
    inside_OW, column_OW = (column_OW >= 0) & (column_OW < columns), column_OW.clamp(0, columns - 1)
    real_OW = rollouts.attention_BL.cpu()[row_O1, column_OW] & inside_OW
    return rollouts.ids_BL.cpu()[row_O1, column_OW], real_OW
