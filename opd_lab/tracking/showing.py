"""Report -> the files that MLflow's UI shows: pictures with key and step, tables, and a page of rollouts.

The names of pictures are those that `mlflow.log_image` gives, except that what is random there follows here from the
run and the step: a report that is delivered twice, or rebuilt, leaves the same files.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from pathlib import Path
from typing import Any

from opd_lab.tracking.coloured import page
from opd_lab.tracking.figures import heat_map, position_map
from opd_lab.types import Report

DIGITS = 4  # of the numbers in MLflow's tables; the run folder's files have all
POSITIONS = "kl/by_position_nats"
TABLES = ("high_loss_tokens", "rollouts")
FIRST = ("token", "prompt", "kl_mean_nats", "text", "reward", "count")  # MLflow groups by a table's first column


class Shown:
    """What a run has shown so far. A picture shows training up to its step, so one in `picture_every` steps is enough:
    to draw them takes longer than a small step of training does."""

    def __init__(self, picture_every: int = 1) -> None:
        self._every = picture_every
        self._histograms: dict[str, tuple[str, dict[int, list[int]]]] = {}  # name -> bins, step -> counts
        self._positions: dict[int, list[float]] = {}  # step -> mean KL by decile of the response
        self._drawn: dict[str, int] = {}  # picture -> step at which it was drawn last
        self._undrawn: dict[str, Report] = {}  # picture -> the last report that it has not shown

    def add(self, report: Report, folder: Path, seed: str) -> dict[str, str]:
        """Write the files of a report below a folder; the tags that make MLflow look at them."""
        self._remember(report)
        due = self._take_due()
        for name, of in due:
            self._picture(name, of, folder, seed)
        tables = [name for name in TABLES if report.tables.get(name)]
        for name in tables:
            _write(folder / f"{name}.json", json.dumps(_table(report.tables[name])))
        if rows := report.tables.get("rollouts"):
            text = page(rows, f"{seed}: rollouts of step {report.step}")
            _write(folder / "rollouts" / f"step_{report.step:06d}.html", text)
        tags = {"mlflow.loggedImages": "True"} if due else {}
        shown = [{"path": f"{name}.json", "type": "table"} for name in TABLES]
        return tags | ({"mlflow.loggedArtifacts": json.dumps(shown)} if tables else {})

    def skip(self, report: Report) -> None:
        """As `add`, where the files are there already."""
        self._remember(report)
        self._take_due()

    def finish(self, folder: Path, seed: str) -> None:
        """Write the pictures of what has come since the last."""
        for name, of in self._undrawn.items():
            self._picture(name, of, folder, seed)

    def _remember(self, report: Report) -> None:
        for name, histogram in report.histograms.items():
            _, by_step = self._histograms.setdefault(name, (histogram.bins, {}))
            by_step[report.step] = histogram.counts_K.tolist()
            self._undrawn[name] = report
        rows = {row["decile"]: row.get("kl_reverse_mean_nats") for row in report.tables.get("positions", [])}
        if any(value is not None for value in rows.values()):
            self._positions[report.step] = [_number(rows.get(decile)) for decile in range(10)]
            self._undrawn[POSITIONS] = report

    def _take_due(self) -> list[tuple[str, Report]]:
        due = [
            (name, report)
            for name, report in self._undrawn.items()
            if report.step // self._every > self._drawn.get(name, -1) // self._every
        ]
        for name, report in due:
            self._drawn[name] = report.step
            del self._undrawn[name]
        return due

    def _picture(self, name: str, report: Report, folder: Path, seed: str) -> None:
        if name == POSITIONS:
            picture = position_map(name, list(self._positions), list(self._positions.values()))
        else:
            bins, by_step = self._histograms[name]
            picture = heat_map(name, bins, list(by_step), list(by_step.values()))
        key = re.sub(r"[^\w\-./ ]", "_", name, flags=re.A)
        id = uuid.uuid5(uuid.NAMESPACE_URL, f"{seed} {key} {report.step}")
        stem = f"{key.replace('/', '~')}+step+{report.step}+timestamp+{round(1000 * report.time)}+{id}"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        picture.save(folder / "images" / f"{stem}.png", compress_level=1)  # the fastest: there are many of them
        # what MLflow's charts show, and the picture itself on a click
        picture.convert("RGB").reduce(2).save(
            folder / "images" / f"{stem}+compressed.webp", lossless=True, quality=0, method=0
        )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """As MLflow keeps tables; arrays are left to the pages."""
    rows = [_with_mean(row) for row in rows]
    flat = [column for column in rows[0] if not isinstance(rows[0][column], list)]
    columns = [column for column in FIRST if column in flat]
    columns += [column for column in flat if column not in columns]
    return {"columns": columns, "data": [[_short(row.get(column)) for column in columns] for row in rows]}


def _with_mean(row: dict[str, Any]) -> dict[str, Any]:
    """A rollout with the mean of its KL, for its arrays are not in the table."""
    there = [value for value in row.get("reverse_kl") or [] if value is not None and not math.isnan(value)]
    return row | {"kl_mean_nats": sum(there) / len(there)} if there else row


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value
