"""What a sweep would cost, before it is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd_lab.settings import RunSettings
from opd_lab.sweep.live import duration
from opd_lab.sweep.question import Question

COUNTS = ("steps", "rollout.prompts", "rollout.per_prompt", "rollout.max_tokens")  # what the budget of a run is made of


def lines(question: Question, slots: int, storage: str, card: Mapping[str, Any]) -> list[str]:
    """For people: what would be run, how much of it is done, and how long it may take."""
    s = question.settings
    points = question.space.points() if s.sampler in (None, "grid") else None
    target = s.trials or len(points or ())
    seeds = len(s.seeds or [0])
    if not set(COUNTS) & set(question.space.keys):
        costs = [_cost(question.samples[0][1])] * target
    elif points is not None:
        costs = [_cost(question.runs(point)[0][1]) for point in points[:target]]
    else:
        costs = [_dearest(question)] * target
    steps, rollouts, tokens = (seeds * sum(column) for column in zip(*costs))
    left = target - card.get("done", 0)
    said = {
        "question": s.question,
        "cost": s.cost,
        "space": "\n".join(f"{key} = {text}" for key, text in question.space.texts.items()),
        "objective": ", ".join(f"{way} {name}" for name, way in question.objective.items()),
        "sampler": f"{s.sampler or 'grid'}, pruner {s.pruner or 'none'}, seed {s.seed}",
        "trials": f"{target}, {card.get('done', 0)} of them done" + (f"; {seeds} runs each" if seeds > 1 else ""),
        "budget": f"at most {steps:,} steps, {rollouts:,} rollouts, {tokens:,} student tokens in training",
        "time": _time(left, slots, card.get("trial_seconds")),
        "slots": str(slots),
        "study": storage,
    }
    return [f"{name:10} {text}".replace("\n", "\n" + " " * 11) for name, text in said.items() if text]


def _cost(run: RunSettings) -> tuple[int, int, int]:
    rollouts = run.steps * run.rollout.prompts * run.rollout.per_prompt
    return run.steps, rollouts, rollouts * run.rollout.max_tokens


def _dearest(question: Question) -> tuple[int, int, int]:
    """What a trial costs at the largest values that may be drawn."""
    most = {p.key: p.most for p in question.space.parameters if p.key in COUNTS}
    points = [point | {key: most[key] for key in most if key in point} for point in question.space.samples()]
    steps, rollouts, tokens = zip(*(_cost(question.runs(point)[0][1]) for point in points))
    return max(steps), max(rollouts), max(tokens)


def _time(left: int, slots: int, trial_seconds: float | None) -> str:
    if left <= 0:
        return "nothing is left to be run"
    if trial_seconds is None:
        return "unknown: no trial of this sweep has been measured yet"
    return f"about {duration(left * trial_seconds / min(slots, max(left, 1)))} for what is left, at the pace so far"
