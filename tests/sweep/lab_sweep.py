"""Sweeps of the lab in this process, as `python -m opd_lab -m` would ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from lab_run import SHORT
from omegaconf import DictConfig, open_dict

from opd_lab import config
from opd_lab.sweep import question
from opd_lab.sweep.question import Question


def asked(folder: Path, *arguments: str, mlflow: bool = False, short: Sequence[str] = SHORT) -> Question:
    """The question of a command line."""
    own = [*short, f"tracking.folder={folder}", f"tracking.mlflow={str(mlflow).lower()}"]
    config.register()
    mine = [word for word in arguments if word.startswith(("sweep.", "sweeps=", "launcher."))]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        master = compose("config", mine, return_hydra_config=True)
        return question.ask(master, [*own, *arguments], composed, None, threads=1)


def composed(overrides: Sequence[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("config", list(overrides), return_hydra_config=True)
    with open_dict(cfg):
        del cfg["sweep"], cfg["launcher"]
    return cfg
