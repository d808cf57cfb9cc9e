"""Short runs of the lab, in this process or as the user's command."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from opd_lab import config, train
from opd_lab.run import Result, execute
from opd_lab.settings import RunSettings

SHORT = [
    "threads=1",
    "steps=4",
    "rollout.prompts=4",
    "rollout.per_prompt=2",
    "evaluate.every=2",
    "evaluate.problems=4",
    "evaluate.samples=2",
    "evaluate.test_problems=4",
    "evaluate.test_samples=2",
    "checkpoint.every=1",
    "diagnostics.every=2",
    "diagnostics.probe_rollouts=4",
    "diagnostics.estimator_rollouts=4",
    "data.problems=200",
    "objective=eval/validation/avg_at_2",
]


def settings(folder: Path, *overrides: str, mlflow: bool = False) -> RunSettings:
    """The settings of a short run whose books are kept below a folder."""
    GlobalHydra.instance().clear()
    own = [f"tracking.folder={folder}", f"tracking.mlflow={str(mlflow).lower()}"]
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return config.settings_of(compose("config", [*SHORT, *own, *overrides]))


def run(
    folder: Path, *overrides: str, mlflow: bool = False, name: str = "opd", say=print, on_step=lambda progress: None
) -> Result:
    chosen = settings(folder, *overrides, mlflow=mlflow)
    return execute(chosen, name, config_yaml=yaml.safe_dump(dataclasses.asdict(chosen)), say=say, on_step=on_step)


class Killed(BaseException):
    """As sudden as a signal."""


@contextmanager
def killed_after(step: int) -> Iterator[None]:
    """The run inside dies right after the checkpoint of a step, as `kill -9` would: nothing is closed."""
    save = train.Trainer.save

    def save_and_die(self: train.Trainer) -> Path:
        path = save(self)
        if self.step == step:
            raise Killed
        return path

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Trainer, "save", save_and_die)
        yield


def command(*words: str, cwd: Path, module: str = "opd_lab.cli") -> subprocess.CompletedProcess[str]:
    """What the user types, in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(config.ROOT), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", module, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
