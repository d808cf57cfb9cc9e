"""From settings to a finished run: load the parts, check them, train, close the books.

The run folder is a pure function of the config, so the same command goes on where it was stopped, and returns the
stored result where it was finished.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers

from opd_lab import __version__, models, pairing, preparation
from opd_lab.chunk import reads
from opd_lab.config import digest, flat, method_of, run_folder, run_name
from opd_lab.data import prompts
from opd_lab.doctor import WARNING, compatible, first_step
from opd_lab.parts import Parts, facts_of
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.settings import RunSettings
from opd_lab.teacher.local import LocalTeacher
from opd_lab.tracking import read
from opd_lab.tracking.apart import CAN_FORK, Apart
from opd_lab.tracking.delivery import Follower
from opd_lab.tracking.run_folder import RunFolder
from opd_lab.tracking.tracker import FanOut, RunInfo, Tracker
from opd_lab.train import Evaluated, Progress, Pruned, Trainer

Say = Callable[[str], None]
TOGETHER_SECONDS = 5.0  # reports that come within it are written, and delivered, together


@dataclass(frozen=True, slots=True)
class Result:
    """Where a run left its books, and the number a sweep reads."""

    folder: Path
    objective: float


def load_parts(settings: RunSettings, say: Say) -> Parts:
    """Models, data, method; every note about them is said once.

    Raises:
        ValueError: something cannot be loaded or cannot work together.
    """
    transformers.utils.logging.disable_progress_bar()
    on_cpu = models.resolve(settings.model.device).type == "cpu"
    if settings.threads is not None or not on_cpu:  # beside a device, many threads wait for each other over little work
        torch.set_num_threads(settings.threads or 1)
    method = method_of(settings.method, settings.allow)
    pair = settings.model
    student = models.load(pair.student, device=pair.device, name="student")
    teacher = models.load(pair.teacher, device=pair.device, name="teacher")
    student, teacher, notes = pairing.match(student, teacher, pair.stop_ids, pair.stop_event)
    teacher = replace(teacher, floor_nats=pair.teacher_floor_nats)
    data = prompts.load(settings.data, student.tokenizer)
    for note in [*notes, *data.notes]:
        say(note)
    engine = TorchEngine(settings.rollout.max_tokens, settings.rollout.decode_rows, seed=settings.seed)
    parts = Parts(student, LocalTeacher(teacher), engine, data, method)
    if pair.measure is not None:
        measure = models.load(pair.measure, device=pair.device, name="measure")
        _, measure, _ = pairing.match(student, measure, pair.stop_ids, pair.stop_event)
        parts = replace(parts, measure=LocalTeacher(measure.freeze()))
    facts = facts_of(settings, parts)
    method.check(facts)
    parts = replace(parts, method=method.bind(facts))
    needs = parts.method.needs()
    if "reference" in reads(needs.all):
        reference = models.load(pair.reference or pair.student, device=pair.device, name="reference")
        _, reference, _ = pairing.match(student, reference, pair.stop_ids, pair.stop_event)
        parts = replace(parts, reference=reference.freeze())
    compatible(facts, parts)
    return parts


def execute(
    settings: RunSettings,
    method_name: str,
    *,
    config_yaml: str,
    on_step: Callable[[Progress], None] = lambda progress: None,
    on_evaluation: Callable[[Evaluated], None] = lambda evaluated: None,
    say: Say = print,
) -> Result:
    """Train until `settings.steps`, or return what the finished run of this very config left. `on_evaluation` hears of
    every evaluation after a step, in order, those of an earlier process too.

    Raises:
        ValueError: the run cannot work; nothing was spent.
        DivergedError: the loss or gradient stopped being a number; the run is closed as FAILED.
        Pruned: `on_evaluation` did not want it to go on; the run is closed as KILLED, with the tag `pruned_at_step`.
    """
    folder = run_folder(settings, method_name)
    again = settings.checkpoint.resume == "auto"
    if again and (stored := finished(folder, settings.objective)) is not None:
        say(f"{folder.name} is finished already; checkpoint.resume=never would start anew")
        for past in evaluations(folder, settings.steps):
            on_evaluation(past)
        return Result(folder, stored)
    parts = load_parts(settings, say)
    with alone(folder):
        if not again:
            _set_aside(folder)
        tracker = trackers(settings, folder)
        trainer = Trainer(settings, parts, tracker, folder, on_step=on_step, on_evaluation=on_evaluation, say=say)
        if again:
            trainer.resume()
        if parts.method.status == "experimental":
            say(f"{method_name} is experimental: its card names what is unknown")
        if trainer.step == 0:
            trainer.begin_with(preparation.prepare(settings, parts, say))
            for line in first_step(settings, parts, trainer.state):
                if line.startswith(WARNING):
                    say(line)
        tracker.start(
            identity(settings, parts, method_name, folder, config_yaml, step=trainer.step + 1 if trainer.step else 0)
        )
        try:
            for past in evaluations(folder, trainer.step):
                on_evaluation(past)
            trainer.run()
        except BaseException as error:
            if isinstance(error, Pruned):
                tracker.tag("pruned_at_step", str(trainer.step))
            stopped = isinstance(error, (KeyboardInterrupt, SystemExit, Pruned))
            tracker.finish("KILLED" if stopped else "FAILED")
            raise
        models.save(parts.student, folder / "student")
        tracker.finish("FINISHED")
    return Result(folder, metric(folder, settings.objective))


def examine(settings: RunSettings, method_name: str, config_yaml: str, say: Say) -> None:
    """Everything that a run checks before it spends its budget, and a checkpoint and a store written and read back.

    Raises:
        ValueError: the first thing that does not work.
    """
    say(f"opd_lab {__version__}, torch {torch.__version__}, device {models.resolve(settings.model.device)}")
    parts = load_parts(settings, say)
    say(
        f"{settings.model.student.path} <- {settings.model.teacher.path}: one tokenizer, "
        f"{parts.student.vocabulary} ids, stop ids {sorted(parts.student.stop_ids)}"
    )
    prepared = preparation.prepare(settings, parts, say)
    for line in first_step(settings, parts, prepared.state):
        say(line)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(settings, parts, FanOut([]), Path(scratch), say=say)
        saved = trainer.save()
        trainer.resume()
        say(f"checkpoint: {sum(f.stat().st_size for f in saved.iterdir()) / 1e6:.1f} MB written and read back")
        if settings.tracking.mlflow:
            from opd_lab.tracking.mlflow import open_store

            t = settings.tracking
            say(f"store: {open_store(t.uri, Path(t.folder).absolute(), t.experiment).uri} can be written")
        memory = settings.rollout.prompts * settings.rollout.per_prompt * settings.rollout.max_tokens
        width = parts.teacher.shape[1] if parts.teacher.shape else 0
        say(f"one step: at most {memory:,} response tokens; teacher states {memory * width * 4 / 1e6:.1f} MB")
    say("everything works")


def trackers(settings: RunSettings, folder: Path) -> Tracker:
    """The run folder, and MLflow where it is asked for."""
    t = settings.tracking
    files = RunFolder(together_seconds=TOGETHER_SECONDS)
    if not t.mlflow:
        return FanOut([files])
    from opd_lab.tracking.mlflow import MLflow

    store = MLflow(t.uri, Path(t.folder).absolute(), t.log_model_megabytes, t.picture_every)
    return FanOut([files, store], together_seconds=TOGETHER_SECONDS, follower=Apart if CAN_FORK else Follower)


def identity(
    settings: RunSettings, parts: Parts, method_name: str, folder: Path, config_yaml: str, *, step: int
) -> RunInfo:
    """Who this run is: its params, the conventions of its loss as tags, its models and data by digest."""
    params = flat({k: v for k, v in dataclasses.asdict(settings).items() if k not in ("tracking", "allow")})
    b = settings.rollout
    conventions = {"loss_temperature": "1"} | parts.method.conventions()
    if "topk_k" in conventions:  # a k beyond the vocabulary is all of it
        conventions["topk_k"] = str(min(int(conventions["topk_k"]), parts.student.vocabulary))
    tags = conventions | {
        "conventions": " ".join(conventions),
        "method": method_name,
        "method_status": parts.method.status,
        "paper": parts.method.paper,
        "seed": str(settings.seed),
        "sampling_temperature": f"{b.temperature:g}",
        "sampling_top_p": f"{b.top_p:g}",
        "pass_at_k_estimator": "unbiased",  # of the two that papers print (`evaluate.py`)
        "config_digest": digest(settings),
        "data": parts.data.name,
        "data_digest": parts.data.digest,
        "student": parts.student.path,
        "student_digest": parts.student.digest(),
        "teacher": settings.model.teacher.path,
        "teacher_digest": parts.teacher.digest(),
        "vocabulary": str(parts.student.vocabulary),
        "rollouts": "+".join(["student", *sorted(parts.method.asks())]),
    }
    for name, lm in (("student", parts.student), ("teacher", parts.teacher.lm)):
        if lm is not None:  # what is estimated from it: FLOPs
            tags[f"{name}_parameters"] = str(sum(p.numel() for p in lm.module.parameters()))
    return RunInfo(
        name=run_name(settings, method_name),
        experiment=settings.tracking.experiment,
        params=params,
        tags=tags,
        config_yaml=config_yaml,
        folder=folder,
        dataset={
            "name": parts.data.name,
            "source": settings.data.path or settings.data.kind,
            **{split: parts.data.digest_of(split) for split in ("train", "validation", "test")},
        },
        step=step,
    )


def finished(folder: Path, objective: str) -> float | None:
    """The objective of a finished run, None if it is not finished."""
    status = folder / "status.json"
    if not status.is_file() or json.loads(status.read_text()).get("status") != "FINISHED":
        return None
    return metric(folder, objective)


def evaluations(folder: Path, last: int) -> Iterator[Evaluated]:
    """What a run found in its evaluations after its steps 1 to `last`, from its files."""
    if last == 0:
        return
    metrics, counts = read.metrics(folder), read.table(folder, "evaluations")
    seconds = metrics[metrics["name"] == "time/step_seconds"]
    examined = metrics.loc[metrics["name"].str.startswith("eval/validation/"), "step"].unique()
    for step in sorted(int(step) for step in examined if 1 <= step <= last):
        here = metrics[metrics["step"] == step]
        rows = counts[(counts["step"] == step) & (counts["set"] == "validation")] if len(counts) else counts
        yield Evaluated(
            step=step,
            scalars=dict(zip(here["name"], here["value"])),
            problems=dict(zip(rows["problem"], rows["correct"] / rows["n"])) if len(rows) else {},
            seconds=float(seconds.loc[seconds["step"] <= step, "value"].sum()),
        )


def metric(folder: Path, name: str) -> float:
    """The last value of a metric.

    Raises:
        ValueError: the run never logged it; names those it did log under the same area.
    """
    metrics = read.metrics(folder)
    values = metrics.loc[metrics["name"] == name, "value"]
    if values.empty:
        area = name.split("/")[0]
        have = sorted(n for n in metrics["name"].unique() if n.startswith(area + "/"))
        raise ValueError(f"objective={name} was not logged by {folder.name}; it logged {', '.join(have) or 'nothing'}")
    value = float(values.iloc[-1])
    return value if math.isfinite(value) else math.nan


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the run folder; a second process that wants it is refused at once."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{folder} is in use by another process; wait for it, or give this run another tracking.name"
            ) from None
        yield


def _set_aside(folder: Path) -> None:
    """Keep an earlier run of the same config under the next free `-old<n>` name."""
    if any(folder.iterdir()):
        taken = [
            int(m[1])
            for p in folder.parent.iterdir()
            if (m := re.fullmatch(rf"{re.escape(folder.name)}-old(\d+)", p.name))
        ]
        folder.rename(folder.with_name(f"{folder.name}-old{max(taken, default=0) + 1}"))
        folder.mkdir()
