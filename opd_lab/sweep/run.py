"""A question and a launcher -> trials, then what they found: on the terminal, as files, in MLflow."""

from __future__ import annotations

from pathlib import Path

from optuna.trial import TrialState

from opd_lab.sweep.contract import Launcher
from opd_lab.sweep.live import view
from opd_lab.sweep.question import Question
from opd_lab.sweep.study import alone, not_mlflow, open_study
from opd_lab.sweep.trials import NoTree, Plan, Trials


def run(question: Question, launcher: Launcher) -> int:
    """A sweep to its end; returns the exit code of the command.

    Raises:
        ValueError: it cannot begin.
    """
    order, settings = question.samples[0]
    home = Path(settings.tracking.folder)
    folder = home / "optuna" / question.name
    uri = question.settings.storage or f"{folder}.journal"
    not_mlflow(uri, settings.tracking.uri or f"sqlite:///{home / 'mlflow.db'}")
    runs = len(question.settings.seeds or [0])
    with alone(folder):
        study = open_study(
            question.name,
            uri,
            question.space,
            question.settings,
            question.objective,
            question.identity,
            every=order.every or order.steps,
            steps=order.steps * runs,
        )
        with view(study, next(iter(question.objective))) as shown:
            plan = Plan(
                folder=folder,
                metrics=list(question.objective),
                settings=question.settings,
                orders=question.orders,
                poll_seconds=launcher.poll_seconds,
            )
            trials = Trials(plan, study, launcher, NoTree(), shown)
            trials.run()
        return close(question, trials, home / settings.tracking.experiment)


def close(question: Question, trials: Trials, experiment: Path) -> int:
    """The table and the report of the runs that finished."""
    from opd_lab.results import show_runs

    study = trials.study
    finished = [
        Path(run) for trial in study.trials() if trial.state == TrialState.COMPLETE for run in trial.user_attrs["runs"]
    ]
    if finished:
        show_runs(list(dict.fromkeys(finished)), experiment)
    if trials.stopped:
        print(f"{question.name}: {trials.stopped}")
        return 130 if trials.interrupted else 1
    if not finished:
        print(f"{question.name}: every trial failed; their logs are in {trials.plan.folder}")
        return 1
    return 0
