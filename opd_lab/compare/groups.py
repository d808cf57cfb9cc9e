"""Which runs are one method: those that differ by their seed only."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opd_lab.tracking import read

Status = dict[str, Any]
LONG = 6  # characters of a number that nobody wrote by hand


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed only."""

    label: str
    folders: list[Path]
    params: dict[str, Any]  # without the seed


def groups(runs: read.Runs, statuses: Collection[str] | None = None) -> list[Group]:
    """The runs of these statuses (None: any) by method, in the order in which they started. Variants of a method are
    told apart by their own settings, so a label depends on which runs there are: whoever needs the same labels for some
    of them keeps the groups."""
    said = {folder: read.status(folder) for folder in read.folders(runs)}
    chosen = sorted(
        (f for f in said if statuses is None or said[f]["status"] in statuses), key=lambda f: said[f]["started"]
    )
    pooled: dict[str, list[Path]] = {}
    for folder in chosen:
        pooled.setdefault(setting(said[folder]), []).append(folder)
    alike: dict[str, dict[str, dict[str, Any]]] = {}  # method -> its settings
    for text, folders in pooled.items():
        alike.setdefault(method_name(said[folders[0]]), {})[text] = json.loads(text)
    label = {text: name for method, settings in alike.items() for text, name in _labels(method, settings).items()}
    return [Group(label[text], folders, json.loads(text)) for text, folders in pooled.items()]


def _labels(method: str, settings: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What each setting of a method is called: the method, and the values in which it differs from the others."""
    params = list(settings.values())
    said = {key: texts([one.get(key) for one in params]) for key in differing(params)}
    return {
        text: " ".join([method, *(f"{key.removeprefix('method.')}={values[place]}" for key, values in said.items())])
        for place, text in enumerate(settings)
    }


def finished(found: Sequence[Group]) -> list[Group]:
    """The same methods under the same labels, with the runs that have finished; those that have none are left out."""
    ended = [replace(one, folders=[f for f in one.folders if read.status(f)["status"] == "FINISHED"]) for one in found]
    return [group for group in ended if group.folders]


def setting(said: Status) -> str:
    """What all seeds of a method have in common, as text."""
    params = said["params"]
    return json.dumps(
        {k: v for k, v in params.items() if k != "seed" and not k.startswith("tracking.")}, sort_keys=True
    )


def params_of(folder: Path) -> dict[str, Any]:
    """The params of a group, of one of its runs."""
    return json.loads(setting(read.status(folder)))


def method_name(said: Status) -> str:
    return said["tags"].get("method", said["name"])


def differing(params: list[dict[str, Any]]) -> list[str]:
    """The keys that are not the same in all."""
    keys = sorted({key for one in params for key in one})
    return [key for key in keys if len({json.dumps(one.get(key)) for one in params}) > 1]


def texts(values: list[Any]) -> list[str]:
    """Each value in a few characters: a long number with as few digits, three or more, as tell it from the others."""
    different = len({json.dumps(value) for value in values})
    for digits in range(3, 17):
        few = [f"{v:.{digits}g}" if isinstance(v, float) and len(str(v)) > LONG else str(v) for v in values]
        if len(set(few)) == different:
            return few
    return list(map(str, values))


def settings_tried(found: list[Group]) -> dict[str, int]:
    """method -> settings of it that were tried in the experiments of these runs, shown or not: the budget of choosing.

    Runs that failed do not count, for they gave no number to choose by.
    """
    experiments = {folder.parent for group in found for folder in group.folders}
    tried: dict[str, set[str]] = {}
    for status in (path for experiment in experiments for path in experiment.glob("*/status.json")):
        said = read.status(status.parent)
        if said["status"] != "FAILED":
            tried.setdefault(method_name(said), set()).add(setting(said))
    names = {method_name(read.status(group.folders[0])) for group in found}
    return {name: len(tried[name]) for name in sorted(names)}
