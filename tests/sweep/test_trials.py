"""Trials side by side, each alone with its fate; a sweep that was cut off goes on as if it had not been."""

import os
import re
import signal
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest
import tasks
from bench import Bench, launcher, sweep_settings
from optuna.trial import TrialState

from opd_lab.sweep import local, owner
from opd_lab.sweep.contract import Mail


@pytest.fixture(autouse=True)
def quick_start(monkeypatch):
    """These trials need no model."""
    monkeypatch.setattr(local, "PRELOAD", ["opd_lab.sweep.worker"])


FATES = {"fate": ["well", "killed", "raises", "diverges", "well again"]}


def test_a_grid_runs_every_point_once_in_order(tmp_path):
    settings = sweep_settings(space={"top": [0.2, 0.4], "x": "range(0,3)"})
    bench = Bench(tmp_path, settings).run()
    assert [tuple(row["params"].values()) for row in bench.table()] == [
        (0.2, 0), (0.2, 1), (0.2, 2), (0.4, 0), (0.4, 1), (0.4, 2),
    ]  # fmt: skip
    assert [row["values"] for row in bench.table()] == [[0.2]] * 3 + [[0.4]] * 3
    assert bench.table()[5]["reported"] == pytest.approx({1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4})
    again = Bench(tmp_path, settings).run()
    assert again.table() == bench.table()
    assert "started" not in again.out.getvalue()


def test_each_fate_is_that_trials_alone(tmp_path):
    bench = Bench(tmp_path, sweep_settings(space=FATES), slots=2).run()
    assert bench.states() == "COMPLETE FAIL FAIL FAIL COMPLETE"
    why = [t.user_attrs.get("why", "") for t in bench.study.trials()]
    assert why[1] == "killed by SIGKILL (out of memory?)"
    assert why[2].endswith("RuntimeError: no such luck\n")
    assert why[3] == "eval/validation/avg_at_4 is nan after run 0"
    assert 'raise RuntimeError("no such luck")' in bench.out.getvalue()


def test_time_and_memory_have_limits(tmp_path):
    settings = sweep_settings(space={"fate": ["slow", "large", "well"]}, time_limit_seconds=4.0)
    bench = Bench(tmp_path, settings, slots=2, memory_limit_gib=0.9).run()
    assert bench.states() == "FAIL FAIL COMPLETE"
    why = [t.user_attrs.get("why", "") for t in bench.study.trials()]
    assert why[0] == "time limit of 4 s"
    assert why[1].startswith("memory limit of 0.9 GiB: it used 1.")


def test_a_process_that_never_starts_to_work_has_the_same_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_child", tasks.never)
    bench = Bench(tmp_path, sweep_settings(space={"x": [1, 2]}, time_limit_seconds=0.1), slots=2).run()
    assert [t.user_attrs["why"] for t in bench.study.trials()] == ["time limit of 0.1 s"] * 2
    events = list(Mail(tmp_path / "bench" / "trial_0001").events())
    assert events == [{"kind": "placed", "attempt": 1}]


