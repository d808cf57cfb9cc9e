"""The probe: rollouts that the initial student wrote once, for held-out prompts, scored again at every evaluation.

Prompts, seed and student are the same for every method and run of a comparison, and so are the tokens: a curve shows
what became of them, untouched by what today's student would rather write. What speaks of the student's own rollouts
(`kl/*`, `eval/*`) does not, so the two are never one curve. Temperature 1, no filter, one rollout per prompt.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from opd_lab.diagnostics.high_loss import Decode
from opd_lab.diagnostics.histograms import count
from opd_lab.diagnostics.samples import tokens_of
from opd_lab.diagnostics.scoring import score
from opd_lab.diagnostics.summary import OVERLAP, present, quantile
from opd_lab.models import LM
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.step import Scorer
from opd_lab.types import (
    ENTROPY_STUDENT,
    FORWARD_KL,
    LOGP_STUDENT,
    LOGP_TEACHER,
    REVERSE_KL,
    Behavior,
    Report,
    Rollouts,
)

OF_THE_STUDENT = frozenset({ENTROPY_STUDENT, LOGP_STUDENT})
OF_BOTH = OF_THE_STUDENT | {REVERSE_KL, FORWARD_KL, LOGP_TEACHER, OVERLAP}


def sample(engine: TorchEngine, student: LM, prompts: list[list[int]], seed: int) -> Rollouts:
    """The student's own rollouts, one per prompt: a pure function of its weights, the prompts and the seed."""
    number_B = torch.arange(len(prompts))
    return engine.sample(
        student,
        prompts,
        behavior=Behavior(),
        group_B=number_B,
        uid_B=number_B,
        generator=torch.Generator().manual_seed(seed),
    )


def examine(
    report: Report,
    rollouts: Rollouts,
    student: LM,
    teacher: Scorer | None,
    *,
    chunk: int,
    micro_batch: int,
    shown: int,
    decode: Decode,
) -> None:
    """Add what both models say of the probe now: scalars, a histogram, and `shown` rollouts token by token. `teacher`
    gives full distributions; without one there is no KL."""
    wanted = OF_THE_STUDENT if teacher is None else OF_BOTH
    seen = score(wanted, rollouts, student, teacher, chunk=chunk, micro_batch=micro_batch)
    value_N = {signal: present(value_BT, rollouts.mask_BT) for signal, value_BT in seen.items()}
    for name, signal in _MEANS.items():
        if signal in seen and len(value_N[signal]):
            report.scalars[f"probe/{name}"] = float(value_N[signal].mean())
    if REVERSE_KL in seen and len(value_N[REVERSE_KL]):
        report.scalars["probe/reverse_kl_p99_nats"] = quantile(value_N[REVERSE_KL], 0.99)
        report.histograms["probe/reverse_nats"] = count(value_N[REVERSE_KL], "kl_nats")
    report.tables["probe"] = [
        {
            "step": report.step,
            **tokens_of(rollouts, b, decode),
            **{name: seen[s][b][rollouts.mask_BT[b]].tolist() for name, s in _SHOWN.items() if s in seen},
        }
        for b in range(min(shown, len(rollouts)))
    ]


_MEANS = {
    "reverse_kl_mean_nats": REVERSE_KL,
    "forward_kl_mean_nats": FORWARD_KL,
    "top16_overlap_fraction": OVERLAP,
    "entropy_student_mean_nats": ENTROPY_STUDENT,
}
_SHOWN = {
    "reverse_kl": REVERSE_KL,
    "forward_kl": FORWARD_KL,
    "logp_student": LOGP_STUDENT,
    "logp_teacher": LOGP_TEACHER,
    "entropy_student": ENTROPY_STUDENT,
}


def packed(rollouts: Rollouts) -> dict[str, Any]:
    """The probe as a checkpoint can hold it; `Rollouts(**packed)` undoes it."""
    return {f.name: getattr(rollouts, f.name) for f in fields(rollouts)}
