"""Which runs are looked at: the app's sidebar. Every choice stands in the page's address, so a link restores it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from dashboards.runs import STATUSES, Frame, Selected, params, select
from opd_lab.tracking import read

FILTERS = 3  # keys by which runs can be filtered at once


def runs_in(folder: Path) -> dict[str, list[Path]]:
    """experiment -> its run folders; a run of which nothing can be read yet is passed over."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("status.json")) + sorted(folder.glob("*/*/status.json")) + _direct(folder):
        found.setdefault(read.status(path.parent)["experiment"], []).append(path.parent)
    return found


def _direct(folder: Path) -> list[Path]:
    """The runs of an experiment's own folder."""
    return sorted(folder.glob("*/status.json"))


def several(name: str, options: Sequence[Any], key: str, help_text: str | None = None) -> list[Any]:
    """A choice of any number; of none means all."""
    chosen = st.multiselect(name, options, key=key, help=help_text, placeholder="all", bind="query-params")
    return list(chosen) or list(options)


def sidebar(folder: Path) -> Selected:
    """The runs chosen, pooled by method, in the styles they have among all of their experiments."""
    found = runs_in(folder)
    st.caption(f"Runs in {folder}")
    if not found:
        return Selected([])
    experiments = several("Experiments", sorted(found), "experiment")
    statuses = several("Status", STATUSES, "status")
    folders = [run for name in experiments for run in found[name]]
    folders = _filtered([run for run in folders if read.status(run)["status"] in statuses])
    whole = select(folders) if folders else Selected([])
    labels = several("Methods", whole.labels, "method", "Runs that differ by their seed alone are one method.")
    return whole.only(labels)


def _filtered(folders: list[Path]) -> list[Path]:
    """Only the runs with the chosen values of some params and tags."""
    if not folders:
        return folders
    table: Frame = params(folders)
    keys = [str(name) for name in table if name not in ("run", "status", "folder")]
    by = st.multiselect(
        "Filter by", keys, key="by", max_selections=FILTERS, placeholder="params and tags", bind="query-params"
    )
    for place, key in enumerate(by):
        column = table[key].astype(str)
        kept = several(key, sorted(column.unique()), f"where{place}")
        table = table[column.isin(kept)]
    return [Path(folder) for folder in table["folder"]]
