"""The whole process group of a real sweep, killed."""

import subprocess
import sys

import pytest

from opd_lab import config


@pytest.mark.slow
def test_a_search_with_pruning_that_was_killed_twice(tmp_path):
    script = config.ROOT / "benchmarks" / "sweep_resume.py"
    words = ["--trials", "7", "--steps", "3", "--kills", "2", "--only", "search", "--folder", str(tmp_path)]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished trials run again: none" in done.stdout
