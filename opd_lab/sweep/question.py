"""What a sweep asks: space and fixed settings, of a file and of the command line, checked before anything runs."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from opd_lab import config
from opd_lab.compare.guard import comparable, direction
from opd_lab.mistakes import explain
from opd_lab.settings import RunSettings
from opd_lab.sweep import points
from opd_lab.sweep.contract import Order
from opd_lab.sweep.settings import SweepSettings, check
from opd_lab.sweep.space import Condition, Params, Space, describe, parameter, parse, written

_SWEEPS = ("sweep", "sweeps", "launcher", "hydra")  # what an override says of the sweep itself
Compose = Callable[[Sequence[str]], DictConfig]  # overrides -> the whole config, Hydra's part included


@dataclass(frozen=True)
class Question:
    """A sweep file and a command line, understood."""

    name: str
    settings: SweepSettings
    space: Space
    fixed: Sequence[str]  # overrides of every trial
    objective: Mapping[str, str]  # metric -> maximize | minimize
    compose: Compose
    threads: int  # CPU threads of a run that does not say

    def orders(self, params: Params) -> list[Order]:
        """The runs of a trial, one per seed.

        Raises:
            ValueError: no run can have these params.
        """
        return [order for order, _ in self.runs(params)]

    def runs(self, params: Params) -> list[tuple[Order, RunSettings]]:
        overrides = [*self.fixed, *self.space.overrides(params), f"objective={written(next(iter(self.objective)))}"]
        seeds = [[f"seed={seed}"] for seed in self.settings.seeds or ()] or [[]]
        return [self._run([*overrides, *seed]) for seed in seeds]

    def _run(self, overrides: Sequence[str]) -> tuple[Order, RunSettings]:
        cfg = composed(self.compose, overrides)
        if cfg.threads is None:
            cfg.threads = self.threads
        method = str(cfg.hydra.runtime.choices["method"])
        ours = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        settings = config.settings_of(ours)
        config.method_of(settings.method, settings.allow)
        order = Order(
            method=method,
            config=config.as_yaml(ours),
            seed=settings.seed,
            steps=settings.steps,
            every=settings.evaluate.every,
            folder=str(config.run_folder(settings, method)),
        )
        return order, settings

    @cached_property
    def samples(self) -> list[tuple[Order, RunSettings]]:
        """A run of every method: what is wrong with all of them is found here, before the first trial.

        Raises:
            ValueError: a key of the space that no run has, or a value that none can have.
        """
        points = list(self.space.samples())
        for one in self.space.parameters:
            if not any(one.key in point for point in points):
                methods = self.space.parameters[0].text if self.space.parameters[0].key == "method" else "the method"
                raise ValueError(f"sweep.space.{one.key} is a key of no run: {methods} has none of this name")
        found = [self.runs(point)[0] for point in points]
        folders = [order.folder for order, _ in found]
        for place, folder in enumerate(folders):
            if folder in folders[:place]:
                one, other = points[folders.index(folder)], points[place]
                raise ValueError(f"points of a sweep must be different runs, got {describe(one)} and {describe(other)}")
        return found

    @property
    def identity(self) -> dict[str, Any]:
        """What may not change when the sweep goes on."""
        s = self.settings
        configs: dict[str, Any] = {}
        for params, (order, _) in zip(self.space.samples(), self.samples):
            values = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(order.config)))
            method = values.pop("method")
            for group in ("tracking", "checkpoint", "objective", "threads", "seed" if s.seeds else ""):
                values.pop(group, None)
            mine = self.space.decides(params)
            all_ = config.flat(values) | config.flat(method, f"method={order.method}")
            configs |= {k: v for k, v in all_.items() if k not in mine and _method_key(k) not in mine}
        return {
            "space": self.space.texts,
            "config": configs,
            "seeds": s.seeds,
            "objective": self.objective,
            "sampler": s.sampler or "grid",
            "startup_trials": s.startup_trials,
            "population": s.population,
            "seed": s.seed,
            "pruner": s.pruner,
            "pruning": vars(s.pruning) if s.pruner else None,
            "condition": s.condition,
        }


def ask(cfg: DictConfig, arguments: Sequence[str], compose: Compose, loader: Any, threads: int) -> Question:
    """Understand a sweep.

    Raises:
        ValueError: what, got, allowed, next.
    """
    settings: SweepSettings = config.typed(SweepSettings, _plain(cfg.sweep), "sweep")
    check(settings)
    file = cfg.hydra.runtime.choices.get("sweeps")
    given = OverridesParser.create(loader).parse_overrides(list(arguments))
    ours = [o for o in given if o.key_or_group.replace("/", ".").partition(".")[0] not in _SWEEPS]
    swept = [parameter(o) for o in ours if o.is_sweep_override()]
    said = {o.get_key_element().lstrip("+~"): str(o.input_line) for o in ours if not o.is_sweep_override()}
    taken = said.keys() | {p.key for p in swept}
    fixed = {key: value for key, value in _flat(settings.fixed).items() if key not in taken}
    drawn = parse({key: value for key, value in settings.space.items() if key not in taken}, loader)
    space = Space(sorted([*drawn, *swept], key=lambda p: p.key != "method"))
    if settings.points is not None:
        if swept:
            raise ValueError(f"{swept[0].key} must be one value with sweep.points, got several; name a point for each")
        space = points.parse(settings.points)
    for key in space.keys:
        if key in fixed:
            group = "space" if settings.points is None else "points"
            raise ValueError(f"{key} is both in sweep.{group} and in sweep.fixed; leave it in one of them")
        if settings.points is not None and key in said:
            raise ValueError(f"{key} is both in sweep.points and on the command line; leave it in one of them")
        if key == "seed" and settings.seeds:
            raise ValueError("seed cannot be in the space of a sweep with sweep.seeds; set sweep.seeds=null")
    if settings.seeds and "seed" in said:
        raise ValueError(f"{said['seed']} has no effect with sweep.seeds={settings.seeds}; set sweep.seeds=null")
    overrides = [f"{key}={written(value)}" for key, value in fixed.items()] + list(said.values())
    digest = _digest([p.override("") + p.text for p in space.parameters], overrides)
    elsewhere = [str(o.value()) for o in ours if o.get_key_element() == "tracking.experiment"]
    name = settings.name or "-".join([file, *elsewhere] if file else ["multirun", digest])
    for key, one in (("name", name), ("confirm.name", settings.confirm.name)):
        if one is not None and not re.fullmatch(r"[\w.-]+", one):
            raise ValueError(f"sweep.{key} must be letters, digits, '_', '-' and '.', got {one}")
    if file and "tracking.experiment" not in fixed.keys() | said.keys():
        overrides.append(f"tracking.experiment={written(name)}")
    first = [p.override(p.finite[0]) for p in space.parameters[:1] if p.key == "method" and p.finite]
    if settings.points is not None:
        first = space.overrides(next(space.samples()))
    base = composed(compose, [*overrides, *first])
    overrides.append(f"tracking.folder={written(str(Path(base.tracking.folder).absolute()))}")
    objective = settings.objective or {base.objective: direction(base.objective)}
    for metric in objective:
        comparable(metric, space.keys)
    _prunable(settings, objective, base, space.keys)
    if settings.points is None:
        space = replace(space, condition=_condition(settings.condition, base, overrides, compose))
    return Question(name, settings, space, overrides, objective, compose, threads)


def composed(compose: Compose, overrides: Sequence[str]) -> DictConfig:
    """A config, or what was mistyped in one line.

    Raises:
        ValueError: it cannot be composed.
    """
    try:
        return compose(overrides)
    except HydraException as error:
        raise ValueError(explain(error, overrides)) from None


def _prunable(s: SweepSettings, objective: Mapping[str, str], base: DictConfig, space: Sequence[str]) -> None:
    metric = next(iter(objective))
    if s.pruner is None:
        return
    if metric.startswith("eval/test/") or base.evaluate.every == 0:
        raise ValueError(
            f"sweep.pruner={s.pruner} needs a number from every evaluation, got objective {metric} with "
            f"evaluate.every={base.evaluate.every}; choose eval/validation/* and evaluate.every >= 1"
        )
    once = base.evaluate.every >= base.steps and len(s.seeds or [0]) == 1
    if once and not {"steps", "evaluate.every"} & set(space):
        raise ValueError(
            f"sweep.pruner={s.pruner} needs an evaluation before the last step, evaluate.every < steps, "
            f"got evaluate.every={base.evaluate.every} with steps={base.steps}; evaluate more often, or set it to null"
        )
    if s.pruner == "wilcoxon" and not metric.startswith("eval/validation/avg_at_"):
        raise ValueError(f"sweep.pruner=wilcoxon compares the accuracy of problems, got objective {metric}")


def _condition(name: str, base: DictConfig, fixed: Sequence[str], compose: Compose) -> Condition:
    """The hook that says which keys a trial has."""
    allow = list(base.allow)
    if name == "all":
        return lambda key, chosen: True
    if name == "method_has_key":
        keys: dict[str, set[str]] = {}

        def has(key: str, chosen: Params) -> bool:
            if not key.startswith("method."):
                return True
            mine = str(chosen.get("method", base.hydra.runtime.choices["method"]))
            if mine not in keys:
                only = [word for word in fixed if not word.lstrip("+").startswith(("method.", "method="))]
                keys[mine] = set(config.flat(_plain(composed(compose, [*only, f"method={mine}"]).method)))
            return any(f"method.{one}.".startswith(f"{key}.") for one in keys[mine])

        return has
    module, _, function = name.partition(":")
    if module.split(".")[0] not in allow or not function:
        raise ValueError(
            f"sweep.condition must be all, method_has_key, or module:function of a package in allow={allow}, got {name}"
        )
    return getattr(importlib.import_module(module), function)


def _method_key(key: str) -> str:
    """`method=opd.alpha` of an identity -> `method.alpha`"""
    return "method." + key.partition(".")[2] if key.startswith("method=") else key


def _plain(cfg: Any) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return config.flat(dict(values)) if values else {}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


def loader_compose(loader: Any, master: DictConfig) -> Compose:
    """Hydra's way to the config of one job of a multirun."""

    def compose(overrides: Sequence[str]) -> DictConfig:
        cfg = loader.load_sweep_config(master, list(overrides))
        with open_dict(cfg):
            del cfg["sweep"], cfg["launcher"]
        return cfg

    return compose
