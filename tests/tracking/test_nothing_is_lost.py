"""Processes that are killed, stores that go away: afterwards the run folder and every store tell the same."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from lab_run import run, settings

from opd_lab import checkpoint
from opd_lab.results import deliver, rebuild
from opd_lab.run import run_folder
from opd_lab.tracking import read
from opd_lab.tracking.delivery import Reports
from opd_lab.tracking.mlflow import IDENTITY, is_shown, open_store
from opd_lab.tracking.run_folder import JOURNAL, lines_from, volatile
from tests.tracking.services import content, free_port, mlflow_server, postgres, wait_for

pytestmark = pytest.mark.slow

LAB = ["steps=40", "evaluate.every=10", "checkpoint.every=5", "diagnostics.every=4", "data.problems=40"]
LAB += ["tracking.picture_every=10"]
KILLS = 10
AWAY_STEPS = 1500  # of the lab: more than half a minute


def processes() -> Any:
    """Children of a process that has imported everything: they begin at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["lab_run", "opd_lab.run", "mlflow", "pandas", "sqlalchemy", "opd_lab.tracking.mlflow"]
    )
    return context


def train(home: Path, overrides: list[str]) -> None:
    run(home, *overrides, mlflow=True, say=lambda line: None)


def said(folder: Path) -> dict[str, list[tuple[int, str, int]]]:
    """Every scalar of a run folder, as a store must have it."""
    out: dict[str, list[tuple[int, str, int]]] = {}
    for report in Reports(folder).new():
        for name, value in report.scalars.items():
            out.setdefault(name, []).append((report.step, repr(value), round(1000 * report.time)))
    return out


def stored(folder: Path, scratch: Path) -> dict[str, Any]:
    known = json.loads((folder / IDENTITY).read_text())
    scratch.mkdir()
    client = open_store(known["uri"], folder.parents[1], "opd_lab").client
    return content(client, known["run_id"], scratch)


