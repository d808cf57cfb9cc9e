"""Trials on Ray and on Slurm: each alone with its fate, whatever happens to workers, nodes and jobs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from scenes import posted, settings, told, until

from opd_lab import config
from opd_lab.sweep.contract import Ended
from opd_lab.sweep.ray import RayLauncher
from opd_lab.sweep.slurm import NOTE, RESULT, SlurmLauncher

HERE = Path(__file__).parent


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """An environment in which nothing listens beyond this machine, and nothing is written to the home of its user."""
    monkeypatch.setenv("PYTHONPATH", f"{config.PACKAGE.parent}{os.pathsep}{HERE}")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64,
        "RAY_USAGE_STATS_ENABLED": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


@pytest.mark.slow
@pytest.mark.parametrize("scene", ["a_node_dies", "this_machine_alone", "no_room"])
def test_ray(scene, machine, tmp_path):
    command = [sys.executable, HERE / "scenes.py", scene, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("ray", {"cpus": 0}, "launcher.cpus must be >= 1, got 0"),
        ("ray", {"gpus": -0.5}, "launcher.gpus must be >= 0, got -0.5"),
        ("ray", {"slots": 0}, "launcher.slots must be >= 1 or auto, got 0"),
        ("slurm", {"slots": 0}, "launcher.slots must be >= 1, got 0"),
        ("slurm", {"cluster": "pbs"}, "launcher.cluster must be slurm or local, got pbs"),
        ("slurm", {}, "launcher.cluster=slurm needs sbatch and srun in the PATH, got none"),
    ],
)
def test_settings_that_cannot_work(kind, changes, words, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=words):
        (RayLauncher if kind == "ray" else SlurmLauncher)(settings(kind, **changes))


@pytest.mark.parametrize(("kind", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_package_is_named_with_its_extra(kind, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs the package {package}; pip install 'opd_lab\[{kind}\]'"):
        (RayLauncher if kind == "ray" else SlurmLauncher)(settings(kind))


@pytest.mark.slow
def test_submitit_on_this_machine(machine, tmp_path):
    launcher = SlurmLauncher(settings("slurm", cluster="local", slots=4, lost_seconds=2, mem_gb=None))
    gone, lost, well, preempted = folders = [
        posted(tmp_path / name, name, seconds=0.5) for name in ("killed", "slow", "well", "well again")
    ]
    for folder in folders:
        launcher.submit(folder)
    ended = until(lambda _: all(told(folder, "started") for folder in folders), launcher)
    _keeper(lost).kill()  # as when a node is lost
    _keeper(preempted).send_signal(signal.SIGUSR2)
    ended += until(lambda more: len(ended) + len(more) == 4, launcher)
    why = {one.folder: one.killed for one in ended}
    assert why[gone] == "killed by SIGKILL (out of memory?)"
    assert why[lost] and why[lost].startswith(f"job {json.loads((lost / NOTE).read_text())['id']} ended as FINISHED")
    assert why[well] is None and why[preempted] is None
    for kind in ("placed", "started"):
        assert [len(told(folder, kind)) for folder in folders] == [1, 1, 1, 2]
    assert [len(told(folder, "outcome")) for folder in folders] == [0, 0, 1, 1]
    trial = told(lost, "started")[0]["pid"]
    until(lambda _: not psutil.pid_exists(trial))
    launcher.close()


def _keeper(folder: Path) -> psutil.Process:
    trial = psutil.Process(told(folder, "started")[-1]["pid"])
    keeper = trial.parent()
    assert keeper is not None and "submitit.core._submit" in keeper.cmdline()
    return keeper


SLURM = {
    "srun": "exit 1",
    "sbatch": 'cp "$1" {home}/batch.sh; echo Submitted batch job 7',
    "scancel": "echo $@ >> {home}/cancelled",
    "sacct": 'printf "JobID|State|NodeList\\n7|%s|node1\\n" $(cat {home}/state)',
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Slurm's commands, saying what a test tells them to."""
    home = tmp_path / "slurm"
    home.mkdir()
    for name, text in SLURM.items():
        (home / name).write_text("#!/bin/sh\n" + text.format(home=home) + "\n")
        (home / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}{os.pathsep}{os.environ['PATH']}")
    (home / "state").write_text("RUNNING")
    import submitit

    submitit.SlurmJob.watcher.clear()  # of the jobs of other tests
    return home


def test_a_slurm_job_asks_for_what_the_settings_say(slurm, tmp_path):
    launcher = SlurmLauncher(settings(
        "slurm", partition="gpu", minutes=90, cpus=4, gpus=2, mem_gb=32, setup=["module load cuda"],
        additional={"account": "us"},
    ))  # fmt: skip
    folder = posted(tmp_path / "trial", "well")
    assert launcher.submit(folder) == "job 7"
    asked = (slurm / "batch.sh").read_text()
    for line in (
        "#SBATCH --partition=gpu", "#SBATCH --time=90", "#SBATCH --cpus-per-task=4", "#SBATCH --gpus-per-node=2",
        "#SBATCH --mem=32GB", "#SBATCH --account=us", "#SBATCH --signal=USR2@90", "module load cuda",
    ):  # fmt: skip
        assert line in asked
    assert (launcher.threads, launcher.slots) == (4, 16)


def test_a_sweep_that_died_finds_its_slurm_jobs(slurm, tmp_path):
    first = SlurmLauncher(settings("slurm", lost_seconds=0.05))
    folder = posted(tmp_path / "trial", "well")
    assert not first.adopt(folder)
    first.submit(folder)

    again = SlurmLauncher(settings("slurm", lost_seconds=0.05))
    assert again.adopt(folder)
    assert again.wait_any(0) == []
    again.cancel(folder, "time limit of 9 s", now=True)
    assert (slurm / "cancelled").read_text() == "7\n"
    (slurm / "state").write_text("CANCELLED")
    again._running[folder].handle.submitted.done(force_check=True)
    assert again.wait_any(0) == []  # its result may still appear
    time.sleep(0.1)
    assert again.wait_any(0) == [Ended(folder, "time limit of 9 s")]


@pytest.mark.parametrize(("state", "result", "adopted"), [("COMPLETED", True, True), ("NODE_FAIL", False, False)])
def test_what_ended_while_no_sweep_looked(slurm, tmp_path, state, result, adopted):
    """A job with a result is not run again; one without is."""
    folder = posted(tmp_path / "trial", "well")
    SlurmLauncher(settings("slurm")).submit(folder)
    (slurm / "state").write_text(state)
    if result:
        (folder / RESULT).write_text('{"killed": null}')
    again = SlurmLauncher(settings("slurm"))
    assert again.adopt(folder) is adopted
    assert again.wait_any(0) == ([Ended(folder)] if adopted else [])
    posted(folder, "well", attempt=2)
    assert not SlurmLauncher(settings("slurm")).adopt(folder)  # the job was of an attempt that is over
