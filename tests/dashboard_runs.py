"""Run folders made up by hand for the dashboards: every number that a figure shows is worked out in its test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import tensor

from opd_lab.diagnostics.histograms import count
from opd_lab.tracking.run_folder import RunFolder
from opd_lab.tracking.tracker import RunInfo
from opd_lab.types import Report

CONVENTIONS = {"divergence": "reverse_kl", "estimator": "full_vocabulary", "denominator": "tokens"}


def a_run(
    home: Path,
    method: str,
    seed: int = 0,
    *,
    lr: float = 0.1,
    final: float = 0.5,
    status: str = "FINISHED",
    own: str = "",
    **tags: str,
) -> Path:
    """Steps 0, 1, 2. Accuracy goes from 0.25 to `final`; a step costs 100 and 50 tokens, and 2 seconds."""
    folder, tracker = home / f"{method}{own}-{lr}-s{seed}", RunFolder()
    params = {
        "seed": seed,
        "steps": 2,
        "objective": "eval/validation/avg_at_4",
        "optim.lr": lr,
        "optim.updates_per_rollout": 1,
        "method._target_": method,
        **({"method.own": own} if own else {}),
    }
    sizes = {"student_parameters": "10", "teacher_parameters": "30"}
    tracker.start(
        RunInfo(
            name=folder.name,
            experiment="x",
            folder=folder,
            params=params,
            tags={"method": method, "seed": str(seed), **CONVENTIONS, **sizes} | tags,
            config_yaml="",
        )
    )
    for step in range(3):
        tracker.log(_report(step, seed, final))
    if status != "RUNNING":
        tracker.finish(status)
    return folder


def _report(step: int, seed: int, final: float) -> Report:
    accuracy = {0: 0.25, 1: (0.25 + final) / 2, 2: final}[step]
    report = Report(step, {"eval/validation/avg_at_4": accuracy, "loss/total_value": 1.0})
    report.tables["evaluations"] = [{"set": "test", "problem": str(p), "n": 4, "correct": p} for p in range(4)]
    report.scalars |= {"eval/test/pass_at_1": 0.375, "eval/test/pass_at_4": 0.75}  # which is what these rows say
    if step == 0:
        return report
    report.scalars |= {
        "cost/generated_tokens": 100.0 * step,
        "cost/teacher_scored_tokens": 50.0 * step,
        "time/step_seconds": 2.0,
        "time/rollout_seconds": 1.0,
        "time/teacher_seconds": 0.25,
        "time/update_seconds": 0.5,
        "kl/reverse_mean_nats": 0.4 / step + seed / 10,
        **{f"kl/reverse_p{q}_nats": q / 100 for q in (50, 90, 99)},
        "entropy/student_mean_nats": 0.5,
        "overlap/top16_fraction": 0.75,
    }
    report.histograms["kl/reverse_nats"] = count(tensor([2e-3, 0.2, 0.2, 2.0]), "kl_nats")
    report.tables["positions"] = [{"step": step, "decile": d, "tokens": 2, "kl_reverse_mean_nats": d} for d in (0, 9)]
    report.tables["high_loss_tokens"] = [_type(step, 7, "now", 10, 2.0, 0.8), _type(step, 8, "<b>", 30, 0.1, 0.12)]
    tokens: dict[str, Any] = {"tokens": ["a", "<i>"], "reverse_kl": [0.1, 2.0], "logp_student": [-1.0, -2.0]}
    tokens |= {"text": "a <i>", "reward": 1.0, "stopped": True, "source": ["student"] * 2}
    report.tables["rollouts"] = [{"uid": 5 + step, "prompt": f"what? {step}", **tokens}]
    return report


def _type(step: int, number: int, token: str, seen: int, kl: float, share: float) -> dict[str, Any]:
    """100 tokens of 25 nats in all."""
    return {
        "step": step,
        "id": number,
        "token": token,
        "count": seen,
        "kl_mean_nats": kl,
        "kl_max_nats": 3 * kl,
        "kl_share_fraction": share,
        "token_share_fraction": seen / 100,
        "enrichment_ratio": share / (seen / 100),
        "p_student_mean": 0.5,
        "p_teacher_mean": 0.25,
        "entropy_teacher_mean_nats": 1.0,
        "persistence_windows": 1,
        "windows": 2,
        "example": f"x ⟦{token}⟧ y",
    }
