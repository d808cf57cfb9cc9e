"""Sweeps whose whole process group is killed at random moments, against the same sweeps left alone.

    python benchmarks/sweep_resume.py [--only grid|search|compare] [--kills 5] [--seed 0] [--folder DIR]
                                      [--trials 40] [--steps 10] [--also key=value ...]

grid (methods) and search (TPE with pruning) are short runs in one slot; compare is sweeps/compare.yaml as it is, in
two slots and with MLflow. Each is run twice: once undisturbed, once killed (SIGKILL to the group) `--kills` times and
started again by the same command. Prints how the tables of trials compare: numbers, params in order, states, values and
reported values, bit for bit, and whether a finished trial was run again. Exit code 1 if anything differs. `--trials`
and `--steps` are of grid and search; `--also` changes all of them.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

SHORT = [
    *("rollout.prompts=4", "rollout.per_prompt=2", "evaluate.problems=8", "evaluate.samples=2", "evaluate.every=1"),
    *("evaluate.test_problems=4", "evaluate.test_samples=2", "checkpoint.every=1", "diagnostics.every=2"),
    *("data.problems=200", "launcher.slots=1", "threads=1", "objective=eval/validation/reverse_kl_mean_nats"),
    "tracking.mlflow=false",
]


def questions(trials: int, steps: int) -> dict[str, list[str]]:
    """Name -> what is said on the command line."""
    methods = "opd,opd_sampled,fire_opd,scope,tropd_lab,kat_lab"
    search = ["method=fire_opd,opd", "optim.lr=tag(log,interval(1e-5,3e-2))", "method.alpha=interval(0,2)"]
    rules = ["sweep.sampler=tpe", f"sweep.trials={trials}", "sweep.startup_trials=4", "sweep.pruner=median"]
    return {
        "grid": [*SHORT, f"method={methods}", f"steps={steps}"],
        "search": [*SHORT, *search, *rules, "sweep.pruning.startup_trials=3", f"steps={steps}"],
        "compare": ["sweeps=compare", "launcher.slots=2"],
    }


def start(folder: Path, name: str, words: list[str]) -> subprocess.Popen[bytes]:
    """The sweep, in a process group of its own."""
    own = [*words, f"sweep.name={name}", f"tracking.folder={folder}"]
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "opd_lab", "-m", *own],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ,
        )


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    journal = folder / "optuna" / f"{name}.journal"
    if not journal.exists() or not JournalStorage(JournalFileBackend(str(journal))).get_all_studies():
        return []
    trials = JournalStorage(JournalFileBackend(str(journal))).get_all_trials(0)
    return [
        {"number": t.number, "state": t.state.name, "params": t.params, "values": t.values}
        | {"reported": t.intermediate_values}
        for t in trials
    ]


def journals(folder: Path, name: str) -> dict[int, tuple[int, float]]:
    """Of every finished trial: size and time of its run's journal, which a second run would change."""
    out = {}
    for row in table(folder, name):
        if row["state"] in (TrialState.COMPLETE.name, TrialState.PRUNED.name):
            events = (folder / "optuna" / name / f"trial_{row['number']:04d}" / "events.jsonl").stat()
            out[row["number"]] = (events.st_size, events.st_mtime)
    return out


def begun(folder: Path, name: str) -> int:
    """How often a trial was started."""
    log = folder / f"{name}.log"
    return log.read_text().count(" started on ") if log.exists() else 0


def killed(
    folder: Path, name: str, words: list[str], kills: int, seconds: float, rng: random.Random
) -> tuple[int, bool]:
    """Run a sweep to its end through so many kills; how many hit it, and whether no finished trial ran again."""
    hits, kept, known = 0, True, {}
    while True:
        said = begun(folder, name)
        process = start(folder, name, words)
        while hits < kills and process.poll() is None and begun(folder, name) == said:
            time.sleep(0.05)  # until it has begun its first trial
        try:
            process.wait(rng.uniform(0, seconds / kills) if hits < kills else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(0.5)
            hits += 1
        now = journals(folder, name)
        kept &= all(now.get(number) == said for number, said in known.items())
        known = now
        if process.returncode == 0:
            return hits, kept
        assert process.returncode == -signal.SIGKILL, (folder / f"{name}.log").read_text()[-3000:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--only", choices=("grid", "search", "compare"), default=None)
    parser.add_argument("--also", nargs="+", default=[], metavar="key=value")
    given = parser.parse_args()
    home = given.folder or Path(tempfile.mkdtemp())
    rng, equal = random.Random(given.seed), True
    for name, words in questions(given.trials, given.steps).items():
        if given.only not in (None, name):
            continue
        words += given.also
        for part in ("whole", "killed"):
            (home / part).mkdir(parents=True, exist_ok=True)
        process, begin = start(home / "whole", name, words), time.monotonic()
        while process.poll() is None and not begun(home / "whole", name):
            time.sleep(0.05)
            begin = time.monotonic()
        code = process.wait()
        assert code == 0, (home / "whole" / f"{name}.log").read_text()[-3000:]
        seconds = time.monotonic() - begin
        hits, kept = killed(home / "killed", name, words, given.kills, seconds, rng)
        one, two = (table(home / part, name) for part in ("whole", "killed"))
        states = {state: sum(row["state"] == state for row in one) for state in sorted({row["state"] for row in one})}
        print(f"{name}: {len(one)} trials {states}, {seconds:.0f} s of trials undisturbed; killed {hits} times")
        for what in ("number", "state", "params", "values", "reported"):
            same = [row[what] for row in one] == [row[what] for row in two]
            equal &= same
            print(f"    {what:10} {'equal' if same else 'DIFFERENT'}")
        equal &= kept
        print(f"    finished trials run again: {'none' if kept else 'SOME'}")
    print("equal" if equal else "DIFFERENT", home)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
