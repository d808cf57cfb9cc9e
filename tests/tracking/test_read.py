"""One door: the same tables from run folders and from the MLflow store of the same runs."""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
from lab_run import run

from opd_lab.tracking import read, rows
from opd_lab.tracking.mlflow import MLflow
from opd_lab.tracking.run_folder import RunFolder
from opd_lab.tracking.tracker import RunInfo
from opd_lab.types import Report
from tests.tracking.runs import info, report


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs of the lab, one of which has tables that the other has not, and a foreign one."""
    home = tmp_path_factory.mktemp("runs")
    run(home, "method=scope", "steps=2", mlflow=True, name="scope")
    run(home, "method=kat_lab", "method.warmup_steps=1", "steps=2", mlflow=True, name="kat_lab")
    return home


def store(home: Path) -> read.Store:
    return read.Store(f"sqlite:///{home / 'mlflow.db'}", "opd_lab")


def alike(one: pd.DataFrame, other: pd.DataFrame, *by: str) -> None:
    """Equal to the last bit, but for the order of rows and for `folder`, which says where a row was found."""
    assert len(one) and list(one.columns) == list(other.columns)
    frames = [
        frame.drop(columns="folder").assign(run=frame["run"].astype(str)).sort_values(["run", *by], ignore_index=True)
        for frame in (one, other)
    ]
    pd.testing.assert_frame_equal(*frames, check_exact=True)


@pytest.mark.parametrize(
    "name", ["histograms", "high_loss_tokens", "rollouts", "evaluations", "positions", "rollout_lengths"]
)
def test_tables_are_the_same_from_folders_and_from_the_store(home: Path, name: str) -> None:
    one, other = read.table(home, name), read.table(store(home), name)
    assert list(one.columns[:3]) == ["run", "folder", "step"]
    alike(one, other)


def test_scalars_are_the_same_from_folders_from_files_of_the_store_and_from_its_database(home: Path) -> None:
    everything = read.metrics(home)
    assert list(everything.columns) == ["run", "folder", "step", "name", "value"]
    alike(everything, read.metrics(store(home)), "step", "name")
    names = sorted(everything["name"].unique())
    by_sql = read.metrics(store(home), names)
    alike(
        everything.assign(name=everything["name"].astype(str)),
        by_sql.assign(name=by_sql["name"].astype(str)),
        "step",
        "name",
    )
    some = read.metrics(home, ["kl/reverse_mean_nats", "nobody/logs_this"])
    assert set(some["name"]) == {"kl/reverse_mean_nats"} and len(some) == 4  # two runs, two steps
    assert len(read.metrics(home, "kl/reverse_mean_nats")) == 4


def test_runs_that_are_dealt_out_to_processes_are_the_same(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = sorted(read.metrics(home)["name"].unique())
    one = read.metrics(store(home), names)
    monkeypatch.setattr(rows, "WORTH_A_PROCESS", 1)
    monkeypatch.setattr(rows, "_cores", lambda: 2)
    pd.testing.assert_frame_equal(one, read.metrics(store(home), names), check_exact=True)


def test_nothing_found_has_columns_too(home: Path, tmp_path: Path) -> None:
    RunFolder().start(info(tmp_path / "a"))
    for found in (read.metrics(tmp_path), read.metrics(home, "nobody/logs_this"), read.metrics(store(home), "nobody")):
        assert len(found) == 0 and {"run", "folder", "step", "name", "value"} == set(found.columns)


def test_runs_are_the_same(home: Path) -> None:
    one, other = (read.runs(where).drop(columns="folder") for where in (home, store(home)))
    assert set(one.columns) == set(other.columns) >= {"run", "status", "started", "ended", "method", "optim.lr"}
    pd.testing.assert_frame_equal(one[sorted(one.columns)], other[sorted(one.columns)], check_exact=True)


def test_a_run_that_goes_on_is_read_out_of_the_database(home: Path) -> None:
    tracker = MLflow(None, home)
    tracker.start(info(home / "elsewhere"))
    tracker.log(report(3))
    tracker.log(Report(4, {"kl/reverse_mean_nats": math.nan}))
    tracker.flush()
    for names in (None, ["kl/reverse_mean_nats"]):
        found = read.metrics(read.Store(store(home).uri, "tests"), names)
        found = found[found["name"] == "kl/reverse_mean_nats"]
        assert found["step"].tolist() == [3, 4]
        assert found["value"].iloc[0] == report(3).scalars["kl/reverse_mean_nats"] and math.isnan(
            found["value"].iloc[1]
        )
        assert set(found["folder"]) == {f"runs:/{tracker.run_id}"}


def test_rows_that_someone_added_to_an_ended_run_are_not_overlooked(home: Path) -> None:
    place = store(home)
    before = read.metrics(place)
    one = place.runs()[0].id
    add = "insert into metrics (key, value, timestamp, run_uuid, step, is_nan) values ('mine', 0.5, 1, ?, 7, 0)"
    with closing(sqlite3.connect(home / "mlflow.db")) as database:
        database.execute(add, (one,))
        database.execute("insert into latest_metrics values ('mine', 0.5, 1, 7, 0, ?)", (one,))
        database.commit()
        after = read.metrics(place)
        for table in ("metrics", "latest_metrics"):
            database.execute(f"delete from {table} where key = 'mine'")
        database.commit()
    assert len(after) == len(before) + 1
    assert after[after["name"] == "mine"]["value"].tolist() == [0.5]


def test_a_store_that_is_not_there_or_has_no_such_runs_is_named(home: Path) -> None:
    with pytest.raises(
        ValueError, match=r"a store must be the URI of an MLflow store that can be read, got sqlite:///.*nowhere"
    ):
        read.runs(read.Store(f"sqlite:///{home / 'nowhere.db'}"))
    with pytest.raises(ValueError, match="must be the URI of an MLflow store that can be read, got nonsense: Mlflow"):
        read.runs(read.Store("nonsense"))
    with pytest.raises(ValueError, match="holds no run of the experiment other; experiments with runs: opd_lab, tests"):
        read.runs(read.Store(store(home).uri, "other"))


def test_reading_and_comparing_need_no_torch():
    code = """
import sys
import opd_lab.bins, opd_lab.compare.curves, opd_lab.compare.printed, opd_lab.tracking.figures, opd_lab.tracking.read
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_some_metrics_are_those_of_all_in_a_running_and_in_a_finished_run(tmp_path: Path):
    folder, tracker = tmp_path / "a", RunFolder()
    tracker.start(RunInfo(name="a", experiment="x", folder=folder, params={}, tags={}, config_yaml=""))
    for step in range(3):
        tracker.log(Report(step, {"kl/x": step / 7, "kl/y": 1.0, "time/z_seconds": 2.0}))
    running = read.metrics(folder, ["kl/x", "time/z_seconds"])
    tracker.finish("FINISHED")
    finished = read.metrics(folder, ["kl/x", "time/z_seconds"])
    for found in (running, finished):
        values = {name: rows.value.to_list() for name, rows in found.groupby("name")}
        assert values == {"kl/x": [0.0, 1 / 7, 2 / 7], "time/z_seconds": [2.0, 2.0, 2.0]}
    assert len(read.metrics(folder)) == 9
