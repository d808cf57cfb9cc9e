"""The best trials of a sweep, run again beside its defaults with seeds that it has not used: an ordinary sweep over
points. What a search ranks first is lucky, too; on other seeds, and on test problems, luck is spent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from opd_lab.sweep import owner, points
from opd_lab.sweep.found import ranked
from opd_lab.sweep.points import Point
from opd_lab.sweep.question import Question
from opd_lab.sweep.study import IDENTITY, Study, changes, plain, reopen

DEFAULTS = "defaults"
MEANT = ("space", "config", "objective")  # of an identity: what the params and the value of a trial mean


def of(question: Question) -> Question:
    """The question whether the best trials of a sweep are better than its defaults.

    Raises:
        ValueError: the sweep was never begun, was begun differently, is running, or found nothing to confirm.
    """
    s = question.settings
    top, name = s.confirm.top, s.confirm.name or f"{question.name}_confirm"
    assert top
    study = _searched(question)
    best, which = _best(study)
    settings = list(islice(_settings(question, best), top))
    if len(settings) < top:
        raise ValueError(f"--top (sweep.confirm.top) must be <= {len(settings)}, the settings of {which}, got {top}")
    chosen = [point for point in settings if point.name != DEFAULTS]
    if not chosen:
        raise ValueError(
            f"the best of {which} is {question.name}'s own defaults: there is nothing to confirm; "
            "--top 2 (sweep.confirm.top=2) holds the next one against them"
        )
    numbers = ", ".join(point.name for point in chosen)
    asks = f"On other seeds and on test problems, is what {question.name} found better than its defaults: {numbers}?"
    seeds = _fresh(study, question, s.confirm.seeds)
    longer = len(seeds) / len(s.seeds or [0])
    limit = None if s.time_limit_seconds is None else s.time_limit_seconds * longer
    return replace(
        question,
        name=name,
        settings=replace(
            s,
            **{"question": asks, "cost": None, "space": {}, "seeds": seeds, "time_limit_seconds": limit},
            **{"sampler": None, "pruner": None, "trials": None},
        ),
        space=points.made([Point(DEFAULTS, {}, []), *chosen]),
        fixed=[*question.fixed, f"tracking.experiment={name}"],
    )


def _searched(question: Question) -> Study:
    """What became of the sweep, which nobody must be writing to."""
    _, settings = question.samples[0]
    folder = owner.begun(Path(settings.tracking.folder), question.name)
    with owner.alone(folder):
        study = reopen(question.name, question.settings.storage or f"{folder}.journal")
    before, now = study.user_attrs[IDENTITY], plain(question.identity)
    differ = changes({key: before[key] for key in MEANT}, {key: now[key] for key in MEANT})
    if differ:
        raise ValueError(
            f"the sweep {question.name} was begun differently: {'; '.join(differ)}; "
            "confirm it with what it was begun with"
        )
    return Study(study, question.space, target=0, retries=0)


def _best(study: Study) -> tuple[list[FrozenTrial], str]:
    """The finished trials, the best first, and what they are. Of several objectives those that no other trial beats,
    by the first."""
    done = ranked(study)
    if not done:
        states = [trial.state for trial in study.trials()]
        pruned, failed = (states.count(state) for state in (TrialState.PRUNED, TrialState.FAIL))
        name = study.optuna.study_name
        raise ValueError(
            f"{name} has no finished trial to confirm, of {len(states)} begun ({pruned} pruned, {failed} failed); "
            "the command that began it goes on with it"
        )
    directions = study.optuna.directions
    if len(directions) == 1:
        return done, "the finished trials"
    sign = -1 if directions[0].name == "MAXIMIZE" else 1
    return sorted(study.optuna.best_trials, key=lambda t: sign * t.values[0]), "the trials that no other one beats"


def _settings(question: Question, trials: Sequence[FrozenTrial]) -> Iterator[Point]:
    """Each setting once, as a point; a seed is no part of it."""
    defaults, seen = _run(question, {}), []
    for trial in trials:
        params = {key: value for key, value in trial.params.items() if key != "seed"}
        run = _run(question, params)
        if run not in seen:
            seen.append(run)
            place = "best" if len(seen) == 1 else f"no. {len(seen)}"
            name = DEFAULTS if run == defaults else f"{place} (trial {trial.number})"
            yield Point(name, params, question.space.overrides(params))


def _run(question: Question, params: points.Params) -> tuple[str, str]:
    order = question.orders(params)[0]
    return order.method, order.config


def _fresh(study: Study, question: Question, count: int) -> list[int]:
    """The next seeds that no trial had."""
    used = [*(question.settings.seeds or ()), *(order.seed for order, _ in question.samples)]
    used += [trial.params["seed"] for trial in study.trials() if "seed" in trial.params]
    return [max(used) + 1 + n for n in range(count)]
