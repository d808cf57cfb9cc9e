"""`opd-lab analyze rock stability RUN`: how many prompts does the list need, and do other seeds find the same?

stability.parquet     a row per size of the list and of the sample: k (types), problems, coverage (share of the KL that
                      the first k hold, over all problems), jaccard (mean over `draws` draws of the problems, against
                      all), jaccard_low, jaccard_high (its 10 and 90 % quantile)
density.parquet       a row per rollout: rollout, tokens, rock_share (of its tokens)
against.parquet       a row per other run and size: run, k, jaccard (of the first k), spearman (of the rock score, over
                      the types that either corpus has)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opd_lab.analyze.outcome import Frame, Outcome, frame
from opd_lab.analyze.rock import figures
from opd_lab.analyze.rock.corpus import ends, occurrences
from opd_lab.analyze.rock.select import grouped, table_of
from opd_lab.methods.rock_scores import rock_score, top
from opd_lab.methods.rock_tokens import jaccard

SIZES = (5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 750, 1000, 1500, 2000, 3000)
PROBLEMS = (50, 100, 200, 300, 400)


def answer(run: Path, *, draws: int, against: list[Path], after: int | None, seed: int) -> Outcome:
    last = ends(run, None, after)[1]
    rows = occurrences(run, checkpoint=last)
    groups = np.array(sorted(rows["group"].unique()))
    score_V, ranked = _ranking(rows)
    sizes = sorted({k for k in SIZES if k < len(ranked)} | {len(grouped(run)["rock"])})
    held_V = (score_V[ranked].cumsum(0) / score_V.sum()).tolist()
    generator = np.random.default_rng(seed)
    found = []
    for n in [n for n in PROBLEMS if n < len(groups)]:
        lists = [_ranking(rows[rows["group"].isin(generator.permutation(groups)[:n])])[1] for _ in range(draws)]
        for k in sizes:
            alike = [jaccard(part[:k], ranked[:k]) for part in lists]
            low, high = np.quantile(alike, [0.1, 0.9])
            found.append(
                {"k": k, "problems": n, "coverage": held_V[k - 1], "jaccard": np.mean(alike)}
                | {"jaccard_low": low, "jaccard_high": high}
            )
    if not found:
        raise ValueError(f"stability compares {PROBLEMS} problems with all, and the corpus of {run} has {len(groups)}")
    table = frame(found)
    rocks = grouped(run)["rock"]
    density = rows.assign(rock=rows["token_id"].isin(rocks)).groupby("rollout")["rock"].agg(["size", "mean"])
    density = density.rename(columns={"size": "tokens", "mean": "rock_share"}).reset_index()
    low, middle, high = density["rock_share"].quantile([0.25, 0.5, 0.75])
    others = _against(run, against, after, sizes)
    shown = table.pivot_table(index=["k", "coverage"], columns="problems", values="jaccard").reset_index()
    shown.columns = [str(name) if isinstance(name, str) else f"J at {name}" for name in shown.columns]
    mine = others[others["k"] == len(rocks)]
    return Outcome(
        f"How stable is the list of rocks of {run.name} (step {last}, {len(groups)} problems)?",
        f"Columns J: Jaccard index of the first k types at so many problems with those at all, mean of {draws} draws. "
        f"Rocks are {middle:.1%} of a response's tokens in the median (quartiles {low:.1%} and {high:.1%})."
        + "".join(
            f" Against {row.run}: Jaccard {row.jaccard:.2f} of the first {row.k}, rank correlation {row.spearman:.2f}."
            for row in mine.itertuples()
        ),
        shown,
        {"stability": table, "density": density} | ({"against": others} if len(others) else {}),
        {"stability": figures.stability(table, density)},
    )


def _ranking(rows: Frame) -> tuple[Tensor, Tensor]:
    table = table_of(rows, 0)
    return rock_score(table), top(rock_score(table), table, len(table.count_V))


def _against(run: Path, others: list[Path], after: int | None, sizes: list[int]) -> Frame:
    mine_V, ranked = _ranking(occurrences(run, checkpoint=ends(run, None, after)[1]))
    found = []
    for other in others:
        theirs_V, theirs = _ranking(occurrences(other, checkpoint=ends(other, None, after)[1]))
        width = max(len(mine_V), len(theirs_V))
        both_2V = torch.stack([torch.nn.functional.pad(x_V, (0, width - len(x_V))) for x_V in (mine_V, theirs_V)])
        either = frame(both_2V[:, both_2V.sum(0) > 0].T.numpy())
        rank = either[0].corr(either[1], method="spearman")
        found += [
            {"run": other.name, "k": k, "jaccard": jaccard(ranked[:k], theirs[:k]), "spearman": rank} for k in sizes
        ]
    return frame(found, columns=["run", "k", "jaccard", "spearman"])
