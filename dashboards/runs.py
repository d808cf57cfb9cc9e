"""Runs -> what the figures draw: runs pooled by method, their tables read once, and what a run had spent at a step."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dashboards.style import Style, styles
from opd_lab.compare.budget import along, metrics_of
from opd_lab.compare.groups import Group, groups
from opd_lab.tracking import read

Frame = Any  # a table or column of pandas, whose own types know less than its documentation
STATUSES = ("FINISHED", "RUNNING", "FAILED", "KILLED")
READ_TABLES = 4096  # tables of single runs kept in memory
MOST_POINTS = 400  # of a line: of longer runs only every n-th step is drawn, and the note says so


AXES = {  # what curves are drawn against, as `compare.budget.along` counts it
    "steps": "steps",
    "student_tokens": "student tokens",
    "teacher_tokens": "teacher tokens, read or written",
    "seconds": "training time, seconds without evaluation",
    "flops": "FLOPs, estimated from tokens and parameters",
}


@dataclass(frozen=True)
class Selected:
    """Runs under comparison: one group per method, the seeds pooled, and a style for each."""

    groups: list[Group]
    styles: dict[str, Style] = field(default_factory=dict)

    @property
    def folders(self) -> list[Path]:
        return [folder for group in self.groups for folder in group.folders]

    @property
    def labels(self) -> list[str]:
        return [group.label for group in self.groups]

    def only(self, labels: Collection[str]) -> Selected:
        """Some of the methods, in the styles they have among all."""
        return Selected([group for group in self.groups if group.label in labels], self.styles)

    def metrics(self, names: Collection[str]) -> Frame:
        """label, folder, step, name, value."""
        return self._gather(lambda folder: _metrics(str(folder), names, _stamp(folder)))

    def table(self, name: str) -> Frame:
        """A table of all runs, with the label of each row; empty where no run has it."""
        return self._gather(lambda folder: _table(str(folder), name, _stamp(folder)))

    def _gather(self, one: Callable[[Path], Frame]) -> Frame:
        frames = [
            found.assign(label=group.label, folder=str(folder))
            for group in self.groups
            for folder in group.folders
            if len(found := one(folder))
        ]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["label", "folder", "step"])

    def names(self) -> list[str]:
        """Every metric that some run logged, from the first run of each method."""
        logged = [_logged(str(group.folders[0]), _stamp(group.folders[0])) for group in self.groups]
        return sorted({str(name) for found in logged if len(found) for name in found["name"].cat.categories})


def select(runs: read.Runs, statuses: Collection[str] = STATUSES) -> Selected:
    """The runs of some statuses, pooled by method; there may be none."""
    found = groups(runs, statuses)
    return Selected(found, styles(group.label for group in found))


@dataclass(frozen=True)
class Curve:
    """One method over its training: mean over its seeds, and the range they span."""

    label: str
    seeds: int
    points: Frame  # step, x, mean, low, high, seeds
    every: int  # only every n-th step is among the points


def curves(selected: Selected, metric: str, x: str = "steps") -> list[Curve]:
    """A metric of every method that logged it against what its runs had spent: like `compare.curves`, but from
    tables that are read once for all figures.

    Raises:
        ValueError: an unknown x, or one that the runs did not log.
    """
    found = selected.metrics([metric])
    if not len(found):
        return []
    found = found.dropna(subset="value").assign(x=_spent(found, x))
    out = []
    for label in [label for label in selected.labels if label in set(found["label"])]:
        mine = found[found["label"] == label]
        points = _over_seeds(mine)
        every = -(-len(points) // MOST_POINTS)
        thin = points.iloc[sorted({*range(0, len(points), every), len(points) - 1})]
        out.append(Curve(label, mine["folder"].nunique(), thin, every))
    return out


def _over_seeds(mine: Frame) -> Frame:
    """step, x, mean, low, high, seeds: over the runs that have come this far."""
    value_SR = mine.pivot(index="step", columns="folder", values="value")
    x_SR = mine.pivot(index="step", columns="folder", values="x")
    return pd.DataFrame(
        {
            "step": value_SR.index,
            "x": x_SR.mean(axis=1).to_numpy(),
            "mean": value_SR.mean(axis=1).to_numpy(),
            "low": value_SR.min(axis=1).to_numpy(),
            "high": value_SR.max(axis=1).to_numpy(),
            "seeds": value_SR.count(axis=1).to_numpy(),
        }
    )


def _spent(found: Frame, x: str) -> Frame:
    """What each row's run had spent when its step was over."""
    out = found["step"].astype(float)
    for folder, rows in found.groupby("folder") if x != "steps" else ():
        step_S, spent_S = _along(str(folder), x, _stamp(Path(folder)))
        at_N = np.searchsorted(step_S, rows["step"], side="right")
        out[rows.index] = np.concatenate([[0.0], spent_S])[at_N]
    return out


def _stamp(folder: Path) -> float:
    """Changes whenever a run that goes on has written something."""
    files = ("status.json", "journal.jsonl", "segments")
    return max((folder / name).stat().st_mtime for name in files if (folder / name).exists())


@lru_cache(READ_TABLES)
def _logged(folder: str, stamp: float) -> Frame:
    """Every scalar of a run: step, name (a category), value."""
    found = read.metrics(folder)
    return found.assign(name=found["name"].astype("category"))[["step", "name", "value"]] if len(found) else found


def _metrics(folder: str, names: Collection[str], stamp: float) -> Frame:
    found = _logged(folder, stamp)
    if not len(found):
        return found
    categories = found["name"].cat.categories
    wanted = np.isin(found["name"].cat.codes, [categories.get_loc(name) for name in names if name in categories])
    return found[wanted].astype({"name": str})


@lru_cache(READ_TABLES)
def _along(folder: str, x: str, stamp: float) -> tuple[Frame, Frame]:
    """steps, and what had been spent after each."""
    spent = along(x, _metrics(folder, metrics_of(x), stamp), Path(folder))
    return spent.index.to_numpy(), spent.to_numpy()


@lru_cache(READ_TABLES)
def _table(folder: str, name: str, stamp: float) -> Frame:
    return read.table(Path(folder), name)


def params(folders: Sequence[Path], keep: str = "") -> Frame:
    """One row per run: name, status, and every param and tag in which the runs differ, and `keep`. Lists as text."""
    rows = []
    for folder in folders:
        said = read.status(folder)
        values = {k: v if isinstance(v, str | int | float) else json.dumps(v) for k, v in said["params"].items()}
        rows.append({"run": said["name"], "status": said["status"], "folder": str(folder)} | said["tags"] | values)
    table: Frame = pd.DataFrame(rows)
    kept = [c for c in table if c in ("run", "status", "folder", keep) or table[c].astype(str).nunique() > 1]
    return table[kept]
