"""How long reading takes: 100 runs x 1,000 steps x 60 metrics, once as run folders and once as a SQLite store.

    python benchmarks/read.py [--runs 100] [--steps 1000] [--metrics 60]

Makes both in a temporary folder (about 2 GB, a few minutes), checks that they answer alike, and prints seconds: of all
scalars, and of one metric. "SQLite, ended runs" have left their scalars as parquet beside the store; "SQLite alone" are
the same runs without those files, read in SQL row by row, as runs are that still go on, by a process for each core.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opd_lab.tracking import read
from opd_lab.tracking.mlflow import open_store


def make(home: Path, runs: int, steps: int, metrics: int) -> None:
    """Run folders, then the store, its rows in the order in which runs one after the other leave them."""
    names = [f"area/quantity_{i}_nats" for i in range(metrics)]
    step_N, name_N = np.repeat(np.arange(steps), metrics), np.tile(np.arange(metrics), steps)
    name = pa.DictionaryArray.from_arrays(pa.array(name_N, pa.int32()), pa.array(names))
    store = open_store(None, home, "read")
    with closing(sqlite3.connect(home / "mlflow.db")) as database:
        database.execute("pragma synchronous = off")
        indexes = database.execute(
            "select name, sql from sqlite_master where type = 'index' and tbl_name = 'metrics' and sql is not null"
        ).fetchall()
        for index, _ in indexes:
            database.execute(f"drop index {index}")
        for r in range(runs):
            folder, made = home / "read" / f"run_{r:04d}", home / "artifacts" / f"{r:032x}" / "artifacts"
            for place in (folder, made):
                place.mkdir(parents=True)
            value_N = np.random.default_rng(r).random(steps * metrics)
            table = pa.table({"step": step_N, "name": name.cast(pa.string()), "value": value_N})
            pq.write_table(table, folder / "metrics.parquet", compression="zstd")
            shutil.copy(folder / "metrics.parquet", made)
            said = {"name": folder.name, "experiment": "read", "status": "FINISHED", "started": r, "ended": r + 1}
            said |= {"commit": None, "parent": None, "dataset": {}, "params": {}, "tags": {}}
            (folder / "status.json").write_text(json.dumps(said))
            database.execute(
                "insert into runs (run_uuid, name, status, start_time, end_time, lifecycle_stage, artifact_uri, "
                "experiment_id) values (?, ?, 'FINISHED', ?, ?, 'active', ?, ?)",
                (f"{r:032x}", folder.name, 1000 * r, 1000 * r + 1000, made.as_uri(), store.experiment_id),
            )
            rows = zip(name.to_pylist(), value_N.tolist(), (1_000_000 + step_N).tolist(), step_N.tolist())
            database.executemany(
                "insert into metrics (key, value, timestamp, step, run_uuid, is_nan) "
                f"values (?, ?, ?, ?, '{r:032x}', 0)",
                rows,
            )
        database.execute(
            "insert into latest_metrics (key, value, timestamp, step, run_uuid, is_nan) "
            "select key, value, timestamp, step, run_uuid, 0 from metrics where step = ?",
            (steps - 1,),
        )
        for _, sql in indexes:
            database.execute(sql)
        database.commit()


def seconds(ask: Callable[[], object], times: int = 3) -> float:
    """The best of three: the others say what else the machine was doing."""
    took = []
    for _ in range(times):
        begin = time.perf_counter()
        ask()
        took.append(time.perf_counter() - begin)
    return min(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--metrics", type=int, default=60)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        make(home, given.runs, given.steps, given.metrics)
        store = read.Store(f"sqlite:///{home / 'mlflow.db'}", "read")
        one = "area/quantity_0_nats"
        one_N, other_N = (np.sort(read.metrics(where)["value"].to_numpy()) for where in (home / "read", store))
        assert np.array_equal(one_N, other_N)
        print(f"{given.runs} runs x {given.steps} steps x {given.metrics} metrics; seconds: all scalars, one metric")

        def line(name: str, where: Path | read.Store) -> None:
            whole, some = seconds(lambda: read.metrics(where)), seconds(lambda: read.metrics(where, one))
            print(f"{name:20} {whole:8.2f} {some:8.2f}", flush=True)

        line("run folders", home / "read")
        line("SQLite, ended runs", store)
        shutil.rmtree(home / "artifacts")
        line("SQLite alone", store)
        print(f"{'one row per run':20} {seconds(lambda: read.runs(store)):8.2f}")


if __name__ == "__main__":
    main()
