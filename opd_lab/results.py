"""Questions to finished runs: their table and report, and another evaluation of a student they left."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from opd_lab import checkpoint, config
from opd_lab.evaluate import evaluate
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.run import load_parts
from opd_lab.settings import RunSettings
from opd_lab.types import Behavior

if TYPE_CHECKING:
    from opd_lab.compare.table import Comparison


def show(folder: Path, baseline: str | None = None) -> None:
    """Table and report of every finished run below a folder, or of one run.

    Raises:
        ValueError: there is no finished run, or none of the baseline.
    """
    show_runs(runs_in(folder), folder, baseline)


def runs_in(folder: Path) -> list[Path]:
    """The run folders below a folder, or the folder itself.

    Raises:
        ValueError: there is none.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give a run folder, or a folder of runs: opd_runs/EXPERIMENT")
    runs = [folder] if (folder / "status.json").is_file() else sorted(p.parent for p in folder.glob("*/status.json"))
    if not runs:
        raise ValueError(f"{folder} holds no run (no */status.json); runs are in opd_runs/EXPERIMENT")
    return runs


def rebuild(folder: Path, uri: str) -> None:
    """Log every run of a folder into another MLflow store, from its files."""
    for run in runs_in(folder):
        _log_again(run, uri)
        print(f"{run.name} logged into {uri}")


def deliver(run: Path) -> str:
    """Bring a run's MLflow store whatever the run folder has and it has not; what it has stays as it is.

    Raises:
        ValueError: this is no run with a store, or a process is working on it.
    """
    from opd_lab.tracking.mlflow import IDENTITY

    if not (run / IDENTITY).is_file():
        raise ValueError(f"{run} is no run folder with an MLflow store (no {IDENTITY})")
    _log_again(run, json.loads((run / IDENTITY).read_text())["uri"])
    return "delivered"


def _log_again(run: Path, uri: str) -> None:
    from opd_lab.run import alone
    from opd_lab.tracking import replay
    from opd_lab.tracking.mlflow import MLflow

    run = run.absolute()
    asked = OmegaConf.select(OmegaConf.load(run / "config.yaml"), "tracking") or {}
    megabytes, picture_every = asked.get("log_model_megabytes", 0), asked.get("picture_every", 1)
    with alone(run):
        replay.sync(run, MLflow(uri, run.parents[1], megabytes, picture_every))


def show_runs(runs: Sequence[Path], folder: Path, baseline: str | None = None) -> Comparison:
    """Print the table of some runs, write their report into `folder`, and say how to look further."""
    from dashboards.report import write_report
    from opd_lab.compare.printed import render
    from opd_lab.compare.table import table

    console = Console()
    if not console.is_terminal:
        console.width = 120
    found = table(runs, baseline)
    render(found, console)
    path = write_report(folder, runs, baseline)
    console.print(f"\nreport   {path}", soft_wrap=True, highlight=False)
    for line in _in_mlflow(runs, folder):
        console.print(line, soft_wrap=True, highlight=False)
    return found


def _in_mlflow(runs: Sequence[Path], folder: Path) -> list[str]:
    """How to see some runs in MLflow: the command where their store is a file, the address where that is known."""
    from opd_lab.tracking.arranged import address
    from opd_lab.tracking.mlflow import IDENTITY

    file = next((run / IDENTITY for run in runs if (run / IDENTITY).is_file()), None)
    known = {} if file is None else json.loads(file.read_text())
    uri, experiment_id = str(known.get("uri", "")), known.get("experiment_id")
    if uri.startswith(("http://", "https://")):
        server = urlsplit(uri)._replace(netloc=urlsplit(uri).netloc.rpartition("@")[2]).geturl()  # without a password
        return [f"mlflow   {address(server, experiment_id) if experiment_id else server}"]
    near = (p / "mlflow.db" for p in folder.parents)
    store = next((p for p in (Path(uri.removeprefix("sqlite:///")), *near) if p.is_file()), None)
    if store is None:
        return []
    ui = Path(sys.executable).with_name("mlflow")
    lines = [f"mlflow   {ui} ui --backend-store-uri sqlite:///{store} --host 127.0.0.1 --port 5000"]
    if experiment_id:
        lines.append(f"         shows them at {address('http://127.0.0.1:5000', experiment_id)}")
    return lines


def settings_in(folder: Path) -> RunSettings:
    """The settings a run was started with."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} is no run folder: it has no config.yaml")
    cfg = OmegaConf.load(path)
    assert isinstance(cfg, DictConfig)
    return config.settings_of(cfg)


def score(folder: Path, which: str, split: str, problems: int, samples: int) -> dict[str, Any]:
    """Evaluate the student a run left: its final one, its best checkpoint, or that of a step."""
    settings = settings_in(folder)
    parts = load_parts(settings, print)
    loaded = named_checkpoint(folder / "checkpoints", which)
    checkpoint.restore_student(loaded, parts.student)
    e, o = settings.evaluate, settings.optim
    found = evaluate(
        parts.student,
        parts.teacher,
        TorchEngine(e.max_tokens, settings.rollout.decode_rows),
        getattr(parts.data, split)[:problems],
        parts.data.grade,
        samples=samples,
        behavior=Behavior(e.temperature, e.top_p, suppressed=tuple(settings.rollout.suppressed)),
        seed=e.seed,
        chunk=o.chunk_tokens,
        micro_batch=o.micro_batch,
    )
    print(f"{folder.name}, {split}, after step {loaded.step}: {len(found.ids)} problems x {samples} rollouts")
    return found.scalars(f"eval/{split}")


def named_checkpoint(folder: Path, which: str) -> checkpoint.Loaded:
    """`final`, `best` (by validation accuracy), or the step of a checkpoint."""
    newest = checkpoint.latest(folder)
    if newest is None:
        raise ValueError(f"{folder} holds no checkpoint")
    step = {"final": newest.step, "best": checkpoint.extra(newest)["best"]["step"]}.get(which, which)
    if not str(step).isdigit():
        raise ValueError(f"--checkpoint must be final, best or a step, got {which}")
    return checkpoint.at_step(folder, int(step))
