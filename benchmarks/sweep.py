"""What a trial of a sweep costs beside the bare run, and beside hydra-optuna-sweeper.

    python benchmarks/sweep.py [--only lab|others] [--trials 32] [--venv DIR]

lab: so many runs of two steps of the embedded lab, one after another in one warm process (bare), then as trials of a
sweep with 1 and with 2 slots. The cost of a trial is (slots x seconds from the first trial's start to the last one's
end - seconds of the bare runs) / trials. `once` is the rest of the whole command from a cold start: imports, the warm
process that trials are forked from, figures and report at the end.

others: trials that only sleep, between 0.1 and 1.6 seconds, the same ones in the same order, with 1 and with 2 slots,
here and under hydra-optuna-sweeper with hydra-joblib-launcher. That is installed with pip, in the versions below, into
an environment of its own (made in a temporary folder, or in --venv and kept). `trials` runs from the first trial's
start to the last one's end, `ideal` is the sleep divided by the slots, and (slots x trials - sleep) / trials is what a
trial costs: for ours a process with its log, the config of a run composed and checked, the study on the disk; for
theirs a call in a process that is there (with joblib, of two), a config of five keys, the study in memory. `once` is
what else the command took: ours gets ready to train, theirs imports neither torch nor MLflow.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

THEIRS = ["hydra-core==1.4.0rc3", "hydra-optuna-sweeper==1.4.0rc3", "hydra-joblib-launcher==1.4.0rc3", "optuna==5.0.0"]
SHORT = [
    *("steps=2", "rollout.prompts=4", "rollout.per_prompt=2", "evaluate.problems=4", "evaluate.samples=2"),
    *("evaluate.test_problems=4", "evaluate.test_samples=2", "evaluate.every=0", "checkpoint.every=0"),
    *("diagnostics.every=0", "data.problems=200", "threads=1", "objective=eval/validation/reverse_kl_mean_nats"),
    "tracking.mlflow=false",
]
SLOTS = (1, 2)
APP = """
import json, sys, time, hydra
from hydra.core.hydra_config import HydraConfig
from pathlib import Path

@hydra.main(version_base=None, config_path=".", config_name="config")
def app(cfg):
    number = HydraConfig.get().job.num
    begin = time.time()
    time.sleep(cfg.seconds[number])
    Path(cfg.moments, str(number)).write_text(json.dumps([begin, time.time()]))
    return cfg.x

app()
"""
CONFIG = """
defaults:
  - override hydra/sweeper: optuna
  - override hydra/sweeper/sampler: random
  - override hydra/launcher: {launcher}
x: 0
moments: {moments}
seconds: {seconds}
hydra:
  run: {{dir: {folder}}}
  sweep: {{dir: {folder}}}
  sweeper: {{n_trials: {trials}, n_jobs: {slots}, direction: maximize, params: {{x: "interval(0,1)"}}}}
"""


def durations(trials: int) -> list[float]:
    """Seconds of sleep, log-uniform between 0.1 and 1.6."""
    rng = random.Random(0)
    return [round(0.1 * 16 ** rng.random(), 3) for _ in range(trials)]


def sleep(order: Any, metrics: Sequence[str], report: Any) -> Mapping[str, float]:
    """The task of our sleeping trials."""
    said = json.loads(Path(order.folder).parent.joinpath("sleep.json").read_text())
    begin = time.time()
    time.sleep(said["seconds"][order.seed])
    Path(said["moments"], str(order.seed)).write_text(json.dumps([begin, time.time()]))
    return dict.fromkeys(metrics, 0.0)


def asked(folder: Path, words: Sequence[str], slots: int) -> tuple[Any, Any]:
    """A question and its launcher, as `python -m opd_lab -m` would make them."""
    from hydra import compose, initialize_config_dir
    from omegaconf import open_dict

    from opd_lab import config
    from opd_lab.sweep import question
    from opd_lab.sweep.sweeper import make_launcher

    config.register()

    def composed(overrides: Sequence[str]) -> Any:
        cfg = compose("config", list(overrides), return_hydra_config=True)
        with open_dict(cfg):
            del cfg["sweep"], cfg["launcher"]
        return cfg

    initialize_config_dir(str(config.CONF), version_base="1.3").__enter__()
    master = compose("config", [f"launcher.slots={slots}"], return_hydra_config=True)
    own = [*SHORT, f"tracking.folder={folder}", "tracking.experiment=runs"]
    return question.ask(master, [*own, *words], composed, None, threads=1), make_launcher(master)


def our_sleep(folder: Path, slots: int, trials: int) -> None:
    """A sweep over sleeping trials, in this process."""
    from rich.console import Console

    from opd_lab.sweep.live import Lines
    from opd_lab.sweep.study import open_study
    from opd_lab.sweep.trials import NoTree, Plan, Trials

    sys.path.insert(0, str(Path(__file__).parent))  # trials find `sweep:sleep` there
    q, launcher = asked(folder, [f"seed=range(0,{trials})"], slots)
    study = open_study(
        "sleep", f"{folder}/sleep.journal", q.space, q.settings, q.objective, q.identity, every=1, steps=1
    )
    plan = Plan(folder / "trials", list(q.objective), q.settings, q.orders, launcher.poll_seconds, "sweep:sleep")
    with open(os.devnull, "w") as nowhere:
        Trials(plan, study, launcher, NoTree(), Lines(study, Console(file=nowhere))).run()


def bare(folder: Path, trials: int) -> None:
    """The lab's runs in this process, one after another; the seconds they took are in `bare.json`."""
    from omegaconf import OmegaConf

    from opd_lab.config import settings_of
    from opd_lab.run import execute

    q, _ = asked(folder, [f"seed=range(0,{trials})"], 1)
    orders = [order for point in q.space.points() for order in q.orders(point)]
    begin = 0.0
    for number, order in enumerate([orders[0], *orders]):  # the first one warms up; it runs into a folder of its own
        cfg: Any = OmegaConf.create(order.config)
        if number == 0:
            cfg.tracking.experiment = "warm"
        execute(settings_of(cfg), order.method, config_yaml=order.config, say=lambda text: None)
        begin = begin or time.time()
    (folder / "bare.json").write_text(json.dumps(time.time() - begin))


