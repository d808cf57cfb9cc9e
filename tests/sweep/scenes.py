"""What the tests of Ray and Slurm share, and what happens on Ray. Each scene has a process of its own: Ray leaves
warnings that belong to nobody in the one that it was started from.
"""

import io
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from bench import METRIC, opened, orders, sweep_settings
from rich.console import Console

from opd_lab import config
from opd_lab.sweep.cluster import ClusterLauncher
from opd_lab.sweep.contract import Ended, Job, Mail, Order
from opd_lab.sweep.live import Lines
from opd_lab.sweep.ray import RayLauncher
from opd_lab.sweep.settings import RaySettings, SlurmSettings
from opd_lab.sweep.trials import NoTree, Plan, Trials

SETTINGS = {"ray": RaySettings, "slurm": SlurmSettings}


def settings(kind: str, **changes: Any) -> Any:
    values = yaml.safe_load((config.CONF / "launcher" / f"{kind}.yaml").read_text())
    return config.typed(SETTINGS[kind], values | changes, "launcher")


def sweep(folder: Path, launcher: ClusterLauncher, **changes: Any) -> Trials:
    given = sweep_settings(**changes)
    study = opened(folder, given)
    plan = Plan(folder / "bench", [METRIC], given, orders(folder), 0.1, "tasks:curve")
    return Trials(plan, study, launcher, NoTree(), Lines(study, Console(file=io.StringIO())))


def posted(folder: Path, fate: str, *, attempt: int = 1, steps: int = 4, seconds: float = 0.0) -> Path:
    """A trial's folder with its job."""
    order = Order("none", json.dumps({"top": 0.5, "fate": fate, "seconds": seconds}), 0, steps, 1, str(folder / "run"))
    Mail(folder).write_job(Job(0, attempt, "tasks:curve", [METRIC], [order], waits=False, poll_seconds=0.1))
    return folder


def told(folder: Path, kind: str) -> list[Any]:
    return [event for event in Mail(folder).events() if event["kind"] == kind]


def until(condition, launcher: ClusterLauncher | None = None, seconds: float = 60.0) -> list[Ended]:
    """Wait for something, listening to the launcher meanwhile."""
    ended, limit = [], time.monotonic() + seconds
    while not condition(ended):
        assert time.monotonic() < limit, ended
        if launcher is None:
            time.sleep(0.1)
        else:
            ended += launcher.wait_any(0.1)
    return ended


def a_node_dies(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    launcher = None
    try:
        lost = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        launcher = RayLauncher(settings("ray", address=cluster.address))
        assert launcher.slots == 2
        trials = sweep(tmp_path, launcher, space={"seconds": [2.0, 2.01, 0.01]}, retries=1)
        wait, both = launcher.wait_any, [tmp_path / f"bench/trial_000{n}" for n in (0, 1)]

        def wait_any(seconds):
            if all(told(folder, "evaluated") for folder in both) and lost in cluster.worker_nodes:
                assert not any(told(folder, "outcome") for folder in both)
                cluster.remove_node(lost, allow_graceful=False)
            return wait(seconds)

        launcher.wait_any = wait_any
        trials.run()
    finally:
        if launcher:
            launcher.close()
        cluster.shutdown()
    rows = trials.study.trials()
    assert launcher.slots == 1
    (failed,) = [row for row in rows if row.state.name == "FAIL"]
    assert failed.number in (0, 1)
    assert failed.user_attrs["why"].split(":")[0] in ("NodeDiedError", "WorkerCrashedError")
    assert [row.state.name for row in rows].count("COMPLETE") == 3
    assert [row.params for row in rows if row.user_attrs.get("retry_of") == failed.number] == [failed.params]


def this_machine_alone(tmp_path: Path) -> None:
    del os.environ["RAY_AUTH_TOKEN"]
    launcher = RayLauncher(settings("ray", slots=3, cpus=1, grace_seconds=20))
    try:
        mine = [p for p in psutil.process_iter() if "127.0.0.1" in str(_cmdline(p)) and "ray" in str(_cmdline(p))]
        heard = {c.laddr.ip for p in mine for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        assert heard <= {"127.0.0.1", "::ffff:127.0.0.1"} and heard
        assert not (tmp_path / ".ray").exists()
        gone, slow, asked = (
            posted(tmp_path / name, fate) for name, fate in {"gone": "killed", "slow": "slow", "asked": "slow"}.items()
        )
        for folder in (gone, slow, asked):
            launcher.submit(folder)
        ended = until(lambda _: told(slow, "evaluated"), launcher)
        launcher.cancel(slow, "time limit of 1 s", now=True)
        ended += until(lambda _: told(asked, "started"), launcher)
        launcher.cancel(asked, "stopped", now=False)
        ended += until(lambda more: len(ended) + len(more) == 3, launcher)
        process = told(slow, "started")[0]["pid"]
        until(lambda _: not psutil.pid_exists(process))
    finally:
        launcher.close()
    why = {one.folder: one.killed for one in ended}
    assert why == {gone: "killed by SIGKILL (out of memory?)", slow: "time limit of 1 s", asked: None}, why
    assert [event["state"] for event in told(asked, "outcome")] == ["stopped"]


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def no_room(tmp_path: Path) -> None:
    refused = []
    for changes in ({"gpus": 3}, {"address": "127.0.0.1:1"}):
        try:
            RayLauncher(settings("ray", **changes))
        except ValueError as error:
            refused.append(str(error))
    print(refused)
    assert re.match(r"launcher: no node of the Ray cluster has 1 CPU, 3 GPU, the largest has \d+ CPU", refused[0])
    assert re.match(r"launcher\.address must be .* got 127\.0\.0\.1:1: ", refused[1])


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
