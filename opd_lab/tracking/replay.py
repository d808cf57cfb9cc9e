"""Run folder -> tracker, afterwards: deliver what a store missed, or rebuild a lost store from the files."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from opd_lab.tracking import read
from opd_lab.tracking.delivery import drain, keep
from opd_lab.tracking.run_folder import read_table
from opd_lab.tracking.tracker import STATUSES, Tracker
from opd_lab.types import Histogram, Report

log = logging.getLogger("opd_lab.tracking")


def sync(folder: Path, tracker: Tracker) -> bool:
    """Deliver what waits in a run folder; False where nothing does."""
    spool = folder / f"undelivered.{tracker.name}.jsonl"
    if not spool.exists():
        return False
    tracker.start(read.info(folder, step=sys.maxsize))
    drain(spool, tracker)
    _close(folder, tracker)
    return True


def rebuild(folder: Path, tracker: Tracker) -> None:
    """Log a whole run again, as a new one."""
    tracker.start(read.info(folder))
    for report in reports(folder):
        tracker.log(report)
    _close(folder, tracker)


def attach(folder: Path, under: str) -> bool:
    """Log the files below `folder/under` as artifacts of the run's MLflow run, which else stays as it was; False where
    the run has no store. A store that is away gets them from `opd-lab sync`."""
    from opd_lab.tracking.mlflow import IDENTITY, MLflow, open_store

    if not (folder / IDENTITY).is_file():
        return False
    folder, known = folder.absolute(), json.loads((folder / IDENTITY).read_text())
    try:
        store = open_store(known["uri"], folder.parents[1], read.status(folder)["experiment"])
        store.client.log_artifacts(known["run_id"], str(folder / under), under)
    except Exception as error:
        files = sorted(path for path in (folder / under).rglob("*") if path.is_file())
        keep(folder, MLflow.name, [("artifact", str(path), str(path.parent.relative_to(folder))) for path in files])
        log.warning("%s is away, `opd-lab sync` delivers %s later: %r", known["uri"], under, error)
    return True


def reports(folder: Path) -> Iterator[Report]:
    """The run's reports, one per step, in order."""
    by_step: dict[int, Report] = {}
    for row in read.folder_metrics(folder).to_pylist():
        by_step.setdefault(row["step"], Report(row["step"])).scalars[row["name"]] = row["value"]
    for row in _rows(folder, "histograms"):
        histogram = Histogram(torch.tensor(row["counts"], dtype=torch.int64), row["bins"])
        by_step.setdefault(row["step"], Report(row["step"])).histograms[row["name"]] = histogram
    for name in ("high_loss_tokens", "rollouts"):
        for row in _rows(folder, name):
            by_step.setdefault(row["step"], Report(row["step"])).tables.setdefault(name, []).append(row)
    yield from (by_step[step] for step in sorted(by_step))


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    found = read_table(folder, name)
    return [] if found is None else found.to_pylist()


def _close(folder: Path, tracker: Tracker) -> None:
    status = read.status(folder)["status"]
    tracker.finish(status if status in STATUSES else "KILLED")
