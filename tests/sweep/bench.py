"""A sweep over trials that cost nothing, without Hydra."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from opd_lab import config
from opd_lab.sweep.contract import Order
from opd_lab.sweep.live import Lines
from opd_lab.sweep.local import LocalLauncher
from opd_lab.sweep.points import KEY, Points
from opd_lab.sweep.points import parse as parse_points
from opd_lab.sweep.settings import LocalSettings, SweepSettings
from opd_lab.sweep.space import Condition, Space, parse
from opd_lab.sweep.study import Study, open_study
from opd_lab.sweep.trials import NoTree, Plan, Trials

METRIC = "eval/validation/avg_at_4"


def sweep_settings(**changes: Any) -> SweepSettings:
    values = yaml.safe_load((config.CONF / "sweep" / "default.yaml").read_text())
    return config.typed(SweepSettings, values | changes, "sweep")


def launcher(**changes: Any) -> LocalLauncher:
    values = yaml.safe_load((config.CONF / "launcher" / "local.yaml").read_text())
    return LocalLauncher(
        config.typed(LocalSettings, values | {"slots": 1, "poll_seconds": 0.005} | changes, "launcher")
    )


def identity(space: Space, settings: SweepSettings) -> dict[str, Any]:
    return {"space": space.texts, "config": {}, "sampler": settings.sampler}


def opened(
    folder: Path,
    settings: SweepSettings,
    *,
    steps: int = 4,
    runs: int = 1,
    objective: Mapping[str, str] | None = None,
    condition: Condition = lambda key, chosen: True,
    uri: str | None = None,
) -> Study:
    space = parse_points(settings.points) if settings.points else Space(parse(settings.space), condition)
    return open_study(
        "bench",
        uri or str(folder / "bench.journal"),
        space,
        settings,
        objective or {METRIC: "maximize"},
        identity(space, settings),
        every=1,
        steps=steps * runs,
    )


def orders(
    folder: Path, steps: int = 4, seeds: Sequence[int] = (0,), space: Space | None = None, **fixed: Any
) -> Callable[..., list[Order]]:
    """Runs that do what the params say, or what their point says."""

    def made(params: Mapping[str, Any]) -> list[Order]:
        if isinstance(space, Points):
            params = space.by_label[params[KEY]].values
        said = [json.dumps({"top": 0.5} | fixed | dict(params) | {"seed": seed}) for seed in seeds]
        return [Order("none", text, seed, steps, 1, str(folder / text)) for text, seed in zip(said, seeds)]

    return made


class Bench:
    """One call of the command."""

    def __init__(
        self, folder: Path, settings: SweepSettings, *, steps: int = 4, seeds: Sequence[int] = (0,), **rest: Any
    ):
        launched = rest.pop("launcher", None)
        ours = ("slots", "gpus", "trials_per_gpu", "memory_limit_gib", "grace_seconds", "start_seconds")
        launch = {key: rest.pop(key) for key in ours if key in rest}
        given = {key: rest.pop(key) for key in ("objective", "condition", "uri") if key in rest}
        self.study = opened(folder, settings, steps=steps, runs=len(seeds), **given)
        self.out = io.StringIO()
        view = Lines(self.study, Console(file=self.out, width=200))
        metrics = list(given.get("objective") or [METRIC])
        made = orders(folder, steps, seeds, self.study.space, **rest)
        plan = Plan(folder / "bench", metrics, settings, made, 0.005, "tasks:curve")
        self.trials = Trials(plan, self.study, launched or launcher(**launch), NoTree(), view)

    def run(self) -> Bench:
        self.trials.run()
        return self

    def table(self) -> list[dict[str, Any]]:
        """What two sweeps must agree in."""
        return [
            {"number": t.number, "state": t.state.name, "params": t.params, "values": t.values}
            | {"reported": t.intermediate_values}
            for t in self.study.trials()
        ]

    def states(self) -> str:
        return " ".join(t.state.name for t in self.study.trials())