@pytest.mark.slow
def test_each_trial_has_its_gpu_before_torch_is_imported(tmp_path, monkeypatch):
    """Python runs `sitecustomize` first in every process; there one notes what a process sees as it asks for torch."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            sys.meta_path.remove(self)\n"
        "            with open(os.environ['SEEN'], 'a') as file:\n"
        "                print(os.getpid(), os.environ['CUDA_VISIBLE_DEVICES'], file=file)\n"
        "sys.meta_path.insert(0, Watch())\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")  # the sweep's own
    bench = Bench(tmp_path, sweep_settings(space={"x": "range(0,5)"}), gpus=[0, 2], trials_per_gpu=2).run()
    assert bench.states() == "COMPLETE " * 4 + "COMPLETE"
    seen = dict(line.split() for line in (tmp_path / "seen").read_text().splitlines())
    mails = [Mail(tmp_path / "bench" / f"trial_{number:04d}") for number in range(5)]
    pids = [str(said["pid"]) for mail in mails for said in mail.events() if said["kind"] == "started"]
    where = re.findall(r"trial \d started on (gpu (\d) #\d)", bench.out.getvalue())
    assert [slot for slot, _ in where[:4]] == ["gpu 0 #0", "gpu 2 #0", "gpu 0 #1", "gpu 2 #1"]
    assert [seen[pid] for pid in pids] == [gpu for _, gpu in where]
    assert seen.keys() == set(pids) and os.environ["CUDA_VISIBLE_DEVICES"] == "7"


def test_ctrl_c_is_not_for_the_fork_server(tmp_path):
    """It would print a traceback of its imports into the terminal."""
    launcher()
    status = Path(f"/proc/{forkserver._forkserver._forkserver_pid}/status").read_text()
    (blocked,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigBlk"))
    assert int(blocked, 16) & 1 << signal.SIGINT - 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "import threading; threading.Event().wait()",
            r"is not ready after launcher.start_seconds=0.5: it imports ends",
        ),
        ("raise RuntimeError('no such luck')", r"has died: it imports ends; `.*python.* -X importtime -m ends` shows"),
    ],
)
def test_a_fork_server_that_never_gets_ready_ends_the_sweep(tmp_path, monkeypatch, line, words):
    forkserver._forkserver._stop()  # one that is ready
    (tmp_path / "ends.py").write_text(line)
    settings = sweep_settings(space={"top": [0.25]})
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
        patch.setattr(local, "PRELOAD", ["ends"])
        with pytest.raises(ValueError, match=words):
            Bench(tmp_path, settings, start_seconds=0.5 if "wait" in line else 60.0).run()
        mine = [p.info for p in psutil.process_iter(["ppid", "cmdline"]) if p.info["ppid"] == os.getpid()]
        assert not [said for said in mine if "'ends'" in " ".join(said["cmdline"] or [])]
    assert Bench(tmp_path, settings).run().states() == "COMPLETE"


def test_a_failed_trial_is_repeated_under_a_number_of_its_own(tmp_path):
    bench = Bench(tmp_path, sweep_settings(space={"fate": ["raises", "well"]}, retries=2)).run()
    assert bench.states() == "FAIL FAIL FAIL COMPLETE"
    assert [t.user_attrs.get("retry_of") for t in bench.study.trials()] == [None, 0, 1, None]
    assert [t.params["fate"] for t in bench.study.trials()] == ["raises", "raises", "raises", "well"]
    assert (bench.study.failures(), bench.study.count_ended()) == (1, 2)


@pytest.mark.parametrize(("limit", "states"), [({"max_failures": 0}, "FAIL"), ({"fail_fast": True}, "FAIL")])
def test_a_sweep_may_end_at_failures(tmp_path, limit, states):
    bench = Bench(tmp_path, sweep_settings(space={"fate": ["raises", "well", "diverges"]}, **limit)).run()
    assert bench.states() == states
    assert bench.trials.stopped and next(iter(limit)) in bench.trials.stopped


def test_trials_that_share_a_run_folder_take_turns(tmp_path):
    settings = sweep_settings(space={"top": "interval(0.5,0.5000001)"}, sampler="random", trials=3)
    bench = Bench(tmp_path, settings, slots=2, seconds=0.05)
    same = bench.trials.plan.orders({"top": 0.5})
    object.__setattr__(bench.trials.plan, "orders", lambda params: same)
    overlapping = []
    submit = bench.trials.launcher.submit

    def counted(folder):
        overlapping.append(len(bench.trials.running))
        return submit(folder)

    bench.trials.launcher.submit = counted
    bench.run()
    assert bench.states() == "COMPLETE COMPLETE COMPLETE"
    assert overlapping == [0, 0, 0]


@pytest.mark.parametrize("how", ["by a signal", "by a file"])
def test_a_stopped_trial_is_resumed_under_its_number(tmp_path, how):
    settings = sweep_settings(space={"top": [0.2, 0.4]})
    bench = Bench(tmp_path, settings, seconds=0.3)

    def stop(running):
        if how == "by a signal":
            os.kill(os.getpid(), signal.SIGINT)
        else:
            (tmp_path / "bench" / owner.STOP).touch()
        bench.trials.view.moved = lambda running: None

    bench.trials.view.moved = stop
    bench.run()
    assert bench.states() == "RUNNING" and bench.trials.interrupted
    again = Bench(tmp_path, settings).run()
    assert again.states() == "COMPLETE COMPLETE"
    assert again.study.trials()[0].user_attrs["attempts"] == 2
    assert again.study.count(TrialState.RUNNING) == 0
