"""Report -> run folder and MLflow. `read` is the one door back: tables, dashboards and notebooks come through it."""

from __future__ import annotations

from pathlib import Path

from opd_lab.settings import TrackingSettings
from opd_lab.tracking.mlflow import MLflow
from opd_lab.tracking.run_folder import RunFolder
from opd_lab.tracking.tracker import STATUSES, FanOut, RunInfo, Tracker

__all__ = ["STATUSES", "FanOut", "MLflow", "RunFolder", "RunInfo", "Tracker", "trackers"]


def trackers(settings: TrackingSettings) -> FanOut:
    """The trackers that the settings name: always the run folder, and MLflow if wanted."""
    folder = Path(settings.folder)
    return FanOut([RunFolder(), *([MLflow(settings.uri, folder)] if settings.mlflow else [])])
