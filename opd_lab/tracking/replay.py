"""Run folder -> tracker, afterwards: deliver what a store missed, or rebuild a lost store from the files."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from opd_lab.tracking import read
from opd_lab.tracking.delivery import Reports
from opd_lab.tracking.run_folder import close
from opd_lab.tracking.tracker import STATUSES, Tracker

log = logging.getLogger("opd_lab.tracking")


def sync(folder: Path, tracker: Tracker) -> None:
    """Bring a tracker whatever the folder of a run that no process is working on has and it has not. A run that was
    killed is closed as such, here as well; it can still go on."""
    if read.status(folder)["status"] not in STATUSES:
        close(folder, "KILLED")
    tracker.start(read.info(folder, step=sys.maxsize))
    for report in Reports(folder, tracker.tables).new():
        tracker.log(report)
    tracker.finish(read.status(folder)["status"])


def attach(folder: Path, under: str) -> bool:
    """Log the files below `folder/under` as artifacts of the run's MLflow run, which else stays as it was; False where
    the run has no store. A store that is away gets them from `opd-lab sync`."""
    from opd_lab.tracking.mlflow import IDENTITY, open_store

    if not (folder / IDENTITY).is_file():
        return False
    folder, known = folder.absolute(), json.loads((folder / IDENTITY).read_text())
    try:
        store = open_store(known["uri"], folder.parents[1], read.status(folder)["experiment"])
        store.client.log_artifacts(known["run_id"], str(folder / under), under)
    except Exception as error:
        log.warning("%s is away, `opd-lab sync` delivers %s later: %r", known["uri"], under, error)
    return True
