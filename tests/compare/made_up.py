"""A run made up by hand: every number of it is in sight."""

from __future__ import annotations

from pathlib import Path

from torch import tensor

from opd_lab.diagnostics.histograms import count
from opd_lab.tracking.run_folder import RunFolder
from opd_lab.tracking.tracker import FanOut, RunInfo
from opd_lab.types import Report


def a_run(
    home: Path,
    method: str,
    seed: int,
    correct: list[int],
    *,
    best: list[int] | None = None,
    lr: float = 0.1,
    tokens: float = 100.0,
    status: str = "FINISHED",
    **tags: str,
) -> Path:
    """Two steps of 32 rollouts; problem p has 4 test rollouts, of which 1 is correct before, `correct[p]` after, and
    `best[p]` after step 1, if validation chose that. `tokens` are written in a step, the teacher reads half of them."""
    name = f"{method}-{lr}-{seed}"
    fields = {"method._target_": method, "method.beta": len(method)}
    params = {"seed": seed, "steps": 2, "rollout.prompts": 8, "rollout.per_prompt": 4, "rollout.max_tokens": 20}
    params |= {"optim.updates_per_rollout": 1, "optim.lr": lr, **fields}
    conventions = {"divergence": "reverse_kl", "estimator": "full_vocabulary", "denominator": "tokens"} | tags
    sizes = {"student_parameters": "10", "teacher_parameters": "1000"}
    tracker = FanOut([RunFolder()])
    tracker.start(
        RunInfo(
            name=name,
            experiment="x",
            folder=home / name,
            params=params,
            tags={"method": method, **sizes, **conventions},
            config_yaml="",
        )
    )
    for step in range(3):
        report = Report(step, {"kl/reverse_mean_nats": 1 / (step + 1), "loss/total_value": 1.0})
        report.scalars |= {"eval/validation/avg_at_4": step / 4}
        report.scalars |= {f"kl/reverse_p{q}_nats": q / 100 for q in (50, 90, 99)}
        report.histograms["kl/reverse_nats"] = count(tensor([0.1, 0.2]), "kl_nats")
        if step:
            report.scalars |= {"cost/generated_tokens": tokens * step, "cost/teacher_scored_tokens": tokens / 2 * step}
            report.scalars |= {"time/step_seconds": 3.0}
        tested = {0: [1] * len(correct), 1: best, 2: correct}[step]
        if tested is not None:
            report.scalars["eval/test/reverse_kl_mean_nats"] = 0.5 - step * seed / 10
            if tested:
                report.scalars["eval/test/avg_at_4"] = sum(tested) / len(tested) / 4
            report.tables["evaluations"] = [
                {"set": "test", "problem": str(p), "n": 4, "correct": c} for p, c in enumerate(tested)
            ]
        if step == 2 and best is not None:
            report.scalars["eval/test_best/step"] = 1.0
        tracker.log(report)
    if status != "RUNNING":
        tracker.finish(status)
    return home / name
