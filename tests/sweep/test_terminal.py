"""What a person does with a sweep from outside: Ctrl-C in its terminal, and Optuna's dashboard on its study."""

import json
import os
import select
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import psutil
import pytest
from bench import METRIC, Bench, sweep_settings
from inline import Inline, one_process
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from opd_lab import config
from opd_lab.sweep.contract import Mail
from tests.tracking.services import free_port, wait_for

TESTS = config.ROOT / "tests"


class Terminal:
    """A process that believes a person sits before it."""

    def __init__(self, *words: str) -> None:
        self._mine, its = os.openpty()
        paths = os.pathsep.join(map(str, (config.ROOT, TESTS, TESTS / "sweep")))
        said = {"PYTHONPATH": paths, "TERM": "xterm", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, *words], stdin=its, stdout=its, stderr=its, start_new_session=True, env=os.environ | said
        )
        os.close(its)
        self.shown, self._over = "", threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def ctrl_c(self) -> None:
        os.write(self._mine, b"\x03")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._over.set()
        self._reader.join()
        os.close(self._mine)

    def _read(self) -> None:
        while not self._over.is_set():
            if select.select([self._mine], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self._mine, 1 << 16).decode(errors="replace")
                except OSError:  # the other side is closed
                    return


@pytest.mark.slow
def test_ctrl_c_asks_and_twice_kills(tmp_path):
    terminal = Terminal(str(TESTS / "sweep" / "terminal.py"), str(tmp_path))
    folder = tmp_path / "optuna" / "stubborn" / "trial_0000"
    try:
        wait_for(lambda: any(event["kind"] == "evaluated" for event in Mail(folder).events()), 90)
        (pid,) = (event["pid"] for event in Mail(folder).events() if event["kind"] == "started")
        terminal.ctrl_c()
        wait_for(lambda: "Ctrl-C again kills them" in terminal.shown, 30)
        assert psutil.pid_exists(pid) and terminal.process.poll() is None
        terminal.ctrl_c()
        assert terminal.process.wait(60) == 130, terminal.shown
        wait_for(lambda: not psutil.pid_exists(pid), 10)
    finally:
        terminal.close()
    assert "the same command goes on from here" in terminal.shown
    assert "Traceback" not in terminal.shown + Mail(folder).log.read_text()
    study = JournalStorage(JournalFileBackend(str(tmp_path / "optuna" / "stubborn.journal")))
    assert [trial.state.name for trial in study.get_all_trials(0)] == ["RUNNING"]


def ask(port: int, path: str) -> dict:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{path}", timeout=10) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_optunas_dashboard_shows_the_study(tmp_path, monkeypatch):
    bench = Bench(tmp_path, sweep_settings(space={"top": [0.2, 0.4], "fate": ["well", "raises"]}), launcher=Inline())
    with one_process(bench.trials, monkeypatch):
        bench.run()
    program = shutil.which("optuna-dashboard", path=str(Path(sys.executable).parent))
    assert program, "pip install 'opd_lab[dashboards]'"
    port = free_port()
    words = [program, str(tmp_path / "bench.journal"), "--host", "127.0.0.1", "--port", str(port), "--quiet"]
    with (tmp_path / "said").open("wb") as said:
        served = subprocess.Popen(words, stdout=said, stderr=said)
    try:
        wait_for(lambda: ask(port, "studies"), 60)
        (study,) = ask(port, "studies")["study_summaries"]
        assert study["study_name"] == "bench"
        assert study["directions"] == ["maximize"]
        shown = ask(port, f"studies/{study['study_id']}")
    finally:
        served.kill()
        served.wait()
    assert shown["objective_names"] == [METRIC]
    assert [(t["number"], t["state"], t.get("values")) for t in shown["trials"]] == [
        (0, "Complete", [0.2]), (1, "Fail", None), (2, "Complete", [0.4]), (3, "Fail", None),
    ]  # fmt: skip
    assert [[(p["name"], p["param_external_value"]) for p in t["params"]] for t in shown["trials"]][1] == [
        ("top", "0.2"), ("fate", "raises"),
    ]  # fmt: skip
