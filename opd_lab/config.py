"""YAML -> frozen dataclasses, once. Nothing below this file knows omegaconf or Hydra.

Types and keys are checked here, the method's against its own dataclass; what a value must satisfy beyond its type is
checked by `check` and by the method itself, all before the first token.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from opd_lab.methods.base import Method
from opd_lab.settings import RunSettings
from opd_lab.tracking import read

PACKAGE = Path(__file__).parent
ROOT = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent  # a wheel carries conf/ and sweeps/ inside
CONF, SWEEPS = ROOT / "conf", ROOT / "sweeps"
_NOT_OURS = ("hydra", "experiment", "sweeps", "sweep", "launcher")  # groups that are no part of a run


OmegaConf.register_new_resolver("cut_lengths", lambda run: read.cut_lengths(run) if run else [], replace=True)


class SweepsAreAGroup(SearchPathPlugin):
    """Makes the folder `sweeps/` a config group, from any working directory."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("opd_lab", f"file://{ROOT}")


def register() -> None:
    """Tell Hydra about the package's own groups."""
    if SweepsAreAGroup not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(SweepsAreAGroup)


def typed(cls: type[Any], given: Mapping[str, Any], where: str) -> Any:
    """An instance of a dataclass from a mapping, every key known and of the right type.

    Raises:
        ValueError: names the key, what was given, and the keys or the type allowed.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{where}.{key} is not a key of {where}, which has {', '.join(known) or 'none'}{hint}")
    for name, f in known.items():
        if name not in given and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}.{name} is missing: a config must list every key of {where}")
    return cls(
        **{key: _as(hints[key], value, f"{where}.{key}".removeprefix("config.")) for key, value in given.items()}
    )


def _as(kind: Any, value: Any, where: str) -> Any:
    """A value as a type: an int may stand for a float, nothing else is converted."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a group of keys, got {value!r}")
        return typed(cast(type[Any], kind), value, where)
    if typing.get_origin(kind) is list and isinstance(value, list):
        return [_as(typing.get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_as(typing.get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for one in kinds:
        if dataclasses.is_dataclass(one) and isinstance(value, Mapping):
            return _as(one, value, where)
        if typing.get_origin(one) in (list, tuple) and isinstance(value, list):
            return _as(one, value, where)
        plain = typing.get_origin(one) or one
        if plain is float and type(value) is int:
            return float(value)
        if plain is Any or plain is type(value):
            return value
    allowed = " or ".join("null" if one is types.NoneType else getattr(one, "__name__", str(one)) for one in kinds)
    raise ValueError(f"{where} must be {allowed}, got {value!r}")


def method_of(values: dict[str, Any], allow: list[str]) -> Method:
    """The method that `_target_` names, from our own package or one that the command line allowed.

    Raises:
        ValueError: a target from elsewhere, an unknown class, or fields the class refuses.
    """
    target = str(values.get("_target_", ""))
    module, _, name = target.rpartition(".")
    packages = ["opd_lab.methods", *allow]
    if not any(module == package or module.startswith(package + ".") for package in packages):
        raise ValueError(
            f"method._target_ must lie in {' or '.join(packages)}, got {target or 'nothing'}; "
            f"for a package of your own add allow=[{module.split('.')[0] or 'PACKAGE'}]"
        )
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"method._target_={target} cannot be imported: {error}") from None
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise ValueError(f"method._target_={target} must be a subclass of opd_lab.methods.base.Method")
    return typed(cls, {key: value for key, value in values.items() if key != "_target_"}, "method")


def settings_of(cfg: DictConfig) -> RunSettings:
    """The settings of a run from its composed config."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        values = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    except InterpolationResolutionError as error:
        raise ValueError(str(error).splitlines()[0].rpartition("interpolation: ")[2]) from None
    if missing:
        raise ValueError(f"{missing[0]} must be given: add {missing[0]}=... to the command")
    settings = typed(RunSettings, {k: v for k, v in values.items() if k not in _NOT_OURS}, "config")
    check(settings)
    return settings


def check(s: RunSettings) -> None:
    """Refuse values that no run can have; each message says what, got and allowed."""
    for name, value, low in (
        ("steps", s.steps, 0),
        ("rollout.prompts", s.rollout.prompts, 1),
        ("rollout.per_prompt", s.rollout.per_prompt, 1),
        ("rollout.max_tokens", s.rollout.max_tokens, 1),
        ("rollout.decode_rows", s.rollout.decode_rows, 1),
        ("rollout.top_k", s.rollout.top_k, 0),
        ("optim.micro_batch", s.optim.micro_batch, 1),
        ("optim.updates_per_rollout", s.optim.updates_per_rollout, 1),
        ("optim.chunk_tokens", s.optim.chunk_tokens, 1),
        ("optim.warmup_steps", s.optim.warmup_steps, 0),
        ("optim.lr", s.optim.lr, 0),
        ("evaluate.every", s.evaluate.every, 0),
        ("evaluate.samples", s.evaluate.samples, 1),
        ("evaluate.test_samples", s.evaluate.test_samples, 1),
        ("evaluate.max_tokens", s.evaluate.max_tokens, 1),
        ("checkpoint.every", s.checkpoint.every, 0),
        ("checkpoint.keep_last", s.checkpoint.keep_last, 1),
        ("tracking.picture_every", s.tracking.picture_every, 1),
        ("diagnostics.every", s.diagnostics.every, 0),
        ("diagnostics.quadrant_windows", s.diagnostics.quadrant_windows, 1),
        ("diagnostics.rollout_records", s.diagnostics.rollout_records, 0),
        ("diagnostics.gradient_every", s.diagnostics.gradient_every, 0),
        ("diagnostics.probe_rollouts", s.diagnostics.probe_rollouts, 0),
        ("diagnostics.probe_shown", s.diagnostics.probe_shown, 0),
        ("diagnostics.estimator_rollouts", s.diagnostics.estimator_rollouts, 0),
        ("diagnostics.estimator_topk", s.diagnostics.estimator_topk, 1),
        ("diagnostics.alarms.first_steps", s.diagnostics.alarms.first_steps, 1),
        ("diagnostics.alarms.patience", s.diagnostics.alarms.patience, 1),
        ("diagnostics.alarms.drop_fraction", s.diagnostics.alarms.drop_fraction, 0),
        ("diagnostics.alarms.drop_errors", s.diagnostics.alarms.drop_errors, 0),
    ):
        if value < low:
            raise ValueError(f"{name} must be >= {low}, got {value}")
    for name, value in (
        ("rollout.temperature", s.rollout.temperature),
        ("evaluate.temperature", s.evaluate.temperature),
    ):
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}; for nearly greedy text use top_k=1")
    for name, value in (
        ("rollout.top_p", s.rollout.top_p),
        ("evaluate.top_p", s.evaluate.top_p),
        ("diagnostics.high_loss_quantile", s.diagnostics.high_loss_quantile),
        ("diagnostics.quadrant_high_quantile", s.diagnostics.quadrant_high_quantile),
        ("diagnostics.quadrant_improvement_quantile", s.diagnostics.quadrant_improvement_quantile),
    ):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {value}")
    for name, value, allowed in (
        ("rollout.engine", s.rollout.engine, ("torch",)),
        ("optim.schedule", s.optim.schedule, ("constant", "linear", "cosine")),
        ("checkpoint.resume", s.checkpoint.resume, ("auto", "never")),
        ("diagnostics.on_alarm", s.diagnostics.on_alarm, ("warn", "stop")),
        ("data.kind", s.data.kind, ("arithmetic", "file")),
        ("data.grader", s.data.grader, ("exact", "math_verify", "none")),
        ("model.student.dtype", s.model.student.dtype, ("float32", "bfloat16")),  # a float16 gradient underflows
        ("model.teacher.dtype", s.model.teacher.dtype, ("float32", "bfloat16", "float16")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value}")
    if s.model.teacher_floor_nats is not None and not s.model.teacher_floor_nats < 0:
        raise ValueError(f"model.teacher_floor_nats must be below 0 or null, got {s.model.teacher_floor_nats}")
    if s.evaluate.test_best and not s.checkpoint.keep_best:
        raise ValueError(
            "evaluate.test_best needs checkpoint.keep_best=true, got false; or set evaluate.test_best=false"
        )


def digest(settings: RunSettings) -> str:
    """Eight hex digits of everything that decides a run's result: a changed config is another run. What came later
    than some runs, and therefore has a default, counts where it is another value."""
    values = _without_defaults(settings, dataclasses.asdict(settings))
    for group in ("tracking", "checkpoint", "objective", "threads"):
        values.pop(group)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def _without_defaults(settings: Any, values: dict[str, Any]) -> dict[str, Any]:
    for f in dataclasses.fields(settings):
        mine = getattr(settings, f.name)
        if f.default is not dataclasses.MISSING and mine == f.default:
            del values[f.name]
        elif dataclasses.is_dataclass(mine):
            _without_defaults(mine, values[f.name])
    return values


def run_name(settings: RunSettings, method_name: str) -> str:
    """`fire_opd-s0-1a2b3c4d`: the method's config, the seed, a digest of everything that decides the result."""
    return settings.tracking.name or f"{method_name}-s{settings.seed}-{digest(settings)}"


def run_folder(settings: RunSettings, method_name: str) -> Path:
    return Path(settings.tracking.folder).absolute() / settings.tracking.experiment / run_name(settings, method_name)


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as dotted keys: what MLflow shows as params."""
    if not isinstance(values, dict):
        return {prefix: values}
    items: dict[str, Any] = {}
    for key, value in values.items():
        items |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return items


def method_name(cfg: DictConfig) -> str:
    """The name of the method's config file: `fire_full` is another method than `fire_opd`."""
    return str(HydraConfig.get().runtime.choices["method"])


def as_yaml(cfg: DictConfig) -> str:
    """The resolved config of a run, without Hydra's own."""
    values = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    return OmegaConf.to_yaml(OmegaConf.create({k: v for k, v in values.items() if k not in _NOT_OURS}))
