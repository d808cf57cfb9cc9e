"""Runs -> what the figures draw: runs pooled by method, their tables read once, and what a run had spent at a step."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dashboards.style import Style, styles
from opd_lab.compare.curves import curve
from opd_lab.compare.groups import Group, groups, params_of
from opd_lab.compare.table import Comparison, compare
from opd_lab.tracking import read

Frame = Any  # a table or column of pandas, whose own types know less than its documentation
STATUSES = ("FINISHED", "RUNNING", "FAILED", "KILLED")
READ_TABLES = 4096  # tables of single runs kept in memory
READ_CURVES = 4096  # curves of single methods kept in memory
MOST_POINTS = 250  # of a line: of longer runs only every n-th step is drawn, and the note says so


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
        found = []
        for group in self.groups:
            for folder in group.folders:
                logged = _logged(str(folder), _stamp(folder))
                for name in names:
                    if name in logged.names:
                        step_N, value_N = logged.of(name)
                        row = {"label": group.label, "folder": str(folder), "name": name}
                        found.append(pd.DataFrame({"step": step_N, "value": value_N}).assign(**row))
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=["label", "folder", "step"])

    def table(self, name: str) -> Frame:
        """A table of all runs, with the label of each row; empty where no run has it."""
        frames = [
            found.assign(label=group.label, folder=str(folder))
            for group in self.groups
            for folder in group.folders
            if len(found := _table(str(folder), name, _stamp(folder)))
        ]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["label", "folder", "step"])

    def present(self, found: Frame) -> list[str]:
        """The methods of which a table has rows, in their order."""
        there = set(found["label"].unique())
        return [label for label in self.labels if label in there]

    def names(self) -> list[str]:
        """Every metric that some run logged, from the first run of each method."""
        firsts = (group.folders[0] for group in self.groups)
        return sorted({name for folder in firsts for name in _logged(str(folder), _stamp(folder)).names})

    def compared(self, baseline: str | None = None) -> Comparison:
        """The final table of the finished runs.

        Raises:
            ValueError: there is none, or no such baseline.
        """
        stamps = tuple(_stamp(folder) for folder in self.folders)
        return _compared(tuple((group.label, *group.folders) for group in self.groups), baseline, stamps)


def select(runs: read.Runs, statuses: Collection[str] = STATUSES) -> Selected:
    """The runs of some statuses, pooled by method; there may be none."""
    found = groups(runs, statuses)
    return Selected(found, styles(group.label for group in found))


@dataclass(frozen=True)
class Curve:
    """One method over its training: what `compare.curves` says of it."""

    label: str
    points: Frame  # step, x, mean, low, high, lowest, highest, seeds, speaks_of
    every: int  # only every n-th step is among the points


def curves(selected: Selected, metric: str, x: str = "steps") -> list[Curve]:
    """A metric of every method that logged it against what its runs had spent: the rows of `compare.curves`, from
    tables that are read once for all figures.

    Raises:
        ValueError: an unknown x, or one that the runs did not log.
    """
    lines = []
    for group in selected.groups:
        points = _curve(tuple(group.folders), metric, x, tuple(map(_stamp, group.folders)))
        if len(points):
            every = -(-len(points) // MOST_POINTS)
            kept = sorted({*range(0, len(points), every), len(points) - 1})
            lines.append(Curve(group.label, points.iloc[kept], every))
    return lines


@lru_cache(READ_CURVES)
def _curve(folders: tuple[Path, ...], metric: str, x: str, stamps: tuple[float, ...]) -> Frame:
    return curve(folders, metric, x, _Remembered())


class _Remembered:
    """Runs as `tracking.read` gives them, from what has been read of them."""

    def metrics(self, where: Path, /, names: Collection[str]) -> Frame:
        logged = _logged(str(where), _stamp(where))
        found = [(name, *logged.of(name)) for name in sorted(names) if name in logged.names]
        rows = [pd.DataFrame({"step": step_N, "name": name, "value": value_N}) for name, step_N, value_N in found]
        return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=["step", "name", "value"])

    def evaluations(self, where: Path, /) -> Frame:
        return _table(str(where), "evaluations", _stamp(where))


def _stamp(folder: Path) -> float:
    """Changes whenever a run that goes on has written something."""
    files = ("status.json", "journal.jsonl", "segments")
    return max((folder / name).stat().st_mtime for name in files if (folder / name).exists())


@dataclass(frozen=True)
class Logged:
    """Every scalar of a run."""

    names: dict[str, int]  # name -> its code
    code_N: Frame
    step_N: Frame
    value_N: Frame

    def of(self, name: str) -> tuple[Frame, Frame]:
        """Steps and values of one metric."""
        mine_N = self.code_N == self.names[name]
        return self.step_N[mine_N], self.value_N[mine_N]


@lru_cache(READ_TABLES)
def _logged(folder: str, stamp: float) -> Logged:
    found: Frame = read.metrics(folder)
    if not len(found):
        return Logged({}, *np.empty((3, 0)))
    name_N = found["name"].astype("category").cat
    names = {str(name): code for code, name in enumerate(name_N.categories)}
    return Logged(names, name_N.codes.to_numpy(), found["step"].to_numpy(), found["value"].to_numpy())


@lru_cache(READ_TABLES)
def _compared(groups: tuple[tuple[Any, ...], ...], baseline: str | None, stamps: tuple[float, ...]) -> Comparison:
    return compare([Group(label, folders, params_of(folders[0])) for label, *folders in groups], baseline)


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
