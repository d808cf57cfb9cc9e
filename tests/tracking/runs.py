"""Runs and trackers for the tests."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

import torch

from opd_lab.diagnostics.histograms import count
from opd_lab.tracking.tracker import RunInfo, Tracker
from opd_lab.types import Report


def info(folder: Path, step: int = 0, **fields: Any) -> RunInfo:
    known: dict[str, Any] = {
        "name": folder.name,
        "experiment": "tests",
        "folder": folder,
        "params": {"seed": 0, "optim.lr": 0.9},
        "tags": {"method": "opd"},
        "config_yaml": "seed: 0\n",
        "dataset": {"name": "lab", "source": "arithmetic", "train": "0" * 64, "test": "1" * 64},
        "step": step,
    }
    return RunInfo(**known | fields)


def report(step: int) -> Report:
    """The same for the same step, but for the time."""
    g = torch.Generator().manual_seed(step)
    return Report(
        step,
        {
            "kl/reverse_mean_nats": float(torch.rand((), generator=g, dtype=torch.float64)),
            "eval/pass_at_1": step / 7,
            "time/step_seconds": float(torch.rand(())),
        },
        {"kl/reverse_nats": count(torch.rand(20, generator=g), "kl_nats")},
        {
            "high_loss_tokens": [{"step": step, "rank": 0, "token": "a", "count": step + 1}],
            "rollouts": [{"step": step, **rollout(step)}],
            "positions": [{"step": step, "decile": 0, "tokens": 2, "kl_reverse_mean_nats": 0.5}],
        },
    )


def rollout(uid: int) -> dict[str, Any]:
    """Two tokens, of which the first was given."""
    nan = float("nan")
    said = {"uid": uid, "group": 0, "reward": nan, "stopped": True, "prompt": "p", "text": "t u", "tokens": ["t", "u"]}
    return said | {"source": ["given", "student"], "reverse_kl": [nan, 0.5]}


class Flaky:
    """A remote tracker that takes what it gets while it is up."""

    name: ClassVar[str] = "flaky"
    remote: ClassVar[bool] = True
    tables: ClassVar[Collection[str]] = ()

    def __init__(self) -> None:
        self.up, self.got, self.tries = True, [], 0

    def start(self, run: RunInfo) -> None:
        self.take("start")

    def log(self, report: Report) -> None:
        self.take(report.step)

    def artifact(self, path: Path, folder: str = "") -> None:
        self.take((path, folder))

    def tag(self, name: str, value: str) -> None:
        self.take((name, value))

    def flush(self) -> None: ...

    def finish(self, status: str) -> None:
        self.take(status)

    def take(self, what: Any) -> None:
        self.tries += 1
        if not self.up:
            raise ConnectionError("the store is away")
        self.got.append(what)


_: type[Tracker] = Flaky
