"""What a sweep found: its trials as a table, what pruning saved, a note for people, and the figures in one page."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna import visualization
from optuna.trial import FrozenTrial, TrialState

from opd_lab.sweep.live import duration, tally
from opd_lab.sweep.question import Question
from opd_lab.sweep.samplers import RETRY_OF
from opd_lab.sweep.space import describe
from opd_lab.sweep.study import Study

if TYPE_CHECKING:
    from pandas import DataFrame

NOTE = "sweep.md"
SHOWN = 12  # trials in the note and on the terminal


def table(study: Study, objective: Sequence[str]) -> DataFrame:
    """One row per trial: number, state, the objectives, spread over seeds, params, cost, why it failed."""
    import pandas as pd

    spread = [f"{name} spread" for name in objective]
    rows = []
    for t in study.trials():
        said = t.user_attrs
        values: Sequence[float] = t.values or [math.nan] * len(objective)
        rows.append(
            {"trial": t.number, "state": t.state.name.lower()}
            | dict(zip(objective, values))
            | dict(zip(spread, said.get("spread", [math.nan] * len(spread))))
            | {f"param {p.key}": t.params.get(p.key) for p in study.space.parameters}
            | {"steps": said.get("steps"), "of": said.get("of"), "student_tokens": said.get("tokens")}
            | {"seconds": said.get("seconds"), "attempts": said.get("attempts"), "retry_of": said.get(RETRY_OF)}
            | {"why": str(said.get("why", "")).strip().splitlines()[-1:] or ""}
        )
    frame = pd.DataFrame(rows)
    frame["why"] = [one[0] if one else "" for one in frame["why"]]
    for column in [name for name in frame if str(name).startswith("param ")]:
        kinds = {type(value) for value in frame[column] if value is not None}
        if len(kinds) > 1 and not kinds <= {int, float}:
            frame[column] = [None if value is None else str(value) for value in frame[column]]
    return frame


@dataclass(frozen=True)
class Saved:
    """What the pruned trials would have cost beyond what they did, at the pace they had."""

    trials: int
    steps: float
    student_tokens: float
    seconds: float
    steps_run: float  # of all trials

    def __str__(self) -> str:
        share = self.steps / (self.steps + self.steps_run) if self.steps else 0.0
        return (
            f"pruning {self.trials} trials saved {self.steps:,.0f} steps ({share:.0%}), "
            f"{self.student_tokens:,.0f} student tokens and {duration(self.seconds)} of training"
        )


def saved(trials: Sequence[FrozenTrial]) -> Saved:
    pruned = [t.user_attrs for t in trials if t.state == TrialState.PRUNED and t.user_attrs.get("steps")]
    left = [(said, said["of"] - said["steps"]) for said in pruned]
    return Saved(
        len(pruned),
        steps=sum(steps for _, steps in left),
        student_tokens=sum(said["tokens"] / said["steps"] * steps for said, steps in left),
        seconds=sum(said["seconds"] / said["steps"] * steps for said, steps in left),
        steps_run=sum(t.user_attrs.get("steps") or 0 for t in trials),
    )


def ranked(study: Study) -> list[FrozenTrial]:
    """The finished trials, the best first; with several objectives, those that no other one beats first."""
    done = [t for t in study.trials() if t.state == TrialState.COMPLETE]
    if len(study.optuna.directions) > 1:
        front = {t.number for t in study.optuna.best_trials}
        return sorted(done, key=lambda t: t.number not in front)
    sign = -1 if study.optuna.direction == optuna.study.StudyDirection.MAXIMIZE else 1
    return sorted(done, key=lambda t: sign * (t.value or 0.0))


def lines(study: Study, objective: Mapping[str, str]) -> list[str]:
    """The best trials, for a terminal: `1.  trial 7   0.8660 ± 0.0120   method=opd optim.lr=0.000312`"""
    said = [", ".join(f"{name} ({way})" for name, way in objective.items())]
    for place, t in enumerate(ranked(study)[:SHOWN], 1):
        spreads = t.user_attrs.get("spread", [math.nan] * len(objective))
        values = (f"{v:.4f}" + (f" ± {s:.4f}" if math.isfinite(s) else "") for v, s in zip(t.values or (), spreads))
        said.append(f"{place:3}.  trial {t.number:<4}  {'  '.join(values)}   {describe(t.params)}")
    return said


def note(question: Question, study: Study, told: Sequence[str] = ()) -> str:
    """What the sweep asked and found, and what can be told from it, in Markdown."""
    s = question.settings
    words = [f"# {question.name}", s.question or "", f"Cost: {s.cost}" if s.cost else "", f"**{tally(study)}**"]
    keys = [p.key for p in study.space.parameters]
    head = ["trial", *question.objective, *keys]
    rows = [
        [str(t.number), *(f"{v:.4f}" for v in t.values or ())]
        + [describe({key: t.params[key]}).partition("=")[2] if key in t.params else "" for key in keys]
        for t in ranked(study)[:SHOWN]
    ]
    grid = [head, ["---"] * len(head), *rows]
    words.append("\n".join("| " + " | ".join(row) + " |" for row in grid))
    words += told
    if s.pruner:
        words.append(f"{saved(study.trials())}.")
    failed = [t for t in study.trials() if t.state == TrialState.FAIL]
    words += [f"Trial {t.number} failed: `{str(t.user_attrs.get('why', '')).strip().splitlines()[-1]}`" for t in failed]
    return "\n\n".join(word for word in words if word) + "\n"


def page(question: Question, study: Study) -> str:
    """Optuna's figures in one HTML file that needs no network."""
    parts, library = [], True
    for title, figure in figures(study.optuna, list(question.objective)):
        parts.append(f"<h2>{escape(title)}</h2>" + figure.to_html(full_html=False, include_plotlyjs=library))
        library = False
    title = escape(question.name)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>'
        f'<body style="font: 15px/1.5 system-ui; max-width: 75em; margin: 2em auto"><h1>{title}</h1>'
        f"<p>{escape(question.settings.question or '')}</p><p>{escape(tally(study))}</p>{''.join(parts)}"
        "</body></html>\n"
    )