def command(*words: Any, python: Path | str = sys.executable, cwd: Path | None = None) -> float:
    """Seconds of a command."""
    begin = time.time()
    done = subprocess.run([python, *map(str, words)], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return time.time() - begin


def lab(home: Path, trials: int) -> None:
    command(__file__, "--part", "bare", "--folder", home / "bare", "--trials", trials)
    alone = json.loads((home / "bare" / "bare.json").read_text())
    print(f"lab, {trials} runs of two steps; bare {alone:.1f} s, {alone / trials:.2f} s a run")
    print("slots   trials s   once s   cost of a trial s")
    for slots in SLOTS:
        folder = home / f"sweep{slots}"
        words = [*SHORT, f"tracking.folder={folder}", "sweep.name=lab", f"launcher.slots={slots}"]
        seconds = command("-m", "opd_lab", "-m", *words, f"seed=range(0,{trials})")
        events = list((folder / "optuna" / "lab").glob("trial_*/events.jsonl"))
        assert len(events) == trials
        said = [json.loads(line) for path in events for line in path.read_text().splitlines()]
        begin = min(event["time"] for event in said if event["kind"] == "started")
        span = max(path.stat().st_mtime for path in events) - begin
        print(f"{slots:5} {span:10.1f} {seconds - span:8.1f} {(slots * span - alone) / trials:19.2f}")


def others(home: Path, trials: int, environment: Path | None) -> None:
    place = environment or home / "venv"
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
        command("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *THEIRS, python=python)
    seconds = durations(trials)
    print(f"{trials} trials that sleep, {sum(seconds):.1f} s together; {', '.join(THEIRS)}")
    print("              |   trials s      |  cost of a trial s  |      once s      | theirs / ours:")
    print("slots ideal s |   ours   theirs |     ours     theirs |    ours   theirs | trials   in all")
    for slots in SLOTS:
        found = []
        for who in ("ours", "theirs"):
            folder = home / f"{who}{slots}"
            moments = folder / "moments"
            moments.mkdir(parents=True)
            if who == "ours":
                (folder / "runs").mkdir()
                (folder / "runs" / "sleep.json").write_text(json.dumps({"seconds": seconds, "moments": str(moments)}))
                words = ["--part", "sleep", "--folder", folder, "--slots", slots, "--trials", trials]
                wall = command(__file__, *words)
            else:
                launcher = "basic" if slots == 1 else "joblib"
                values = {"seconds": seconds, "moments": moments, "folder": folder, "trials": trials, "slots": slots}
                (folder / "config.yaml").write_text(CONFIG.format(launcher=launcher, **values))
                (folder / "app.py").write_text(APP)
                wall = command(folder / "app.py", "-m", python=python, cwd=folder)
            times = [json.loads(path.read_text()) for path in moments.iterdir()]
            assert len(times) == trials, (who, len(times))
            found.append((max(end for _, end in times) - min(begin for begin, _ in times), wall))
        spans, walls = zip(*found)
        cost = [(slots * span - sum(seconds)) / trials for span in spans]
        once = [wall - span for wall, span in zip(walls, spans)]
        print(f"{slots:5} {sum(seconds) / slots:7.1f} | {spans[0]:6.1f} {spans[1]:8.1f} |", end="")
        print(f" {cost[0]:8.2f} {cost[1]:10.2f} | {once[0]:7.1f} {once[1]:8.1f} |", end="")
        print(f" {spans[1] / spans[0]:6.2f} {walls[1] / walls[0]:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("lab", "others"))
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--venv", type=Path, default=None, help="keep the other environment here")
    parser.add_argument("--part", choices=("bare", "sleep"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--slots", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        given.folder.mkdir(parents=True, exist_ok=True)
        bare(given.folder, given.trials) if given.part == "bare" else our_sleep(given.folder, given.slots, given.trials)
        return
    with tempfile.TemporaryDirectory() as home:
        if given.only != "others":
            lab(Path(home), given.trials)
        if given.only != "lab":
            others(Path(home), given.trials, given.venv)


if __name__ == "__main__":
    main()
