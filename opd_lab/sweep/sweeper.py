"""Hydra's way in: `-m` ends here. Imported at every start, so everything heavy waits until a sweep begins."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

LAUNCHERS = {  # launcher.kind -> a class made from its own `Settings`
    "local": "opd_lab.sweep.local:LocalLauncher",
    "ray": "opd_lab.sweep.ray:RayLauncher",
    "slurm": "opd_lab.sweep.slurm:SlurmLauncher",
}


class OptunaSweeper(Sweeper):
    """Trials on Optuna, each a run of opd_lab. Its settings are the groups `sweep` and `launcher` of the config."""

    __module__ = "hydra_plugins.opd_lab"  # Hydra takes plugins from this package alone; conf/hydra/sweeper names it

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> Any:
        """Run a sweep to its end, then print and write what it found.

        Raises:
            ValueError: the question cannot be asked; nothing was started.
            SystemExit: 1 = no trial gave a result, or too many failed; 130 = stopped.
        """
        assert self.config is not None and self.hydra_context is not None
        name = getattr(self.task_function, "__name__", "")
        if name != "run":
            raise ValueError(f"-m sweeps over runs, not over {name}: leave it out")
        loader = self.hydra_context.config_loader
        launcher = make_launcher(self.config)  # first: its processes get warm while this one goes on
        from opd_lab.sweep import confirm, question, run

        asked = question.ask(
            self.config, arguments, question.loader_compose(loader, self.config), loader, launcher.threads
        )
        if asked.settings.confirm.top:
            asked = confirm.of(asked)
        code = run.run(asked, launcher)
        if code:
            raise SystemExit(code)


def register() -> None:
    """Give Hydra the sweeper. It finds plugins by a name in the package `hydra_plugins`, so there it gets one."""
    plugins = Plugins.instance()
    try:
        package = importlib.import_module("hydra_plugins")
    except ImportError:
        package = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
    setattr(package, "opd_lab", sys.modules[__name__])  # noqa: B010
    plugins.register(OptunaSweeper)


def make_launcher(cfg: DictConfig) -> Any:
    """The launcher of `launcher.kind`.

    Raises:
        ValueError: there is none, or not with these settings.
    """
    from opd_lab.config import typed

    values = OmegaConf.to_container(cfg.launcher, resolve=True)
    assert isinstance(values, dict)
    kind = values.get("kind")
    if kind not in LAUNCHERS:
        raise ValueError(f"launcher.kind must be one of {', '.join(LAUNCHERS)}, got {kind}")
    module, _, name = LAUNCHERS[kind].partition(":")
    cls = getattr(importlib.import_module(module), name)
    return cls(typed(cls.Settings, {str(key): value for key, value in values.items()}, "launcher"))
