"""`opd-lab analyze rock corpus RUN`: held-out rollouts, scored token by token by the student at several checkpoints and
the teacher. The other questions about rock tokens read what this leaves in `analysis/rock`.

occurrences.parquet   a row per response token and checkpoint: checkpoint (step), rollout, group (problem), half
                      (select | test | both), t (response position), token_id, prev_token_id, kl_reverse, kl_forward,
                      gap, entropy_student, entropy_teacher (nats)
responses.parquet     a row per rollout: rollout, writer (the checkpoint that wrote it, a step), group, half, problem,
                      prompt_ids, ids, prompt, text, reward

`on fixed`: the last checkpoint writes and all score the same tokens, so that a change is a change of the student. `on
own`: each checkpoint writes for itself, as the paper did. `split halves`: types are selected on one half of the prompts
and tested on the other, else they are high because they were chosen to be (regression to the mean).
Rollouts are sampled at temperature 1, as training samples them. The paper's code decodes greedily (`--decode greedy`),
where of several synonyms only one ever occurs and carries what all of them would.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opd_lab.analyze.figures import panels
from opd_lab.analyze.outcome import Frame, Outcome, frame, stacked, stored
from opd_lab.analyze.subject import GREEDY, Subject, as_rollouts, open_run
from opd_lab.data.prompts import Example
from opd_lab.types import (
    ENTROPY_STUDENT,
    ENTROPY_TEACHER,
    FORWARD_KL,
    LOGP_STUDENT,
    LOGP_TEACHER,
    REVERSE_KL,
    Behavior,
    Rollouts,
)

SIGNALS = {
    "kl_reverse": REVERSE_KL,
    "kl_forward": FORWARD_KL,
    "entropy_student": ENTROPY_STUDENT,
    "entropy_teacher": ENTROPY_TEACHER,
}
BOTH, SELECT, TEST = "both", "select", "test"
BINS = np.geomspace(1e-5, 20, 60)  # nats, of the picture


def answer(
    run: Path,
    *,
    checkpoints: list[str],
    problems: int,
    decode: str,
    samples: int,
    max_tokens: int | None,
    on: str,
    split: str,
    data_split: str,
    seed: int,
) -> Outcome:
    subject = open_run(run)
    examples = subject.held_out(data_split, problems)
    half = halves(examples) if split == "halves" else [BOTH] * len(examples)
    behavior = GREEDY if decode == "greedy" else Behavior()
    if decode == "greedy" and samples > 1:
        raise ValueError(f"--samples must be 1 with --decode greedy, whose rollouts are all alike, got {samples}")
    occurrences, responses = [], []
    steps = [subject.at(which) for which in checkpoints]
    if len(set(steps)) < len(steps):
        raise ValueError(f"--checkpoints must name different steps, got {', '.join(map(str, steps))}")
    written: Rollouts | None = None
    for which in checkpoints if on == "own" else checkpoints[::-1]:
        step = subject.at(which)
        if written is None or on == "own":
            written = subject.sample(examples, samples, behavior, seed=seed, max_tokens=max_tokens)
            responses.append(_responses(subject, written, examples, half, step))
        occurrences.append(_occurrences(subject, written, half, step))
    tokens = stacked(occurrences).sort_values(["checkpoint", "rollout", "t"])
    texts = stacked(responses)
    shown = tokens.groupby("checkpoint")[
        ["kl_reverse", "kl_forward", "gap", "entropy_student", "entropy_teacher"]
    ].mean()
    shown.insert(0, "tokens", tokens.groupby("checkpoint").size())
    shown.insert(0, "accuracy", texts.groupby("writer")["reward"].mean())
    first, last = shown["kl_reverse"].iloc[0], shown["kl_reverse"].iloc[-1]
    change = f"from {first:.4f} (step {min(steps)}) to {last:.4f} nats (step {max(steps)})"
    return Outcome(
        f"How far from the teacher is the student of {run.name}, token by token, on {len(examples)} held-out prompts?",
        f"KL(student || teacher) per token goes {change}, on {'the same' if on == 'fixed' else 'their own'} "
        f"{decode} rollouts; {tokens['token_id'].nunique()} token types occur.",
        shown.reset_index(),
        {"occurrences": tokens, "responses": texts},
        {"corpus": _figure(tokens)},
    )


def halves(examples: list[Example]) -> list[str]:
    """Half of the problems, by a digest of their ids, which has nothing to do with their order or length."""
    order = sorted(range(len(examples)), key=lambda i: hashlib.sha256(f"half {examples[i].id}".encode()).digest())
    first = set(order[: len(order) // 2])
    return [SELECT if i in first else TEST for i in range(len(examples))]


def _responses(subject: Subject, rollouts: Rollouts, examples: list[Example], half: list[str], step: int) -> Frame:
    texts, group = subject.student.texts(rollouts), rollouts.group_B.tolist()
    there_BT = rollouts.mask_BT
    return frame(
        {
            "rollout": rollouts.uid_B.tolist(),
            "writer": step,
            "group": group,
            "half": [half[g] for g in group],
            "problem": [examples[g].id for g in group],
            "prompt_ids": [examples[g].ids for g in group],
            "ids": [ids_T[there_T].tolist() for ids_T, there_T in zip(rollouts.response_BT, there_BT)],
            "prompt": [subject.decode(examples[g].ids) for g in group],
            "text": texts,
            "reward": rollouts.reward_B.tolist(),
        }
    )


def _occurrences(subject: Subject, rollouts: Rollouts, half: list[str], step: int) -> Frame:
    seen = subject.measured(rollouts, frozenset({*SIGNALS.values(), LOGP_STUDENT, LOGP_TEACHER}))
    mask_BT = rollouts.mask_BT.cpu()
    row_N, t_N = (index.numpy() for index in mask_BT.nonzero(as_tuple=True))
    ids_BL, first = rollouts.ids_BL.cpu(), rollouts.prompt_columns
    group_N = rollouts.group_B.cpu().numpy()[row_N]
    columns: dict[str, Any] = {
        "checkpoint": step,
        "rollout": rollouts.uid_B.cpu().numpy()[row_N],
        "group": group_N,
        "half": np.array(half, dtype=object)[group_N],
        "t": t_N,
        "token_id": ids_BL[row_N, first + t_N].numpy(),
        "prev_token_id": ids_BL[row_N, first + t_N - 1].numpy(),
        "gap": (seen[LOGP_STUDENT] - seen[LOGP_TEACHER])[mask_BT].numpy(),
    }
    return frame(columns | {name: seen[signal][mask_BT].numpy() for name, signal in SIGNALS.items()})


def occurrences(run: Path, *, half: str = BOTH, checkpoint: int | None = None) -> Frame:
    """The stored occurrences of one half of the prompts (`both`: all), at one checkpoint (None: all).

    Raises:
        ValueError: there is no corpus, or not of this checkpoint.
    """
    found = stored(run, "rock", "occurrences", "rock corpus")
    if checkpoint is not None:
        steps = sorted(found["checkpoint"].unique().tolist())
        if checkpoint not in steps:
            raise ValueError(f"the corpus of {run} has the checkpoints {steps}, not {checkpoint}")
        found = found[found["checkpoint"] == checkpoint]
    return found if half == BOTH else found[found["half"].isin([half, BOTH])]


def ends(run: Path, before: int | None, after: int | None) -> tuple[int, int]:
    """The checkpoints to compare: those named, else the first and the last of the corpus.

    Raises:
        ValueError: they are the same.
    """
    steps = occurrences(run)["checkpoint"]
    first, last = steps.min() if before is None else before, steps.max() if after is None else after
    if first == last:
        raise ValueError(
            f"two checkpoints are compared, got {first} twice; run "
            f"`opd-lab analyze rock corpus {run} --checkpoints 0 final`"
        )
    return int(first), int(last)


def paired(run: Path, *, half: str, before: int | None, after: int | None) -> tuple[Frame, int, int]:
    """The occurrences that two checkpoints scored, one row each, with the columns of `before` under `*_before`.

    Raises:
        ValueError: the checkpoints scored rollouts of their own.
    """
    first, last = ends(run, before, after)
    early, late = (occurrences(run, half=half, checkpoint=step) for step in (first, last))
    place = ["rollout", "t", "token_id"]
    both = late.merge(early[[*place, *SIGNALS, "gap"]], on=place, suffixes=("", "_before"))
    if len(both) < len(late):
        raise ValueError(
            f"the checkpoints {first} and {last} scored different tokens, so none can be compared; run "
            f"`opd-lab analyze rock corpus {run} --on fixed`"
        )
    return both, first, last


def stored_rollouts(run: Path, subject: Subject, writer: int | None = None) -> Rollouts:
    """The responses of the corpus, written by the last checkpoint unless another is named; `uid_B` is the rollout."""
    texts = stored(run, "rock", "responses", "rock corpus")
    texts = texts[texts["writer"] == (texts["writer"].max() if writer is None else writer)]
    prompts, responses = ([list(map(int, ids)) for ids in texts[name]] for name in ("prompt_ids", "ids"))
    rollouts = as_rollouts(subject.student, prompts, responses, texts["group"].tolist())
    rollouts.uid_B[:] = torch.tensor(texts["rollout"].tolist())
    return rollouts


def _figure(tokens: Frame) -> Any:
    figure, (panel,) = panels(1, "KL(student || teacher) of every token of the corpus")
    for step, rows in tokens.groupby("checkpoint"):
        panel.hist(
            rows["kl_reverse"].clip(BINS[0], BINS[-1]), bins=BINS.tolist(), histtype="step", label=f"step {step}"
        )
    panel.set(xscale="log", yscale="log", xlabel="nats", ylabel="tokens")
    panel.legend()
    return figure
