"""A question and a launcher -> trials, then what they found: on the terminal, as files, in MLflow."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from opd_lab.settings import RunSettings
from opd_lab.sweep import budget, found, owner, verdict
from opd_lab.sweep.contract import Launcher
from opd_lab.sweep.live import view
from opd_lab.sweep.points import Points
from opd_lab.sweep.question import Question
from opd_lab.sweep.study import Study, masked, not_mlflow, open_study
from opd_lab.sweep.trials import TRAIN, NoTree, Plan, Tree, Trials


def run(question: Question, launcher: Launcher, task: str = TRAIN) -> int:
    """A sweep to its end; returns the exit code of the command: 0, 1 = nothing found or too much failed, 130 = stopped.

    Raises:
        ValueError: it cannot begin.
    """
    _, settings = question.samples[0]
    home = Path(settings.tracking.folder)
    folder = owner.home(home) / question.name
    if question.settings.dry_run:
        study = masked(_uri(question, folder))
        print("\n".join(budget.lines(question, launcher.slots, study, owner.read_card(folder))))
        return 0
    with ExitStack() as held:
        held.enter_context(owner.alone(folder))
        study = _study(question, settings, folder)
        tree: Tree = NoTree()
        if settings.tracking.mlflow:
            from opd_lab.sweep.tree import MLflowTree

            tree = MLflowTree(settings.tracking, question, study)
        plan = Plan(
            folder=folder,
            metrics=list(question.objective),
            settings=question.settings,
            orders=question.orders,
            poll_seconds=launcher.poll_seconds,
            task=task,
        )
        with view(study, next(iter(question.objective))) as shown:
            trials = Trials(plan, study, launcher, tree, shown)
            trials.run()
        code, told = _close(question, trials, home / settings.tracking.experiment)
        tree.finish(found.write(question, study, folder, told), {0: "FINISHED", 1: "FAILED"}.get(code, "KILLED"))
        print(f"sweep    {folder / 'sweep.html'}\nstudy    optuna-dashboard {masked(_uri(question, folder))}")
    return code


def _uri(question: Question, folder: Path) -> str:
    return question.settings.storage or f"{folder}.journal"


def _study(question: Question, settings: RunSettings, folder: Path) -> Study:
    order, _ = question.samples[0]
    uri = _uri(question, folder)
    not_mlflow(uri, settings.tracking.uri or f"sqlite:///{Path(settings.tracking.folder) / 'mlflow.db'}")
    return open_study(
        question.name,
        uri,
        question.space,
        question.settings,
        question.objective,
        question.identity,
        every=order.every or order.steps,
        steps=order.steps * len(question.settings.seeds or [0]),
    )


def _close(question: Question, trials: Trials, experiment: Path) -> tuple[int, list[str]]:
    """The table and the report of the runs that finished, the trials in order where they were searched for, and of
    points what can be told. Returns the exit code, and the latter."""
    from opd_lab.results import show_runs

    study, s = trials.study, question.settings
    done = found.ranked(study)
    searched = s.sampler not in (None, "grid")
    told: list[str] = []
    if done:
        shown = done[: found.SHOWN] if searched else done
        runs = list(dict.fromkeys(Path(run) for t in shown for run in t.user_attrs["runs"]))
        if isinstance(question.space, Points):
            rows = verdict.rows(done, runs)
            told = verdict.lines(question.space, show_runs(runs, experiment, rows.get(question.space.first)), rows)
        else:
            show_runs(runs, experiment)
    if done and (searched or len(question.objective) > 1 or s.seeds):
        print("\n" + "\n".join(found.lines(study, question.objective)))
    if told:
        print("\n" + "\n".join(told))
    if done and searched:
        print("\na candidate: `opd-lab confirm NAME`, or this command with sweep.confirm.top=1, tries other seeds")
    if s.pruner:
        print(found.saved(study.trials()))
    if trials.stopped:
        print(f"{question.name}: {trials.stopped}")
        return 130 if trials.interrupted else 1, told
    if not done:
        print(f"{question.name}: every trial failed; their logs are in {trials.plan.folder}")
    return 0 if done else 1, told
