"""`opd-lab analyze recovery RUN`: can the teacher still rescue a wrong response, and does its perplexity tell?

(SCOPE, arXiv 2604.10688, figure 1b.) The student answers; wrong, finished responses are sorted into quarters by the
teacher's perplexity exp(-mean log p_T) on them; each is cut at a fraction r of its characters, moved back to the end of
a step (forward, where none has ended), and the teacher goes on. If the quarters of high perplexity recover less, a
weight that falls with perplexity spends the loss where the teacher can help.

responses.parquet     a row per wrong, finished response: group (problem), uid, text, perplexity, quarter (1 = lowest)
recovery.parquet      a row per response and fraction: group, uid, quarter, fraction, cut (tokens kept), correct (of
                      `continuations`), continuations
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from opd_lab.analyze.continuing import finished_well, graded_only, interval
from opd_lab.analyze.figures import panels
from opd_lab.analyze.outcome import Frame, Outcome, frame, stacked
from opd_lab.analyze.subject import Subject, open_run
from opd_lab.types import LOGP_TEACHER, Behavior, Rollouts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUARTERS = 4
LEAST = 5  # responses of a quarter
LAB_STEP_END = ","  # what ends a step of the embedded lab's solutions; other texts have lines


def answer(
    run: Path,
    *,
    checkpoint: str,
    problems: int,
    data_split: str,
    rollouts: int,
    fractions: list[float],
    continuations: int,
    temperature: float,
    top_p: float,
    top_k: int,
    boundary: str | None,
    seed: int,
) -> Outcome:
    subject = open_run(run)
    graded_only(subject, "recovery")
    step = subject.at(checkpoint)
    examples = subject.held_out(data_split, problems)
    written = subject.sample(examples, rollouts, Behavior(temperature, top_p, top_k), seed=seed)
    wrong = written.rows(((written.reward_B == 0) & written.stopped_B).nonzero().flatten())
    if len(wrong) < QUARTERS * LEAST:
        raise ValueError(
            f"{len(wrong)} of {len(written)} responses are wrong and finished, quarters need {QUARTERS * LEAST}; "
            "raise --problems or --rollouts, or take an earlier --checkpoint"
        )
    perplexity_B = np.exp(-np.nanmean(subject.measured(wrong, frozenset({LOGP_TEACHER}))[LOGP_TEACHER].numpy(), axis=1))
    quarter_B = quarters(perplexity_B)
    groups, uids = wrong.group_B.tolist(), wrong.uid_B.tolist()
    texts = subject.student.texts(wrong)
    head = {"group": groups, "uid": uids}
    responses = frame(head | {"text": texts, "perplexity": perplexity_B, "quarter": quarter_B})
    mark = boundary or (LAB_STEP_END if subject.settings.data.kind == "arithmetic" else "\n")
    found = []
    for fraction in fractions:
        cuts = [cut_at(prefixes(subject, wrong, row), fraction, mark) for row in range(len(wrong))]
        how = {"samples": continuations, "temperature": temperature, "top_p": 1.0, "seed": seed}
        correct = finished_well(subject, subject.parts.teacher, wrong, torch.tensor(cuts), examples, **how)
        columns = {"quarter": quarter_B, "fraction": fraction, "cut": cuts, "correct": correct}
        found.append(frame(head | columns | {"continuations": continuations}))
    table = stacked(found)
    rates = [_rate(part, quarter, fraction) for (quarter, fraction), part in table.groupby(["quarter", "fraction"])]
    rate = frame(rates)
    shown = rate.assign(
        rate=[f"{r.rate:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in rate.itertuples()],
        fraction=[f"r = {fraction:g}" for fraction in rate["fraction"]],
    ).pivot_table(index="quarter", columns="fraction", values="rate", aggfunc="first")
    shown.insert(0, "n", responses.groupby("quarter").size())
    shown.insert(0, "median PPL", responses.groupby("quarter")["perplexity"].median())
    ends = [rate[rate["quarter"] == q].set_index("fraction")["rate"] for q in (1, QUARTERS)]
    falls = int((ends[0] > ends[1]).sum())
    return Outcome(
        f"Does the teacher's perplexity on wrong responses of {run.name} (step {step}) say where it can still help?",
        f"{len(wrong)} of {len(written)} responses are wrong and finished. The quarter of lowest perplexity is rescued "
        f"more often than that of highest at {falls} of {len(ends[0])} cuts; all together {table['correct'].sum()} of "
        f"{table['continuations'].sum()} continuations are correct. In brackets: 95 %, problems drawn anew.",
        shown.reset_index(),
        {"responses": responses, "recovery": table},
        {"recovery": _figure(rate, responses)},
    )


def quarters(value_B: np.ndarray) -> np.ndarray:
    """1 for the lowest quarter, 4 for the highest, by rank: of equal size up to one."""
    rank_B = np.argsort(np.argsort(value_B, kind="stable"), kind="stable")
    return 1 + rank_B * QUARTERS // len(value_B)


def prefixes(subject: Subject, rollouts: Rollouts, row: int) -> list[str]:
    """The text of the first 0, 1, ... tokens of a response, its stop token left out."""
    ids = rollouts.response_BT[row][rollouts.mask_BT[row]].tolist()
    ids = ids[:-1] if bool(rollouts.stopped_B[row]) else ids
    return [subject.decode(ids[:t]) for t in range(len(ids) + 1)]


def cut_at(texts: list[str], fraction: float, mark: str) -> int:
    """Tokens kept: those up to this fraction of the characters, moved back to the last that ends with the mark; forward
    to the first, where none does; unmoved, where no token of the response ends with it."""
    limit = fraction * len(texts[-1])
    inside = max(t for t, text in enumerate(texts) if len(text) <= limit)
    ended = [t for t, text in enumerate(texts) if t and t < len(texts) - 1 and text.rstrip(" ").endswith(mark)]
    before = [t for t in ended if t <= inside]
    return before[-1] if before else ended[0] if ended else inside


def _rate(part: Frame, quarter: int, fraction: float) -> dict[str, float]:
    low, high = interval(part["group"], part["correct"], part["continuations"])
    rate = part["correct"].sum() / part["continuations"].sum()
    return {"quarter": quarter, "fraction": fraction, "rate": rate, "low": low, "high": high}


def _figure(rate: Frame, responses: Frame) -> Figure:
    figure, (panel,) = panels(1, "Wrong responses that the teacher rescues")
    for quarter, rows in rate.groupby("quarter"):
        middle = responses.loc[responses["quarter"] == quarter, "perplexity"].median()
        panel.plot(
            rows["fraction"], rows["rate"], marker="o", label=f"quarter {quarter}: median perplexity {middle:.2f}"
        )
        panel.fill_between(rows["fraction"], rows["low"], rows["high"], alpha=0.15)
    panel.set(xlabel="share of the wrong response that is kept", ylabel="correct continuations", ylim=(-0.02, 1.02))
    panel.legend(fontsize=7)
    return figure
