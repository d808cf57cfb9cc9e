"""What Hydra does for us: one run, a check of everything, or with `-m` a sweep, from overrides alone."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig

from opd_lab import config
from opd_lab.mistakes import explain
from opd_lab.sweep import sweeper

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")


def run(cfg: DictConfig) -> float:
    """Hydra's task: one run; its return value is what a sweep reads."""
    from opd_lab.progress import line
    from opd_lab.run import execute

    if (sweep := HydraConfig.get().runtime.choices.get("sweeps")) is not None:
        raise ValueError(f"sweeps={sweep} asks for many runs: opd-lab sweep {sweep}, or -m sweeps={sweep}")
    settings, name = config.settings_of(cfg), config.method_name(cfg)
    with line(name, settings) as show:
        return execute(settings, name, config_yaml=config.as_yaml(cfg), on_step=show.step, say=show.say).objective


def doctor(cfg: DictConfig) -> None:
    """Hydra's task: every check, printed; nothing is trained."""
    from opd_lab.run import examine

    examine(config.settings_of(cfg), config.method_name(cfg), config.as_yaml(cfg), print)


def app(task: Callable[[DictConfig], float | None]) -> None:
    """Compose the command line's config and give it to a task. What a user can mend is said in one line."""

    @functools.wraps(task)
    def guarded(cfg: DictConfig) -> float | None:
        try:
            return task(cfg)
        except ValueError as error:
            print(f"opd-lab: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    config.register()
    sweeper.register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of being printed by Hydra
    try:
        hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="config")(guarded)()
    except (HydraException, ValueError) as error:
        said = explain(error, sys.argv[1:]) if isinstance(error, HydraException) else error
        print(f"opd-lab: {said}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
