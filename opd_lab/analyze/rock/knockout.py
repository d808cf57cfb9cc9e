"""`opd-lab analyze rock knockout RUN`: does the student need its rocks? Its answers when it may not write a token.

knockout.parquet      a row per token: id, text, pool (rock | control), affected (problems whose baseline has it), lost
                      and gained (problems), delta (accuracy), p, verdict, window_ids, window_delta, window_p,
                      pillar_in_window (bool), bonferroni (bool), bh_05, bh_10, bh_20 (bool)
cumulative.parquet    a row per set taken out at once: order (lowest | highest | random), k, draw, accuracy
baseline.parquet      a row per repetition of the baseline: repetition, accuracy, differing (problems that changed)

pi without v has logit -inf at v at every step. Delta(v) = accuracy without v - accuracy. A strong pillar costs at least
eps, and a paired bootstrap over problems rejects 0; strong stumbling is the reverse. The window W(v): v and every pool
token that occurs in at least `window-share` of v's windows in the baseline's texts. Decoding is greedy, so a problem
whose baseline text has none of the tokens taken out keeps its text, and is not decoded again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from opd_lab.analyze.outcome import Frame, Outcome, frame, stored
from opd_lab.analyze.rock import figures
from opd_lab.analyze.rock.corpus import ends
from opd_lab.analyze.rock.select import grouped
from opd_lab.analyze.subject import GREEDY, Subject, open_run
from opd_lab.analyze.verdicts import FALSE_DISCOVERY, benjamini_hochberg, bonferroni, sign_test, verdict
from opd_lab.data.prompts import Example

SIZES = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200)
POOLS = ("rock", "control")
SHOWN = ("id", "text", "pool", "affected", "lost", "gained", "delta", "p", "verdict", "window_delta", "bonferroni")
ROWS = 30  # tokens printed


def answer(
    run: Path,
    *,
    problems: int,
    data_split: str,
    max_tokens: int | None,
    eps: float,
    repeat_baseline: int,
    window_share: float,
    w: int,
    draws: int,
    after: int | None,
    seed: int,
) -> Outcome:
    subject = open_run(run)
    groups = grouped(run)
    last = ends(run, None, after)[1]
    subject.at(str(last))
    trial = Trial(subject, subject.held_out(data_split, problems), max_tokens)
    pool = [(i, name) for name in POOLS for i in groups[name]]
    rows = [_tried(trial, i, name, groups[name], eps=eps, share=window_share, w=w) for i, name in pool]
    tokens = frame(rows)
    for name, column in [("bonferroni", bonferroni(tokens["p"].tolist()))] + [
        (f"bh_{round(100 * q):02d}", benjamini_hochberg(tokens["p"].tolist(), q)) for q in FALSE_DISCOVERY
    ]:
        tokens[name] = column
    tokens.insert(1, "text", [subject.decode([i]) for i in tokens["id"]])
    baseline = frame(trial.again(repeat_baseline, seed))
    cumulative = frame(_cumulative(trial, tokens[tokens["pool"] == "rock"], draws, seed))
    together = {name: trial.accuracy(groups[name]) for name in POOLS}
    significant = tokens[tokens["p"] < 0.05]
    down, up = (int((significant["delta"] * s > 0).sum()) for s in (-1, 1))
    counts = tokens.groupby(["pool", "verdict"]).size()
    said = ", ".join(f"{n} {v} ({p})" for (p, v), n in counts.items())
    noise = baseline["differing"].max() if len(baseline) else 0
    types = stored(run, "rock", "token_table", "rock select")
    return Outcome(
        f"Does the student of {run.name} (step {last}) need its rocks to answer {problems} {data_split} problems?",
        f"Greedy accuracy {trial.baseline:.3f}; {together['rock']:.3f} without any rock, {together['control']:.3f} "
        f"without the control. One at a time: {said}. {down} significant losses, {up} gains: sign test "
        f"p = {sign_test(down, up):.3g}. Repeating the baseline changed at most {noise} texts.",
        tokens[list(SHOWN)].sort_values(["pool", "delta"], ascending=[False, True]).head(ROWS),
        {"knockout": tokens, "cumulative": cumulative, "baseline": baseline},
        {"knockout": figures.knockout(tokens, types, eps), "cumulative": figures.cumulative(cumulative)},
    )


class Trial:
    """Greedy answers to some problems, and how they change without some tokens."""

    def __init__(self, subject: Subject, examples: list[Example], max_tokens: int | None) -> None:
        self.subject, self.examples, self._max_tokens = subject, examples, max_tokens
        self.texts, self.correct = self._decode(list(range(len(examples))), [])
        if sum(c < 0 for c in self.correct):
            raise ValueError("knockout needs graded problems; the data of this run have no answers")
        self._known: dict[frozenset[int], list[int]] = {}

    @property
    def baseline(self) -> float:
        return sum(self.correct) / len(self.correct)

    def without(self, ids: list[int]) -> list[int]:
        """1 where the answer is correct although these tokens are never written, else 0; per problem."""
        key = frozenset(ids)
        if key not in self._known:
            touched = [place for place, text in enumerate(self.texts) if not key.isdisjoint(text)]
            correct = list(self.correct)
            if touched:
                for place, value in zip(touched, self._decode(touched, sorted(key))[1]):
                    correct[place] = value
            self._known[key] = correct
        return self._known[key]

    def change(self, ids: list[int]) -> list[int]:
        return [after - before for after, before in zip(self.without(ids), self.correct)]

    def accuracy(self, ids: list[int]) -> float:
        return sum(self.without(ids)) / len(self.correct)

    def again(self, repetitions: int, seed: int) -> Iterator[dict[str, float]]:
        """The baseline decoded in other orders, so that other problems share a batch: what rounding alone changes."""
        generator = torch.Generator().manual_seed(seed)
        for repetition in range(repetitions):
            order = torch.randperm(len(self.examples), generator=generator).tolist()
            texts, correct = self._decode(order, [])
            differing = sum(text != self.texts[place] for place, text in zip(order, texts))
            yield {"repetition": repetition, "accuracy": sum(correct) / len(correct), "differing": differing}

    def _decode(self, places: list[int], suppressed: list[int]) -> tuple[list[list[int]], list[int]]:
        chosen = [self.examples[place] for place in places]
        behavior = replace(GREEDY, suppressed=tuple(suppressed))
        rollouts = self.subject.sample(chosen, 1, behavior, seed=0, max_tokens=self._max_tokens)
        rows = zip(rollouts.response_BT, rollouts.mask_BT)
        texts = [ids_T[there_T].tolist() for ids_T, there_T in rows]
        return texts, [int(r) if r == r else -1 for r in rollouts.reward_B.tolist()]


def _tried(
    trial: Trial, i: int, pool: str, others: list[int], *, eps: float, share: float, w: int
) -> dict[str, object]:
    change = trial.change([i])
    said, p = verdict(change, 1, eps)
    window = [i, *beside(trial.texts, i, others, share=share, w=w)]
    window_said, window_p = verdict(trial.change(window), 1, eps)
    n = len(change)
    return {
        "id": i,
        "pool": pool,
        "affected": sum(i in text for text in trial.texts),
        "lost": change.count(-1),
        "gained": change.count(1),
        "delta": sum(change) / n,
        "p": p,
        "verdict": said,
        "window_ids": window,
        "window_delta": sum(trial.change(window)) / n,
        "window_p": window_p,
        "pillar_in_window": window_said == "strong pillar",
    }


def beside(texts: list[list[int]], i: int, pool: list[int], *, share: float, w: int) -> list[int]:
    """The pool's other tokens that occur in at least this share of the windows of w tokens around a token."""
    around = [
        set(text[max(0, t - w) : t] + text[t + 1 : t + 1 + w])
        for text in texts
        for t in range(len(text))
        if text[t] == i
    ]
    return [v for v in pool if v != i and around and sum(v in window for window in around) >= share * len(around)]


def _cumulative(trial: Trial, tokens: Frame, draws: int, seed: int) -> Iterator[dict[str, object]]:
    """Accuracy without the k tokens of lowest Delta, of highest, and k at random."""
    lowest = tokens.sort_values(["delta", "id"])["id"].tolist()
    generator = np.random.default_rng(seed)
    orders = [("lowest", 0, lowest), ("highest", 0, lowest[::-1])]
    orders += [("random", draw, generator.permutation(lowest).tolist()) for draw in range(draws)]
    for k in sorted({*(k for k in SIZES if k < len(lowest)), len(lowest)}):
        for order, draw, ids in orders:
            yield {"order": order, "k": k, "draw": draw, "accuracy": trial.accuracy(ids[:k])}
