"""Stores that tests start for themselves, on loopback, and everything that a store holds of a run."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def mlflow_server(home: Path, port: int, *, database: str | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """An MLflow server with its page, over a SQLite file; a process group of its own."""
    words = ["server", "--backend-store-uri", database or f"sqlite:///{home / 'mlflow.db'}", "--workers", "1"]
    words += ["--artifacts-destination", str(home / "artifacts"), "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("ab") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words],
            cwd=home,
            env=os.environ | QUIET,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).status == 200, 90)
        yield server
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL server of its own; the URI of an empty database. Run by root, it belongs to nobody."""
    found = [shutil.which("initdb"), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
    binaries = [Path(path).resolve().parent for path in found if path]
    if not binaries:
        reason = "needs PostgreSQL's initdb and pg_ctl, in PATH or /usr/lib/postgresql: apt-get install postgresql"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    owner = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None
    become = [] if owner is None else ["setpriv", "--reuid", str(owner), "--clear-groups"]
    port = free_port()
    with tempfile.TemporaryDirectory() as home:
        if owner is not None:
            os.chown(home, owner, -1)

        def ask(tool: str, *words: str) -> None:
            command = [*become, str(binaries[0] / tool), "-D", f"{home}/data", *words]
            with open(f"{home}/said", "w+") as said:  # the server keeps what it gets, so no pipe
                done = subprocess.run(command, cwd=home, stdout=said, stderr=said)
                said.seek(0)
                assert done.returncode == 0, said.read()

        ask("initdb", "-U", "lab", "--auth", "trust", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={home}"
        ask("pg_ctl", "-w", "-l", f"{home}/log", "-o", options, "start")
        try:
            yield f"postgresql://lab@127.0.0.1:{port}/postgres"
        finally:
            ask("pg_ctl", "-m", "immediate", "stop")


def wait_for(true: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if true():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def content(client: Any, run_id: str, scratch: Path) -> dict[str, Any]:
    """All that a store holds of a run: every point of every metric, params, tags, data sets, files to the byte."""
    run = client.get_run(run_id)
    files = Path(client.download_artifacts(run_id, "", str(scratch)))
    histories = {name: client.get_metric_history(run_id, name) for name in run.data.metrics}
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")
    return {
        "run": (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time),
        "metrics": {name: [(m.step, repr(m.value), m.timestamp) for m in points] for name, points in histories.items()},
        "params": run.data.params,
        "tags": {name: text for name, text in run.data.tags.items() if name != "mlflow.user"},
        "data": sorted((i.tags[0].value, i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs),
        "files": {str(p.relative_to(files)): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()},
        "models": [(model.name, str(model.status)) for model in models],
    }
