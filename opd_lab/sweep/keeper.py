"""A trial on the machine that a cluster chose: a process in a session of its own, and somebody who watches over it.

The cluster's own process only keeps the trial, so that the signals of Ray, Slurm and submitit do not mix with the
trial's. The two are joined by a pipe: when the keeper is gone, whatever killed it, so are the trial and all it started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from opd_lab.sweep.contract import Mail
from opd_lab.sweep.local import cause

STOP = "stop"  # a file in the trial's folder: asks it to stop
POLL_SECONDS = 0.2  # how often the keeper looks
FOREIGN = {signal.SIGTERM, signal.SIGUSR2}  # Slurm sends them to everybody, but they speak to the keeper alone


def keep(folder: str, environment: Mapping[str, str]) -> str | None:
    """Run a trial to its end; says why it was killed, None if it ended on its own."""
    path = Path(folder)
    Mail(path).placed()
    command = [sys.executable, "-m", "opd_lab.sweep.keeper", folder]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FOREIGN)  # the trial inherits it
    with Mail(path).log.open("ab") as log:
        trial = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, env=os.environ | environment
        )
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    asked = False
    try:
        while trial.poll() is None:
            if not asked and (path / STOP).exists():
                asked = True
                trial.send_signal(signal.SIGINT)
            time.sleep(POLL_SECONDS)
    finally:
        _kill(trial)  # what it may have left behind, or all of it if this is the end of the keeper
    return cause(trial.returncode) if trial.returncode else None


def _kill(trial: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(trial.pid, signal.SIGKILL)
    trial.communicate()


def _end_with_the_keeper() -> None:
    os.read(0, 1)  # nothing is ever written: this returns when the other end is closed
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started Ray in the background
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked by Ray's workers
    threading.Thread(target=_end_with_the_keeper, daemon=True).start()
    from opd_lab.sweep.worker import main

    main(sys.argv[1])
