"""A launcher without processes: a trial runs inside `wait_any`, and a kill can hit any write of either side."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from optuna.storages.journal import JournalFileBackend

from opd_lab.sweep import contract, trials, worker
from opd_lab.sweep.contract import Ended


class Killed(BaseException):
    """As sudden as a signal: nothing is closed."""


class Inline:
    """A `Launcher` with one slot."""

    slots, threads, poll_seconds = 1, 1, 0.0

    def __init__(self) -> None:
        self.submitted: list[int] = []
        self._folder: Path | None = None

    def adopt(self, folder: Path) -> bool:
        return False

    def submit(self, folder: Path) -> str:
        self._folder = folder
        self.submitted.append(int(folder.name.split("_")[1]))
        return "here"

    def wait_any(self, seconds: float) -> list[Ended]:
        assert self._folder is not None
        worker.main(str(self._folder))
        return [Ended(self._folder)]

    def cancel(self, folder: Path, why: str, *, now: bool) -> None:
        raise AssertionError(why)

    def close(self) -> None:
        pass


@contextmanager
def one_process(sweep: trials.Trials, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """While a trial waits for its verdict, the sweep listens."""

    def listen(seconds: float) -> None:
        for running in sweep.running.values():
            sweep._listen(running)

    with patch.context() as mine:
        mine.setattr(worker, "time", SimpleNamespace(sleep=listen, time=time.time))
        mine.setattr(worker, "signal", SimpleNamespace(signal=lambda *_: None, SIGTERM=15))
        yield


class Writes:
    """Counts every write of the study, of events and of verdicts; the `fatal` one is left half done, its lock too."""

    def __init__(self, patch: pytest.MonkeyPatch, fatal: int | None = None) -> None:
        self.count, self._fatal = 0, fatal
        append_logs, append = JournalFileBackend.append_logs, contract._append

        def study_write(backend, logs):
            if self._last():
                Path(f"{backend._file_path}.lock").symlink_to(backend._file_path)
                with open(backend._file_path, "ab") as file:
                    file.write(b'{"op_code": 4, "worker_')
                raise Killed
            append_logs(backend, logs)

        def mail_write(path, said):
            if self._last():
                with path.open("ab") as file:
                    file.write(b'{"kind": "eva')
                raise Killed
            append(path, said)

        patch.setattr(JournalFileBackend, "append_logs", study_write)
        patch.setattr(contract, "_append", mail_write)

    def _last(self) -> bool:
        self.count += 1
        return self.count == self._fatal
