"""Run folders are read without torch: whoever looks at runs needs none of what made them."""

import subprocess
import sys
from pathlib import Path

from opd_lab.tracking import read
from opd_lab.tracking.run_folder import RunFolder
from opd_lab.tracking.tracker import RunInfo
from opd_lab.types import Report


def test_reading_and_comparing_need_no_torch():
    code = """
import sys
sys.modules["torch"] = None
import opd_lab.bins, opd_lab.compare.guard, opd_lab.compare.table, opd_lab.tracking.figures, opd_lab.tracking.read
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
