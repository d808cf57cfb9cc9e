"""What a launcher must do, and how a trial and its sweep speak: through plain files in the trial's folder.

    job.json        sweep -> trial   what to run; written anew at every attempt
    events.jsonl    trial -> sweep   appended: placed, started, step, evaluated, run, outcome
    verdicts.jsonl  sweep -> trial   appended: after an evaluation, may the trial go on?
    log.txt         what the trial prints, tracebacks included

Files work the same for processes of this machine, of a Ray cluster and of Slurm on a shared disk, and they outlive both
sides. A trial runs wherever `opd_lab.sweep.worker.main(folder)` is called; all it needs to know is in that folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Ended:
    """A trial's process is gone. What became of the trial is in its events, unless it was `killed`."""

    folder: Path
    killed: str | None = None  # None = the worker returned; otherwise why it did not: `killed by SIGKILL`


class Launcher(Protocol):
    """Where trials run. A trial is known by its folder."""

    slots: int  # trials at once
    threads: int  # CPU threads of a trial whose config does not say
    poll_seconds: float  # how often the sweep looks at its trials, and a trial at its verdict

    def adopt(self, folder: Path) -> bool:
        """Whether this trial still runs, started by a sweep that has died since; if so it counts as submitted."""
        ...

    def submit(self, folder: Path) -> str:
        """Start `worker.main(str(folder))` somewhere; says where: `slot 0`. Called with fewer than `slots` running."""
        ...

    def wait_any(self, seconds: float) -> list[Ended]:
        """The trials that have ended since the last call; waits for one, but not longer than this."""
        ...

    def cancel(self, folder: Path, why: str, *, now: bool) -> None:
        """Ask a trial to stop (SIGTERM), or kill it and all its processes `now`. `wait_any` reports it as `killed` by
        `why`, unless it ended on its own before."""
        ...

    def close(self) -> None:
        """Give back whatever is held, killing what still runs."""
        ...


@dataclass(frozen=True)
class Order:
    """One run of a trial."""

    method: str
    config: str  # YAML, resolved
    seed: int
    steps: int
    every: int  # steps between evaluations; 0 = only after the last
    folder: str  # the run folder: two trials that share it wait for each other
    mlflow_run_id: str | None = None

    @property
    def evaluations(self) -> int:
        """How many there are, the one after the last step included."""
        return math.ceil(self.steps / self.every) if self.every else 1


@dataclass(frozen=True)
class Job:
    """What `job.json` says."""

    trial: int
    attempt: int  # 1 = the first
    task: str  # `module:function`: task(order, metrics, report) -> {metric: value}
    metrics: Sequence[str]  # the objectives
    runs: Sequence[Order]  # one per seed, one after another
    waits: bool  # whether every evaluation waits for a verdict
    poll_seconds: float


class Mail:
    """The files of one trial."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log.txt"
        self._read = 0  # bytes of events.jsonl that `events` has returned

    def write_job(self, job: Job) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "job.tmp"
        path.write_text(json.dumps(asdict(job), indent=1))
        path.replace(self.folder / "job.json")

    def job(self) -> Job | None:
        """The last attempt's; None before the first."""
        path = self.folder / "job.json"
        if not path.exists():
            return None
        said = json.loads(path.read_text())
        return Job(**said | {"runs": [Order(**order) for order in said["runs"]]})

    def post(self, kind: str, **said: Any) -> None:
        """Append an event."""
        _append(self.folder / "events.jsonl", {"kind": kind, **said})

    def placed(self) -> None:
        """Say, for the launcher, that the trial has left every queue: its process is made, and its time runs."""
        job = self.job()
        assert job is not None, self.folder
        self.post("placed", attempt=job.attempt)

    def events(self) -> Iterator[Mapping[str, Any]]:
        """The events that have come since the last call, complete lines only."""
        path = self.folder / "events.jsonl"
        if not path.exists() or path.stat().st_size == self._read:
            return
        with path.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        yield from _lines(whole)

    def decide(self, run: int, step: int, go: bool) -> None:
        _append(self.folder / "verdicts.jsonl", {"run": run, "step": step, "go": go})

    def verdict(self, run: int, step: int) -> bool | None:
        """Whether the trial may go on after this evaluation; None = not decided yet. A verdict is never changed."""
        path = self.folder / "verdicts.jsonl"
        for said in _lines(path.read_bytes()) if path.exists() else ():
            if (said["run"], said["step"]) == (run, step):
                return said["go"]
        return None


def _append(path: Path, said: Mapping[str, Any]) -> None:
    """One line. What a killed writer left unfinished is closed first, so that it spoils no other line."""
    with path.open("ab+") as file:
        end = file.seek(0, 2)
        torn = end > 0 and (file.seek(end - 1), file.read(1))[1] != b"\n"
        file.write(b"\n" * torn + json.dumps(said).encode() + b"\n")


def _lines(text: bytes) -> Iterator[Mapping[str, Any]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # torn by a kill
            continue
