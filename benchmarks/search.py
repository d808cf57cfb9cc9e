"""Does a search that learns find good settings for less than one that draws at random?

    python benchmarks/search.py [--repetitions 5] [--trials 20] [--steps 20] [--folder opd_runs/benchmark_search]

The learning rate (1e-5 to 3e-2, logarithmic) and alpha (0 to 4) of method=fire_opd on the embedded lab, ranked by the
exact KL on held-out rollouts. Random search runs every trial to its end; TPE, which may use half as many trials again,
prunes by the median. A repetition has one seed for both searches, so that their first five trials have the same params.
A search has one slot, so that its trials follow one another in the same way on any machine; two searches run side by
side. The same command goes on where it stopped.

Printed per repetition: random's best KL, the student tokens that each search generated, pruned trials included, until
it had a finished trial as good as that, and what each found in all. In the medians `never` is more than any number.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

SIDE_BY_SIDE = 2  # searches at once
SPACE = ["optim.lr=tag(log,interval(1e-5,3e-2))", "method.alpha=interval(0,4)"]
RUN = [
    *("method=fire_opd", "rollout.prompts=8", "evaluate.every=5", "evaluate.problems=32", "evaluate.test_problems=8"),
    *(
        "data.problems=2000",
        "evaluate.test_best=false",
        "checkpoint.every=0",
        "checkpoint.keep_best=false",
        "diagnostics.every=0",
    ),
    *("threads=1", "tracking.mlflow=false", "objective=eval/validation/reverse_kl_mean_nats"),
]
HOW = {
    "random": ["sweep.sampler=random"],
    "tpe": [
        *("sweep.sampler=tpe", "sweep.startup_trials=5", "sweep.pruner=median"),
        *("sweep.pruning.startup_trials=4", "sweep.pruning.warmup_steps=4"),
    ],
}


def search(folder: Path, how: str, seed: int, trials: int, steps: int) -> list[FrozenTrial]:
    """A search to its end, or what is left of it; its trials in order."""
    name = f"{how}{seed}"
    own = [f"sweep.name={name}", f"sweep.seed={seed}", f"sweep.trials={trials}", f"steps={steps}", "launcher.slots=1"]
    words = [*RUN, *SPACE, *HOW[how], *own, f"tracking.folder={folder}", f"tracking.experiment={name}"]
    done = subprocess.run([sys.executable, "-m", "opd_lab", "-m", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    return JournalStorage(JournalFileBackend(str(folder / "optuna" / f"{name}.journal"))).get_all_trials(0)


def progress(trials: list[FrozenTrial]) -> Iterator[tuple[float, float]]:
    """After each trial: student tokens so far, and the lowest KL of a finished one."""
    tokens, best = 0.0, math.inf
    for trial in trials:
        tokens += trial.user_attrs.get("tokens", 0.0)
        if trial.state == TrialState.COMPLETE:
            best = min(best, trial.values[0])
        yield tokens, best


def reached(trials: list[FrozenTrial], goal: float) -> float:
    """Student tokens until a finished trial was as good; infinite = never."""
    return next((tokens for tokens, best in progress(trials) if best <= goal), math.inf)


def written(tokens: float) -> str:
    return f"{tokens:,.0f}" if math.isfinite(tokens) else "never"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--trials", type=int, default=20, help="of random search; TPE may use half as many again")
    parser.add_argument("--steps", type=int, default=20, help="of a trial")
    parser.add_argument("--folder", type=Path, default=Path("opd_runs/benchmark_search"))
    given = parser.parse_args()
    folder, trials = given.folder.absolute(), {"random": given.trials, "tpe": given.trials * 3 // 2}
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        begun = {
            (how, seed): pool.submit(search, folder, how, seed, trials[how], given.steps)
            for seed in range(given.repetitions)
            for how in HOW
        }
        found = {key: future.result() for key, future in begun.items()}
    print("      | random's |  tokens until as good |    tokens in all      |    best KL     | TPE: trials")
    print(" seed |  best KL |    random        TPE |    random        TPE | random     TPE | pruned   failed")
    needed: dict[str, list[float]] = {how: [] for how in HOW}
    spent: dict[str, list[float]] = {how: [] for how in HOW}
    for seed in range(given.repetitions):
        ends = {how: list(progress(found[how, seed]))[-1] for how in HOW}
        goal = ends["random"][1]
        for how in HOW:
            needed[how].append(reached(found[how, seed], goal))
            spent[how].append(ends[how][0])
        states = [trial.state for trial in found["tpe", seed]]
        row = [written(needed[how][-1]) for how in HOW] + [written(spent[how][-1]) for how in HOW]
        print(
            f"{seed:5} | {goal:8.4f} | {row[0]:>9} {row[1]:>10} | {row[2]:>9} {row[3]:>10} |"
            f" {goal:.4f}  {ends['tpe'][1]:.4f} |"
            f" {states.count(TrialState.PRUNED):6} {states.count(TrialState.FAIL):8}"
        )
    middle = {how: median(needed[how]) for how in HOW}
    whole = {how: median(spent[how]) for how in HOW}
    print(f"median student tokens until as good as random's best: random {written(middle['random'])}, TPE", end=" ")
    print(f"{written(middle['tpe'])}, ratio {middle['tpe'] / middle['random']:.2f}")
    print(f"median student tokens of the whole search: random {written(whole['random'])}, TPE {written(whole['tpe'])}")


if __name__ == "__main__":
    main()
