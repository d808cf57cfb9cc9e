"""`opd-lab analyze continuation RUN`: are prefixes that a blend wrote better places to go on from than the student's?

(TRB, arXiv 2605.31159, figure 4.) At one checkpoint the student and the run's blend answer the same prompts, with the
same random numbers; both are cut at t tokens and continued, by the teacher and by the student. A rollout that ended
before t counts as it is.

    gain(t) = correct after the blend's prefix / correct after the student's prefix - 1

continuation.parquet  a row per rollout, prefix length and who goes on: group (problem), uid, prefix (blend | student),
                      goes_on (teacher | student), t (tokens), ended (bool, before t), correct, continuations
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from opd_lab.analyze.continuing import finished_well, graded_only, interval
from opd_lab.analyze.figures import panels
from opd_lab.analyze.outcome import Frame, Outcome, frame, stacked
from opd_lab.analyze.subject import Subject, open_run
from opd_lab.methods.blends import nearest_in_ball
from opd_lab.teacher.local import LocalTeacher
from opd_lab.types import Behavior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HALVINGS = 30  # of the bisection for a budget given here, as in method=trb


def answer(
    run: Path,
    *,
    checkpoint: str,
    problems: int,
    data_split: str,
    rollouts: int,
    lengths: list[int],
    continuations: int,
    budget: float | None,
    seed: int,
) -> Outcome:
    subject = open_run(run)
    graded_only(subject, "continuation")
    step = subject.at(checkpoint)
    blend, name = blended(subject, budget)
    examples = subject.held_out(data_split, problems)
    arms = {
        "blend": subject.sample(examples, rollouts, blend, seed=seed),
        "student": subject.sample(examples, rollouts, Behavior(), seed=seed),
    }
    writers = {"teacher": subject.parts.teacher, "student": LocalTeacher(subject.student)}
    found = []
    for t in lengths:
        for prefix, written in arms.items():
            for goes_on, writer in writers.items():
                cuts_B = torch.full_like(written.length_B, t)
                how = {"samples": continuations, "temperature": 1.0, "top_p": 1.0, "seed": seed}
                correct = finished_well(subject, writer, written, cuts_B, examples, **how)
                columns = {"group": written.group_B.tolist(), "uid": written.uid_B.tolist(), "prefix": prefix}
                columns |= {"goes_on": goes_on, "t": t, "ended": (written.length_B <= t).tolist()}
                found.append(frame(columns | {"correct": correct, "continuations": continuations}))
    table = stacked(found)
    rows = frame([_gain(part, goes_on, t) for (goes_on, t), part in table.groupby(["goes_on", "t"])])
    said = [
        f"{int((part['gain'] > 0).sum())} of {len(part)} lengths with the {goes_on} ({int((part['low'] > 0).sum())} "
        "with an interval above 0)"
        for goes_on, part in rows.groupby("goes on")
    ]
    reward = {prefix: written.reward_B.mean().item() for prefix, written in arms.items()}
    return Outcome(
        f"Are prefixes by {name} better to go on from than the student's own, at step {step} of {run.name}?",
        f"Correct whole rollouts: blend {reward['blend']:.3f}, student {reward['student']:.3f}. The gain is above 0 at "
        f"{' and '.join(said)}. In brackets: 95 %, problems drawn anew.",
        rows.assign(
            gain=[f"{row.gain:+.3f} [{row.low:+.3f}, {row.high:+.3f}]" for row in rows.itertuples()],
        ).drop(columns=["low", "high"]),
        {"continuation": table},
        {"continuation": _figure(rows)},
    )


def blended(subject: Subject, budget: float | None) -> tuple[Behavior, str]:
    """The blend of a budget in nats per token; None: the one of the run's method at its first step.

    Raises:
        ValueError: the method blends nothing, or the teacher is not in this process.
    """
    if subject.parts.teacher.lm is None:
        raise ValueError(f"a blend needs teacher=local, got {subject.parts.teacher.name}")
    if budget is not None:
        mix = replace(Behavior(), mix=lambda p_RV, q_RV: nearest_in_ball(p_RV, q_RV, budget, HALVINGS))
        return mix, f"the blend of {budget:g} nats"
    method = subject.parts.method
    found = method.behavior(Behavior(), 0, method.init_state())
    if found.mix is None:
        raise ValueError("the method of this run blends nothing at its first step; give --budget, in nats per token")
    return found, "the blend of the run's first step"


def _gain(part: Frame, goes_on: str, t: int) -> dict[str, float | str]:
    """Both arms summed per problem, which pairs them."""
    sums = part.pivot_table(index="group", columns="prefix", values="correct", aggfunc="sum")
    tried = part.groupby("prefix")["continuations"].sum()
    blend, student = (sums[name].sum() / tried[name] for name in ("blend", "student"))
    low, high = interval(sums.index.tolist(), sums["blend"], sums["student"])
    ended = part.groupby("prefix")["ended"].mean()
    gain = blend / student - 1 if student else float("nan")
    head = {"goes on": goes_on, "t": t, "after blend": blend, "after student": student, "gain": gain}
    return head | {
        "low": low - 1,
        "high": high - 1,
        "ended (blend)": ended["blend"],
        "ended (student)": ended["student"],
    }


def _figure(rows: Frame) -> Figure:
    figure, axes = panels(2, "Relative gain in correct answers of the blend's prefixes over the student's")
    for panel, (goes_on, part) in zip(axes, rows.groupby("goes on")):
        panel.axhline(0, color="black", linewidth=0.8)
        panel.plot(part["t"], part["gain"], marker="o")
        panel.fill_between(part["t"], part["low"], part["high"], alpha=0.15)
        panel.set(title=f"the {goes_on} goes on", xlabel="length of the prefix, tokens", ylabel="gain")
    return figure
