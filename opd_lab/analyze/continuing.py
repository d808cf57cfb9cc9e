"""How often a writer ends well from the middle of a rollout: what recovery and continuation count."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from opd_lab.analyze.subject import Subject
from opd_lab.data.prompts import Example
from opd_lab.methods.base import Writer
from opd_lab.types import Rollouts

RESAMPLES = 2000


def finished_well(
    subject: Subject,
    writer: Writer,
    rollouts: Rollouts,
    cuts_B: Tensor,
    examples: Sequence[Example],
    *,
    samples: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[int]:
    """Of `samples` continuations from before token `cuts_B[b]`, how many are correct, per rollout. A rollout that has
    ended by then is not continued: all count as it does itself."""
    grade, groups = subject.parts.data.grade, rollouts.group_B.tolist()
    assert grade is not None, "the caller has refused data without answers"
    out = [samples * int(reward == 1) for reward in rollouts.reward_B.tolist()]
    open_B = cuts_B < rollouts.length_B
    rows = open_B.nonzero().flatten()
    if not len(rows):
        return out
    found = writer.continue_(
        rollouts.rows(rows),
        cuts_B[rows],
        samples=samples,
        max_tokens=subject.settings.evaluate.max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=(seed,),
    )
    for row, written in zip(rows.tolist(), found, strict=True):
        head, glue = _beginning(subject, rollouts, row, int(cuts_B[row]))
        answer = examples[groups[row]].answer or ""
        out[row] = sum(grade(head + glue + text, answer) == 1.0 for text in written.texts)
    return out


def _beginning(subject: Subject, rollouts: Rollouts, row: int, cut: int) -> tuple[str, str]:
    """The text before a cut, and what its tokenizer writes between it and the rest."""
    ids = rollouts.response_BT[row][rollouts.mask_BT[row]].tolist()
    head, tail, whole = (subject.decode(part) for part in (ids[:cut], ids[cut:], ids))
    between = len(whole) - len(head) - len(tail)
    return head, whole[len(head) : len(head) + between] if head and between > 0 else ""


def interval(group: Sequence[int], above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """The central 95 % of sum(above) / sum(below) when problems are drawn anew; `group` names the problem of each."""
    _, place = np.unique(np.asarray(group), return_inverse=True)
    sum_P2 = np.zeros((place.max() + 1, 2))
    np.add.at(sum_P2, place, np.stack([above, below], axis=1))
    drawn_RP = np.random.default_rng(0).integers(len(sum_P2), size=(RESAMPLES, len(sum_P2)))
    above_R, below_R = sum_P2[drawn_RP].sum(1).T
    low, high = np.quantile(above_R[below_R > 0] / below_R[below_R > 0], [0.025, 0.975])
    return float(low), float(high)


def graded_only(subject: Subject, what: str) -> None:
    """Refuse data without answers."""
    if subject.parts.data.grade is None:
        raise ValueError(f"{what} needs graded problems; data={subject.settings.data.name} has no answers")