def agree(folder: Path, found: dict[str, Any]) -> None:
    """A store's content and the run folder."""
    status = read.status(folder)
    assert found["run"][:2] == (status["name"], status["status"])
    assert found["metrics"] == said(folder)
    assert found["params"] == {n: str(value) for n, value in status["params"].items() if is_shown(n, value)}
    assert {"seed", "optim.lr", "rollout.max_tokens"} <= found["params"].keys()
    assert json.loads(found["files"]["params.json"]) == status["params"]
    own = {name: text for name, text in found["tags"].items() if not name.startswith("mlflow.")}
    assert own == status["tags"]
    for path in folder.glob("*.parquet"):
        assert found["files"][path.name] == path.read_bytes(), path.name
    shown = {row["step"] for row in read.rollouts(folder)[["step"]].to_dict("records")}
    assert {name for name in found["files"] if name.startswith("rollouts/")} == {
        f"rollouts/step_{step:06d}.html" for step in shown
    }
    firsts = {min(s for s in shown if s // 10 == ten) for ten in {step // 10 for step in shown}}
    pictures = sorted(name.split("+")[2] for name in found["files"] if name.startswith("images/kl~reverse_nats"))
    assert pictures == sorted(2 * [str(step) for step in firsts | {max(shown)}])  # each and its small copy
    assert found["models"] == [("student", "READY")]


def readable(folder: Path) -> int:
    """A run folder as a kill left it: every table can be read, no step is missing or there twice. Its last step."""
    steps = sorted(read.metrics(folder, "loss/total_value")["step"])
    assert steps == list(range(1, len(steps) + 1))
    for name in ("histograms", "high_loss_tokens", "rollouts", "evaluations", "positions"):
        found = read.table(folder, name).astype(str)
        assert len(found) == len(found.drop_duplicates()), f"{name} has rows twice"
    return len(steps)


def last_step(folder: Path) -> int:
    return max((line["step"] for line, _ in lines_from(folder / JOURNAL, 0)), default=0)


def test_a_run_that_is_killed_ten_times_loses_nothing(tmp_path: Path) -> None:
    lab = [*LAB, "steps=150", "checkpoint.every=10"]
    chosen, draw = settings(tmp_path / "killed", *lab, mlflow=True), random.Random(0)
    folder, killed = run_folder(chosen, "opd"), 0
    context = processes()
    reached, saved = [], 0
    for _ in range(KILLS):
        child = context.Process(target=train, args=(tmp_path / "killed", lab))
        child.start()
        wanted = saved + draw.randrange(9)  # a machine's load moves a moment, but not this
        wait_for(lambda at=wanted, child=child: last_step(folder) >= at or not child.is_alive(), 60)
        time.sleep(draw.uniform(0, 0.6))
        killed += child.is_alive()
        child.kill()
        child.join()
        if (folder / "status.json").exists():
            kept = checkpoint.latest(folder / "checkpoints")
            saved = kept.step if kept else 0
            reached.append(readable(folder))
            assert reached[-1] >= saved
    assert killed >= KILLS - 2 and len(set(reached)) >= 4, reached
    train(tmp_path / "killed", lab)  # the same command goes on
    assert readable(folder) == 150
    assert deliver(folder) == "delivered"
    found = stored(folder, tmp_path / "one")
    agree(folder, found)

    whole = run(tmp_path / "whole", *lab).folder
    columns = ["step", "name", "value"]
    frames = [read.metrics(one).sort_values(columns[:2])[columns] for one in (folder, whole)]
    one, other = ([row for row in frame.itertuples(index=False) if not volatile(row[1])] for frame in frames)
    assert all(a == b or (a[:2] == b[:2] and math.isnan(a[2]) and math.isnan(b[2])) for a, b in zip(one, other))
    assert len(one) == len(other)

    rebuild(folder, f"sqlite:///{tmp_path / 'empty.db'}")
    assert stored(folder, tmp_path / "two") == found


def test_a_server_that_hangs_and_then_dies_in_mid_run_gets_everything(tmp_path: Path) -> None:
    port = free_port()
    lab = [*LAB, "steps=60", f"tracking.uri=http://127.0.0.1:{port}"]
    folder = run_folder(settings(tmp_path / "runs", *lab, mlflow=True), "opd")
    context = processes()
    child = context.Process(target=train, args=(tmp_path / "runs", lab))

    def step() -> int:
        return last_step(folder)

    (tmp_path / "store").mkdir()
    with mlflow_server(tmp_path / "store", port) as server:
        child.start()
        wait_for(lambda: (folder / "status.json").exists() and step() >= 3, 60)
        os.killpg(server.pid, signal.SIGSTOP)
        hung_at = step()
        wait_for(lambda: step() >= hung_at + 5 or not child.is_alive(), 30)  # the run does not wait for it
        os.killpg(server.pid, signal.SIGCONT)
        wait_for(lambda: step() >= hung_at + 10 or not child.is_alive(), 30)
    child.join()
    assert child.exitcode == 0
    assert read.status(folder)["status"] == "FINISHED"
    with mlflow_server(tmp_path / "store", port):
        assert deliver(folder) == "delivered"
        agree(folder, stored(folder, tmp_path / "one"))
        where = read.Store(f"http://127.0.0.1:{port}", "opd_lab")
        for name in ("histograms", "rollouts"):
            assert len(read.table(where, name)) == len(read.table(folder, name))
        assert len(read.metrics(where)) == len(read.metrics(folder))


def train_telling(home: Path, overrides: list[str], said: Path) -> None:
    """What tracking logs goes to a file."""
    logging.getLogger("opd_lab.tracking").addHandler(logging.FileHandler(said))
    train(home, overrides)


def test_a_server_that_is_away_for_half_a_minute_in_mid_run_gets_everything(tmp_path: Path) -> None:
    port, away_seconds = free_port(), 30
    lab = [f"steps={AWAY_STEPS}", "evaluate.every=500", "checkpoint.every=500", "diagnostics.every=100"]
    lab += ["data.problems=40", f"tracking.uri=http://127.0.0.1:{port}"]
    folder, said = run_folder(settings(tmp_path / "runs", *lab, mlflow=True), "opd"), tmp_path / "said.txt"
    child = processes().Process(target=train_telling, args=(tmp_path / "runs", lab, said))
    (tmp_path / "store").mkdir()
    with mlflow_server(tmp_path / "store", port):
        child.start()
        wait_for(lambda: last_step(folder) >= 3, 60)
    gone_at = last_step(folder)
    child.join(away_seconds)  # the run trains on meanwhile
    assert child.is_alive() and last_step(folder) >= gone_at + away_seconds
    with mlflow_server(tmp_path / "store", port):
        child.join()
        assert child.exitcode == 0 and last_step(folder) == AWAY_STEPS
        assert said.read_text().count("mlflow failed; the run goes on") == 1
        assert deliver(folder) == "delivered"
        agree(folder, stored(folder, tmp_path / "one"))


def test_a_real_postgres_takes_a_run_and_gives_it_back(tmp_path: Path) -> None:
    with postgres() as uri:
        folder = run(tmp_path / "runs", f"tracking.uri={uri}", mlflow=True).folder
        agree(folder, stored(folder, tmp_path / "one"))
        where = read.Store(uri, "opd_lab")
        for names in (None, ["kl/reverse_mean_nats", "time/step_seconds"]):
            one, other = (
                read.metrics(place, names).sort_values(["step", "name"], ignore_index=True) for place in (folder, where)
            )
            assert one["value"].tolist() == other["value"].tolist()
        (one,), (other,) = (read.runs(place).drop(columns="folder").to_dict("records") for place in (folder, where))
        assert one == other
