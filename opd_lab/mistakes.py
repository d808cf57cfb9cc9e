"""What was mistyped on the command line, said in one line: what, got, allowed, next."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

from opd_lab import config


def explain(error: HydraException, overrides: Sequence[str]) -> str:
    """One line for an error of composition."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        return f"{group}={name}: there is no such {group or 'config'}; {_near(name, list(error.options))}"
    if found := re.search(r"Could not override '([^']+)'", str(error)):
        return _unknown_key(found[1], overrides)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__


def _unknown_key(key: str, overrides: Sequence[str]) -> str:
    """The keys that do exist beside a misspelt one, under the config groups that were chosen."""
    parent, _, name = key.rpartition(".")
    groups = [word for word in overrides if re.fullmatch(r"[\w/]+=[\w,]+", word) and _is_group(word.split("=")[0])]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("config", [word.split(",")[0] for word in groups])
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if not isinstance(node, DictConfig):
        return f"{key} is not a key: there is no group {parent}"
    return f"{key} is not a key of {parent or 'the config'}; {_near(name, [str(k) for k in node if k != '_target_'])}"


def _is_group(name: str) -> bool:
    return (config.CONF / name).is_dir() or name == "sweeps"


def _near(name: str, options: list[str]) -> str:
    close = difflib.get_close_matches(name, options, n=1)
    return f"it has {', '.join(sorted(options)) or 'none'}" + (f"; did you mean {close[0]}?" if close else "")
