"""A follower in a process of its own, so that delivery takes neither the interpreter's lock from the training loop nor,
where there is another core, any of its time.

The process is a fork: it has the modules already, and a store is opened in it only, so that no connection is shared. It
ends with the process that made it, however that ends: its pipe is closed then.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from opd_lab.tracking.delivery import Follower

if TYPE_CHECKING:
    from opd_lab.tracking.tracker import RunInfo, Tracker

CAN_FORK = sys.platform == "linux"  # elsewhere a process with threads must not be forked
GARBAGE = 50_000  # objects between two collections; delivery makes and drops many at once
log = logging.getLogger("opd_lab.tracking")


class Apart:
    """Like `Follower`, which works in the process."""

    def __init__(self, tracker: Tracker, run: RunInfo, retry_seconds: float, together_seconds: float) -> None:
        context = multiprocessing.get_context("fork")
        self._name, self._gone = tracker.name, False
        self._pipe, theirs = context.Pipe()
        arguments = (self._pipe, theirs, tracker, run, retry_seconds, together_seconds)
        self._process = context.Process(target=_serve, args=arguments, name=f"tracking-{tracker.name}", daemon=True)
        with warnings.catch_warnings():  # the fork uses no thread of this process and no lock that one may hold
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            self._process.start()
        theirs.close()
        error = self._answer()
        if error is not None:
            self._process.join()
            raise error

    def call(self, method: str, *arguments: Any) -> None:
        self._send("call", method, *arguments)

    def wake(self) -> None:
        self._send("wake")

    def rest(self) -> None:
        self._send("rest")
        self._answer()

    def finish(self, status: str) -> None:
        self._send("finish", status)
        self._answer()
        if self._gone:
            log.error("%s did not take everything, the run folder has it: run `opd-lab sync`", self._name)
        self._pipe.close()
        self._process.join()

    def _send(self, method: str, *arguments: Any) -> None:
        try:
            while not self._gone and self._pipe.poll():
                self._say(self._pipe.recv())
            if not self._gone:
                self._pipe.send((method, arguments))
        except (OSError, EOFError):
            self._lose()

    def _answer(self) -> Exception | None:
        """What the process says of what it was last asked; what it logs until then is logged."""
        while not self._gone:
            try:
                said = self._pipe.recv()
            except (OSError, EOFError):
                self._lose()
                break
            if not isinstance(said, logging.LogRecord):
                return said
            self._say(said)
        return None

    def _say(self, said: Any) -> None:
        if isinstance(said, logging.LogRecord):
            log.handle(said)

    def _lose(self) -> None:
        self._gone = True
        self._process.join(1.0)
        code = self._process.exitcode
        log.warning("the process of %s has ended (exit code %s); the run goes on without it", self._name, code)


class _Piped(logging.Handler):
    """Has the parent log, which knows whether a progress line stands in the way."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        with suppress(OSError):  # the parent is gone, and this process will be
            self._pipe.send(record)


def _serve(
    parents: Connection,
    pipe: Connection,
    tracker: Tracker,
    run: RunInfo,
    retry_seconds: float,
    together_seconds: float,
) -> None:
    parents.close()
    os.nice(19)  # where no core is free, training goes first
    gc.freeze()  # what the run has made stays, and is not looked through again and again
    gc.set_threshold(GARBAGE)
    os.setpgid(0, 0)  # what stops the run, Ctrl-C or its sweep, does not stop the delivery of its last words
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_DFL)
    log.handlers, log.propagate = [_Piped(pipe)], False
    with suppress(EOFError, OSError):  # the parent is gone
        try:
            follower = Follower(tracker, run, retry_seconds, together_seconds)
        except Exception as error:
            expected = isinstance(error, ValueError)
            pipe.send(ValueError(str(error)) if expected else RuntimeError(f"{type(error).__name__}: {error}"))
            return
        pipe.send(None)
        _obey(pipe, follower)


def _obey(pipe: Connection, follower: Follower) -> None:
    """Do what the parent asks until it is finished."""
    method = ""
    while method != "finish":
        method, arguments = pipe.recv()
        getattr(follower, method)(*arguments)
        if method in ("rest", "finish"):
            pipe.send(None)
