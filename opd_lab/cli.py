"""The `opd-lab` command.

opd-lab run [key=value ...]            one run
opd-lab sweep NAME [key=value ...]     the runs of sweeps/NAME.yaml, then their table and report
opd-lab confirm NAME [key=value ...]   what a search found, beside its defaults, on other seeds
opd-lab sweeps | stop NAME             how sweeps stand; end one cleanly, to be resumed
opd-lab evaluate RUN [...]             a run's student on held-out problems
opd-lab analyze QUESTION RUN [...]     one question about a finished run; --help lists them
opd-lab report FOLDER                  the table and the report of the runs in a folder
opd-lab dashboard [FOLDER]             the runs of a folder in the browser, while they go on
opd-lab doctor [key=value ...]         does everything work here, before any budget is spent?
opd-lab make-lab-models [DIR]          the recipe of the embedded lab's models
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from opd_lab import config
from opd_lab.analyze import commands as questions


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="opd-lab", description=__doc__, formatter_class=_Raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in (("run", "one run"), ("doctor", "check everything before any budget is spent")):
        commands.add_parser(name, help=about, add_help=False)  # everything else is Hydra's, --help included
    sweep = commands.add_parser("sweep", help="the runs of sweeps/NAME.yaml, then their table and report")
    confirm = commands.add_parser("confirm", help="a sweep's best trials beside its defaults, on other seeds")
    for one in (sweep, confirm):
        one.add_argument("name", help="a file of sweeps/, without .yaml")
        one.add_argument("--dry-run", action="store_true", help="say what would be run, and what it may cost")
        one.add_argument("--extend", action="store_true", help="allow more trials or values than it began with")
    confirm.add_argument("--top", type=int, default=1, help="how many of the best trials")
    sweeps = commands.add_parser("sweeps", help="the sweeps of a folder: state, done, best")
    sweeps.add_argument("folder", type=Path, nargs="?", default=Path("opd_runs"))
    stop = commands.add_parser("stop", help="end a running sweep cleanly, to be resumed")
    stop.add_argument("name", help="as `opd-lab sweeps` lists it")
    stop.add_argument("folder", type=Path, nargs="?", default=Path("opd_runs"))
    score = commands.add_parser("evaluate", help="a run's student on held-out problems")
    score.add_argument("run", type=Path, help="a run folder")
    score.add_argument("--checkpoint", default="final", help="final, best, or a step")
    score.add_argument("--split", default="test", choices=("validation", "test"))
    score.add_argument("--problems", type=int, default=200)
    score.add_argument("--samples", type=int, default=4, help="rollouts per problem")
    report = commands.add_parser("report", help="the table and the report of the runs in a folder")
    report.add_argument("folder", type=Path)
    report.add_argument(
        "--baseline", metavar="METHOD", help="the row that the others are held against; opd, or the first"
    )
    report.add_argument("--rebuild", metavar="URI", help="first log the runs again into this MLflow store")
    dashboard = commands.add_parser("dashboard", help="the runs of a folder in the browser, while they go on")
    dashboard.add_argument("folder", type=Path, nargs="?", default=Path("opd_runs"))
    dashboard.add_argument("--port", type=int, default=8501)
    dashboard.add_argument("--open", action="store_true", help="open a browser at it")
    questions.declare(commands.add_parser("analyze", help="a question about a finished run"))
    sync = commands.add_parser("sync", help="deliver what a store missed while it was away")
    sync.add_argument("run", type=Path, help="a run folder")
    recipe = commands.add_parser("make-lab-models", help="the recipe of the embedded lab's models")
    recipe.add_argument("folder", type=Path, nargs="?", default=Path("lab_models"))
    given, rest = parser.parse_known_args(arguments)
    if rest and given.command not in ("run", "doctor", "sweep", "confirm"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    given.overrides = rest
    try:
        return _COMMANDS[given.command](given)
    except (ValueError, FileNotFoundError) as error:
        print(f"opd-lab {given.command}: {error}", file=sys.stderr)
        return 2


class _Raw(argparse.RawDescriptionHelpFormatter):
    pass


def _hydra(task: str, overrides: Sequence[str]) -> int:
    """A task of `app`, with these overrides."""
    from opd_lab import app

    sys.argv = ["opd-lab", *overrides]
    app.app(getattr(app, task))
    return 0


def _run(given: argparse.Namespace) -> int:
    return _hydra("run", given.overrides)


def _sweep(given: argparse.Namespace) -> int:
    found = sorted(path.stem for path in config.SWEEPS.glob("*.yaml"))
    if given.name not in found and not any(word.startswith("--config-dir") for word in given.overrides):
        raise ValueError(
            f"there is no sweep {given.name}; sweeps/ has {', '.join(found)}; what was asked without a file is "
            f"python -m opd_lab -m ...{' sweep.confirm.top=1' * (given.command == 'confirm')}"
        )
    asked = ["sweep.dry_run=true"] * given.dry_run + ["sweep.extend=true"] * given.extend
    return _hydra("run", ["--multirun", f"sweeps={given.name}", *asked, *given.overrides])


def _confirm(given: argparse.Namespace) -> int:
    given.overrides = [f"sweep.confirm.top={given.top}", *given.overrides]
    return _sweep(given)


def _sweeps(given: argparse.Namespace) -> int:
    from rich.console import Console

    from opd_lab.sweep.owner import table

    Console().print(table(given.folder))
    return 0


def _stop(given: argparse.Namespace) -> int:
    from opd_lab.sweep.owner import stop

    print(stop(given.folder, given.name))
    return 0


def _doctor(given: argparse.Namespace) -> int:
    return _hydra("doctor", given.overrides)


def _evaluate(given: argparse.Namespace) -> int:
    from opd_lab.results import score

    for name, value in score(given.run, given.checkpoint, given.split, given.problems, given.samples).items():
        print(f"{name:48} {value:.4f}")
    return 0


def _report(given: argparse.Namespace) -> int:
    from opd_lab.results import rebuild, show

    if given.rebuild:
        rebuild(given.folder, given.rebuild)
    show(given.folder, given.baseline)
    return 0


def _dashboard(given: argparse.Namespace) -> int:
    from dashboards.serve import serve

    serve(given.folder, given.port, given.open)
    return 0


def _sync(given: argparse.Namespace) -> int:
    from opd_lab.results import deliver

    print(deliver(given.run))
    return 0


def _make_lab_models(given: argparse.Namespace) -> int:
    from opd_lab.lab_models import make_lab_models

    make_lab_models(given.folder)
    return 0


_COMMANDS = {
    "run": _run,
    "sweep": _sweep,
    "confirm": _confirm,
    "sweeps": _sweeps,
    "stop": _stop,
    "doctor": _doctor,
    "evaluate": _evaluate,
    "report": _report,
    "dashboard": _dashboard,
    "analyze": questions.answer,
    "sync": _sync,
    "make-lab-models": _make_lab_models,
}

if __name__ == "__main__":
    raise SystemExit(main())
