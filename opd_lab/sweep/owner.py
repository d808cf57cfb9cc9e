"""Who runs a sweep: one process at a time holds its folder, says how it stands, and can be asked to stop."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

STOP = "stop"  # a file in the sweep's folder: as if Ctrl-C were pressed
CARD = "sweep.json"  # how it stood when something last happened


def home(tracking_folder: Path) -> Path:
    """Where the sweeps of a tracking folder are."""
    return tracking_folder.absolute() / "optuna"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a sweep's folder.

    Raises:
        ValueError: another process runs this sweep.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "sweep.lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise ValueError(
                f"the sweep {folder.name} is running already ({lock.read()}); opd-lab stop {folder.name} ends it"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def running(folder: Path) -> bool:
    """Whether some process holds a sweep's folder."""
    path = folder / "sweep.lock"
    if not path.exists():
        return False
    with path.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    path = folder / "sweep.tmp"
    path.write_text(json.dumps(card, indent=1))
    path.replace(folder / CARD)


def read_card(folder: Path) -> dict[str, Any]:
    """Empty for a sweep that never began."""
    path = folder / CARD
    return json.loads(path.read_text()) if path.exists() else {}


def begun(tracking_folder: Path, name: str) -> Path:
    """The folder of a sweep that was begun.

    Raises:
        ValueError: there is none of this name.
    """
    folder = home(tracking_folder) / name
    if not (folder / CARD).exists():
        names = ", ".join(path.parent.name for path in _cards(tracking_folder))
        raise ValueError(f"there is no sweep {name} in {folder.parent}; it has {names or 'none'}")
    return folder


def stop(tracking_folder: Path, name: str) -> str:
    """Ask a running sweep, on whatever machine, to stop.

    Raises:
        ValueError: there is none of this name.
    """
    folder = begun(tracking_folder, name)
    if not running(folder):
        return f"{name} is not running"
    (folder / STOP).touch()
    return f"{name} is asked to stop; the command that began it goes on with it"


def table(tracking_folder: Path) -> Table:
    """Every sweep of a tracking folder: state, done, target, best."""
    shown = Table(pad_edge=False)
    for name in ("sweep", "state", "done", "pruned", "failed", "best", "trial"):
        shown.add_column(name, no_wrap=True)
    for name in ("objective", "question"):
        shown.add_column(name, overflow="fold")
    for path in _cards(tracking_folder):
        card = json.loads(path.read_text())
        ended = card["done"] >= card["target"]
        state = "running" if running(path.parent) else "finished" if ended else "stopped"
        best = card["best"] or {"value": None, "trial": "-"}
        shown.add_row(
            card["name"],
            state,
            f"{card['done']}/{card['target']}",
            str(card["pruned"]),
            str(card["failed"]),
            "-" if best["value"] is None else f"{best['value']:.4f}",
            str(best["trial"]),
            ", ".join(card["objective"]),
            card.get("question") or "-",
        )
    return shown


def _cards(tracking_folder: Path) -> list[Path]:
    return sorted(home(tracking_folder).glob(f"*/{CARD}"))
