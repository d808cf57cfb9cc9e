"""What a step of each method costs beside one of plain OPD, on the embedded lab.

    python benchmarks/method_cost.py [steps] [method ...]

All methods take their steps in turn in one process, so that a busy machine slows all of them alike; each is compared
with the plain steps of the same rounds. Printed are medians: the ratio of a step's time, of its rollout alone, and the
tokens per step that student and teacher wrote and that the teacher scored.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from opd_lab import config, preparation
from opd_lab.run import load_parts
from opd_lab.tracking.tracker import FanOut
from opd_lab.train import Trainer
from opd_lab.types import Report

METHODS = ["opd", "opd_sampled", "rock_tokens", "fire_opd", "scope", "oprd_bridge_lab", "trb_lab", "skd", "sft"]
METHODS += ["tropd_lab", "kat_lab", "omniopd_lab"]
COUNTS = ("cost/generated_tokens", "cost/teacher_scored_tokens", "cost/teacher_decoded_tokens")
COUNTS += ("cost/teacher_generated_tokens",)


def trainer(method: str, folder: Path) -> Trainer:
    config.register()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        chosen = [f"method={method}", "steps=50", "threads=1", f"tracking.folder={folder}", "diagnostics.every=1000"]
        settings = config.settings_of(compose("config", chosen))
    parts = load_parts(settings, lambda note: None)
    made = Trainer(settings, parts, FanOut([]), folder)
    made.begin_with(preparation.prepare(settings, parts, lambda note: None))
    return made


def main(steps: int, methods: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: trainer(name, Path(folder)) for name in methods}
        reports: dict[str, list[Report]] = {name: [] for name in methods}
        for _ in range(steps):
            for name, one in trainers.items():
                reports[name].append(one.advance())
    print(f"{steps} steps of 64 rollouts, torch {torch.__version__}, one thread; ratios to opd of the same round")
    head = ["method", "step", "rollout", "student wrote", "teacher scored", "teacher read", "teacher wrote"]
    print("{:18}{:>8}{:>9}{:>15}{:>16}{:>14}{:>15}".format(*head))
    for name in methods:
        times = [
            statistics.median(
                own.scalars[metric] / plain.scalars[metric] for own, plain in zip(reports[name], reports["opd"])
            )
            for metric in ("time/step_seconds", "time/rollout_seconds")
        ]
        last = reports[name][-1].scalars
        counts = [last.get(count, 0.0) / steps for count in COUNTS]
        print(
            f"{name:18}{times[0]:8.2f}{times[1]:9.2f}"
            + "".join(f"{c:{w},.0f}" for c, w in zip(counts, (15, 16, 14, 15)))
        )


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    main(count, ["opd", *[m for m in (sys.argv[2:] or METHODS) if m != "opd"]])
