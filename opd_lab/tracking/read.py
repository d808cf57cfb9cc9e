"""The one door back from run folders to tables. Figures, dashboards, comparisons and notebooks read runs here only.

Every function takes run folders, one or several, or a folder that holds run folders at any depth, and reads running
and crashed runs as well as finished ones. Every row names its run.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_lab.tracking.run_folder import journal_rows, read_table

if TYPE_CHECKING:
    from pandas import DataFrame

    from opd_lab.tracking.tracker import RunInfo

Runs = str | Path | Sequence[str | Path]


def folders(where: Runs) -> list[Path]:
    """The run folders meant, in the order of their names."""
    places = [Path(where)] if isinstance(where, str | Path) else [Path(place) for place in where]
    found = {path.parent for place in places for path in place.rglob("status.json")}
    if not found:
        raise ValueError(
            f"runs must be run folders, or folders that hold some (status.json), got {', '.join(map(str, places))}; "
            "start one with `opd-lab run`"
        )
    return sorted(found)


def status(folder: Path) -> dict[str, Any]:
    """What the run says of itself: name, experiment, status, started, ended, commit, parent, params, tags."""
    return json.loads((folder / "status.json").read_text())


def info(folder: Path, step: int = 0) -> RunInfo:
    """The run as a tracker wants to be told of it."""
    from opd_lab.tracking.tracker import RunInfo

    said = status(folder)
    return RunInfo(
        name=said["name"],
        experiment=said["experiment"],
        folder=folder,
        params=said["params"],
        tags=said["tags"],
        config_yaml=(folder / "config.yaml").read_text(),
        dataset=said["dataset"],
        parent=said["parent"],
        step=step,
    )


def runs(where: Runs) -> DataFrame:
    """One row per run: run, folder, status, started, ended, commit, then every param and tag under its own name."""
    import pandas as pd

    rows = []
    for folder in folders(where):
        said = status(folder)
        head = {"run": said["name"], "folder": str(folder)}
        head |= {name: said[name] for name in ("experiment", "status", "started", "ended", "commit", "parent")}
        rows.append(head | said["tags"] | said["params"])
    return pd.DataFrame(rows)


def metrics(where: Runs, names: Collection[str] | None = None) -> DataFrame:
    """Every scalar: run, folder, step, name, value. Timings included. `names`: only these, which is much faster."""
    return _gather(where, lambda folder: _metrics(folder, names))


def histograms(where: Runs) -> DataFrame:
    """run, folder, step, name, bins, counts (a list; the edges are `diagnostics.histograms.edges(bins)`)."""
    return _gather(where, lambda folder: table(folder, "histograms"))


def high_loss(where: Runs) -> DataFrame:
    """The high-loss token types of every report; counted since the run's first step."""
    return _gather(where, lambda folder: table(folder, "high_loss_tokens"))


def rollouts(where: Runs) -> DataFrame:
    """The sampled rollouts, with their per-token arrays."""
    return _gather(where, lambda folder: table(folder, "rollouts"))


def evaluations(where: Runs) -> DataFrame:
    """step, set, problem, n, correct: what every evaluation counted per problem."""
    return _gather(where, lambda folder: table(folder, "evaluations"))


def cut_lengths(folder: str | Path, values: int = 100) -> list[int]:
    """Quantiles of the tokens that a run kept of its rollouts, one that was not cut counting with the response limit.

    Raises:
        ValueError: the run did not log the lengths of its rollouts.
    """
    found = table(Path(folder), "rollout_lengths")
    if found.empty:
        raise ValueError(
            f"method.run must be the folder of a run with method=kat or a variant of it, got {folder}, which has no "
            "table rollout_lengths"
        )
    limit = status(Path(folder))["params"]["rollout.max_tokens"]
    lengths = sorted(k if k < g else limit for k, g in zip(found["kept"].tolist(), found["generated"].tolist()))
    return [lengths[int((i + 0.5) / values * len(lengths))] for i in range(values)]


def table(folder: Path, name: str) -> DataFrame:
    """Any table of one run, empty where the run has none."""
    import pandas as pd

    found = read_table(folder, name)
    return pd.DataFrame() if found is None else pd.DataFrame(found.to_pylist())


def _metrics(folder: Path, names: Collection[str] | None) -> DataFrame:
    import pandas as pd
    import pyarrow.parquet as pq

    if (folder / "metrics.parquet").exists():
        wanted = None if names is None else [("name", "in", list(names))]
        files = (folder / f"{name}.parquet" for name in ("metrics", "timing"))
        return pd.concat([pq.read_table(file, filters=wanted).to_pandas() for file in files], ignore_index=True)
    rows = (row for row in journal_rows(folder) if names is None or row[1] in names)
    return pd.DataFrame(rows, columns=["step", "name", "value"])


def _gather(where: Runs, one: Any) -> DataFrame:
    import pandas as pd

    frames: Iterable[DataFrame] = (
        frame.assign(run=status(folder)["name"], folder=str(folder))
        for folder in folders(where)
        if len(frame := one(folder))
    )
    frames = list(frames)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
