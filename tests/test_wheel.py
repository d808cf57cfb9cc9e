"""The wheel carries conf/, sweeps/ and the lab's models, and runs from anywhere; a user's own configs add to them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHORT = "threads=1 steps=2 rollout.prompts=2 evaluate.problems=2 evaluate.test_problems=2 data.problems=50".split()  # noqa: SIM905


def call(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(w) for w in words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_in_an_empty_environment(tmp_path):
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", ROOT, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    call(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    call(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    mine = elsewhere / "mine" / "method"
    mine.mkdir(parents=True)
    (mine / "gentle.yaml").write_text((ROOT / "conf" / "method" / "fire_opd.yaml").read_text())
    command = tmp_path / "env" / "bin" / "opd-lab"
    out = call(command, "run", *SHORT, cwd=elsewhere)
    assert "step 2/2" in out
    out = call(command, "run", "--config-dir", elsewhere / "mine", "method=gentle", *SHORT, cwd=elsewhere)
    assert "gentle  step 2/2" in out
    out = call(command, "sweep", "smoke", "threads=1", cwd=elsewhere)
    assert "report" in out and (elsewhere / "opd_runs" / "smoke" / "report.html").is_file()
