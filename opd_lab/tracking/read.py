"""The one door back from runs to tables. Figures, dashboards, comparisons and notebooks read runs here only.

Every function takes `where`: run folders, one or several; a folder that holds run folders at any depth; or
`Store(uri, experiment)`, an MLflow store. All give the same columns, for running and crashed runs as well as finished
ones. Every row names its run twice: `run`, its name, and `folder`, which is unique: a path, or `runs:/<id>` in a store.
Both are categories, as are the names of metrics, for a table of millions of rows would be nothing but names.

A store has scalars, params and tags while a run is going on, and the other tables once it has ended.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_lab.tracking.run_folder import journal_rows, read_table
from opd_lab.tracking.stored import Store

if TYPE_CHECKING:
    import pyarrow as pa
    from pandas import DataFrame

    from opd_lab.tracking.tracker import RunInfo

Runs = str | Path | Sequence[str | Path]
Where = Runs | Store


def runs(where: Where) -> DataFrame:
    """One row per run: run, folder, experiment, status, started, ended (seconds since 1970), commit, parent, then every
    tag and param under its own name."""
    import pandas as pd

    if isinstance(where, Store):
        return pd.DataFrame(where.rows())
    rows = []
    for folder in folders(where):
        said = status(folder)
        head = {"run": said["name"], "folder": str(folder)}
        head |= {name: said[name] for name in ("experiment", "status", "started", "ended", "commit", "parent")}
        rows.append(head | said["tags"] | said["params"])
    return pd.DataFrame(rows)


def metrics(where: Where, names: Iterable[str] | None = None) -> DataFrame:
    """Scalars, timings included: run, folder, step, name, value. `names` None = all of them."""
    wanted = None if names is None else sorted({names} if isinstance(names, str) else set(names))
    if isinstance(where, Store):
        return _frame(where.metrics(wanted, folder_metrics))
    return _gather(where, lambda folder: folder_metrics(folder, wanted))


def histograms(where: Where) -> DataFrame:
    """step, name, bins, counts (an array; the edges are `opd_lab.bins.edges(bins)`)."""
    return table(where, "histograms")


def tokens(where: Where) -> DataFrame:
    """The high-loss token types of every report; counted since the run's first step."""
    return table(where, "high_loss_tokens")


def rollouts(where: Where) -> DataFrame:
    """The sampled rollouts, with their per-token arrays."""
    return table(where, "rollouts")


def evaluations(where: Where) -> DataFrame:
    """step, set, problem, n, correct: what every evaluation counted per problem."""
    return table(where, "evaluations")


def table(where: Where, name: str) -> DataFrame:
    """Any table that runs left, by the name of its file; empty where no run has it."""
    if isinstance(where, Store):
        return _frame(where.table(name, read_table))
    return _gather(where, lambda folder: read_table(folder, name))


# run folders ------------------------------------------------------------------------------------------------------


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


def cut_lengths(folder: str | Path, values: int = 100) -> list[int]:
    """Quantiles of the tokens that a run kept of its rollouts, one that was not cut counting with the response limit.

    Raises:
        ValueError: the run did not log the lengths of its rollouts.
    """
    found = read_table(Path(folder), "rollout_lengths")
    if found is None:
        raise ValueError(
            f"method.run must be the folder of a run with method=kat or a variant of it, got {folder}, which has no "
            "table rollout_lengths"
        )
    limit = status(Path(folder))["params"]["rollout.max_tokens"]
    both = zip(found["kept"].to_pylist(), found["generated"].to_pylist())
    lengths = sorted(k if k < g else limit for k, g in both)
    return [lengths[int((i + 0.5) / values * len(lengths))] for i in range(values)]


def folder_metrics(folder: Path, names: Sequence[str] | None = None) -> pa.Table:
    """step, name, value of one run folder, finished or not."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if (folder / "metrics.parquet").exists():
        files = (read_table(folder, name, dictionary=("name",)) for name in ("metrics", "timing"))
        found = pa.concat_tables(file for file in files if file is not None)
    else:
        steps, keys, values = zip(*rows) if (rows := list(journal_rows(folder))) else ((), (), ())
        key = pa.array(keys, pa.string()).dictionary_encode()
        found = pa.table({"step": pa.array(steps, pa.int64()), "name": key, "value": pa.array(values, pa.float64())})
    return found if names is None else found.filter(pc.field("name").isin(list(names)))


def _gather(where: Runs, one: Callable[[Path], pa.Table | None]) -> DataFrame:
    return _frame((status(folder)["name"], str(folder), one(folder)) for folder in folders(where))


def _frame(found: Iterable[tuple[str, str, pa.Table | None]]) -> DataFrame:
    """The tables of (run, folder, table), one below the other, as pandas."""
    import numpy as np
    import pandas as pd
    import pyarrow as pa

    there = [(run, folder, table) for run, folder, table in found if table is not None]
    there = [row for row in there if len(row[2])] or there[:1]  # the columns of nothing are known as well
    if not there:
        return pd.DataFrame()
    names, places, tables = zip(*there)
    whole = pa.concat_tables(tables, promote_options="permissive").unify_dictionaries()
    frame = whole.to_pandas()
    at_N = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    for place, (column, values) in enumerate((("run", names), ("folder", places))):
        different = list(dict.fromkeys(values))
        code_N = np.array([different.index(value) for value in values])[at_N]
        frame.insert(place, column, pd.Categorical.from_codes(code_N, categories=pd.Index(different, dtype="str")))
    return frame