def figures(study: optuna.Study, objective: Sequence[str]) -> list[tuple[str, Any]]:
    """(title, Plotly figure) of everything that this study can show."""
    done = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    out = [("When each trial ran", visualization.plot_timeline(study))]
    if not done:
        return out
    several = len({tuple(sorted(t.params.items(), key=str)) for t in done}) > 1
    for place, name in enumerate(objective):
        said: dict[str, Any] = {"target": lambda t, i=place: t.values[i], "target_name": name}
        if len(objective) == 1:
            said = {"target_name": name}
        out.append((f"{name}: best so far", visualization.plot_optimization_history(study, **said)))
        if several:
            out.append((f"{name}: params side by side", visualization.plot_parallel_coordinate(study, **said)))
            out.append((f"{name}: one param at a time", visualization.plot_slice(study, **said)))
        if several and len({t.values[place] for t in done if t.values}) > 1:
            out.append((f"{name}: how much each param matters", _importance(study, place, said)))
    if 2 <= len(objective) <= 3:
        out.append(
            ("The trials that no other one beats", visualization.plot_pareto_front(study, target_names=list(objective)))
        )
    elif any(t.intermediate_values for t in study.get_trials(deepcopy=False)):
        out.append(("On the way", visualization.plot_intermediate_values(study)))
    return out


def _importance(study: optuna.Study, place: int, said: dict[str, Any]) -> Any:
    """What it takes to reach good values. With several objectives Optuna takes low ones for good, and says so."""
    if len(study.directions) > 1:
        sign = -1 if study.directions[place] == optuna.study.StudyDirection.MAXIMIZE else 1
        said = said | {"target": lambda t: sign * t.values[place]}
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "PedAnovaImportanceEvaluator computes the importances of params to achieve low"
        )
        return visualization.plot_param_importances(study, **said)


def write(question: Question, study: Study, folder: Path, told: Sequence[str] = ()) -> list[Path]:
    """The table as parquet and CSV, the note and the page."""
    frame = table(study, list(question.objective))
    frame.to_parquet(folder / "trials.parquet")
    frame.to_csv(folder / "trials.csv", index=False)
    (folder / NOTE).write_text(note(question, study, told))
    (folder / "sweep.html").write_text(page(question, study))
    return [folder / name for name in ("trials.parquet", "trials.csv", NOTE, "sweep.html")]
