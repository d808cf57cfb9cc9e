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
from typing import TYPE_CHECKING, Any

from opd_lab.tracking.coloured import page
from opd_lab.tracking.figures import heat_map, position_map
from opd_lab.types import Report

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL = 256  # pixels; MLflow's charts show these, and the picture itself on a click
DIGITS = 4  # of the numbers in MLflow's tables; the run folder's files have all
TABLES = ("high_loss_tokens", "rollouts")
FIRST = ("token", "prompt", "kl_mean_nats", "text", "reward", "count")  # MLflow groups by a table's first column


class Shown:
    """What a run has shown so far: a picture of a step is a picture of training up to it."""

    def __init__(self) -> None:
        self._histograms: dict[str, tuple[str, dict[int, list[int]]]] = {}  # name -> bins, step -> counts
        self._positions: dict[int, list[float]] = {}  # step -> mean KL by decile of the response

    def add(self, report: Report) -> None:
        for name, histogram in report.histograms.items():
            _, by_step = self._histograms.setdefault(name, (histogram.bins, {}))
            by_step[report.step] = histogram.counts_K.tolist()
        rows = {row["decile"]: row.get("kl_reverse_mean_nats") for row in report.tables.get("positions", [])}
        if any(value is not None for value in rows.values()):
            self._positions[report.step] = [_number(rows.get(decile)) for decile in range(10)]

    def write(self, report: Report, folder: Path, seed: str) -> dict[str, str]:
        """The files of an added report, below a folder; the tags that make MLflow look at them."""
        tags = {}
        for name in report.histograms:
            bins, by_step = self._histograms[name]
            self._picture(heat_map(name, bins, list(by_step), list(by_step.values())), name, report, folder, seed)
        if report.step in self._positions:
            drawn = position_map("kl/by_position_nats", list(self._positions), list(self._positions.values()))
            self._picture(drawn, "kl/by_position_nats", report, folder, seed)
        if (folder / "images").exists():
            tags["mlflow.loggedImages"] = "True"
        tables = [name for name in TABLES if report.tables.get(name)]
        for name in tables:
            (folder / f"{name}.json").write_text(json.dumps(_table(report.tables[name])))
        if tables:
            tags["mlflow.loggedArtifacts"] = json.dumps([{"path": f"{t}.json", "type": "table"} for t in TABLES])
        if rows := report.tables.get("rollouts"):
            (folder / "rollouts").mkdir()
            text = page(rows, f"{seed}: rollouts of step {report.step}")
            (folder / "rollouts" / f"step_{report.step:06d}.html").write_text(text)
        return tags

    def _picture(self, picture: Image, name: str, report: Report, folder: Path, seed: str) -> None:
        from PIL.Image import Resampling

        key = re.sub(r"[^\w\-./ ]", "_", name, flags=re.A)
        id = uuid.uuid5(uuid.NAMESPACE_URL, f"{seed} {key} {report.step}")
        stem = f"{key.replace('/', '~')}+step+{report.step}+timestamp+{round(1000 * report.time)}+{id}"
        (folder / "images").mkdir(exist_ok=True)
        picture.save(folder / "images" / f"{stem}.png", compress_level=1)  # the fastest: there are many of them
        small = picture.resize((THUMBNAIL, THUMBNAIL), Resampling.BOX)
        small.save(folder / "images" / f"{stem}+compressed.webp", method=0)


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
