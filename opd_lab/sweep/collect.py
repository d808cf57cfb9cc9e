"""A Hydra callback: remembers the runs of a multirun and, at its end, prints their table and writes their report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from opd_lab import config


class Collect(Callback):
    """Runs are known by their config, so a run that was finished before counts as well."""

    def __init__(self) -> None:
        self._folders: list[Path] = []
        self._failed: list[str] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        from opd_lab.run import run_folder

        if job_return.status == JobStatus.COMPLETED:
            self._folders.append(run_folder(*_identity(config)))
        else:
            self._failed.append(f"{' '.join(job_return.overrides or [])}: {job_return._return_value}")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from opd_lab.results import show_runs

        for line in self._failed:
            print(f"FAILED {line}")
        if self._folders:
            show_runs(self._folders, Path(config.tracking.folder).absolute() / config.tracking.experiment)


def _identity(cfg: DictConfig) -> tuple[Any, str]:
    ours = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    return config.settings_of(ours), str(cfg.hydra.runtime.choices["method"])
