"""Everything a run needs to go on as if it had never stopped, bit for bit: all of it on disk, or nothing.

A checkpoint is a folder `step_000040`. It is written under another name, flushed to the disk and renamed at the very
end, so a kill at any moment leaves the previous one untouched. Its `manifest.json` holds a digest of every file; a
damaged checkpoint is skipped, with a note, in favour of the one before.

    student.safetensors   parameters that are trained, persistent buffers
    state.safetensors     every other tensor: moments of the optimizer, memory of the method, states of the generators
    state.json            the tree in which these tensors hang, with its numbers and strings

No pickle: loading a checkpoint runs no code. The global random state of torch is not saved, for nothing may rely on it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

VERSION = 1
STUDENT, TENSORS, TREE, MANIFEST = "student.safetensors", "state.safetensors", "state.json", "manifest.json"
WRITING, DISCARDED = ".writing_", ".discarded_"  # names of folders that are not, or no longer, checkpoints


class Student(Protocol):
    """What is saved of a language model."""

    @property
    def module(self) -> nn.Module: ...


@dataclass(frozen=True)
class Loaded:
    """An intact checkpoint. `notes` says which newer ones were damaged."""

    path: Path
    step: int
    notes: list[str]


@dataclass(frozen=True)
class Restored:
    """What the caller puts back itself; student, optimizer and generators are restored in place."""

    step: int
    method_state: dict[str, Any]
    stream: dict[str, Any]
    extra: dict[str, Any]


def save(
    folder: Path,
    step: int,
    *,
    student: Student,
    optimizer: torch.optim.Optimizer,
    method_state: Mapping[str, Any],
    generators: Mapping[str, Generator],
    stream: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> Path:
    """Write `folder/step_<step>`. It replaces that step and later ones, left over from before a resume."""
    tensors: dict[str, Tensor] = {}
    tree = {
        "optimizer": pack(optimizer.state_dict(), "optimizer", tensors),
        "method_state": pack(method_state, "method_state", tensors),
        "generators": pack({name: g.get_state() for name, g in generators.items()}, "generators", tensors),
        "stream": pack(stream, "stream", tensors),
        "extra": pack(extra, "extra", tensors),
    }
    final = folder / f"step_{step:06d}"
    writing = folder / (WRITING + final.name)
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    save_file({name: _on_cpu(value) for name, value in weights(student).items()}, writing / STUDENT)
    save_file(tensors, writing / TENSORS)
    (writing / TREE).write_text(json.dumps(tree))
    digests = {name: _digest(writing / name) for name in (STUDENT, TENSORS, TREE)}
    (writing / MANIFEST).write_text(json.dumps({"version": VERSION, "step": step, "sha256": digests}, indent=1))
    for path in (*writing.iterdir(), writing):
        _flush(path)
    stale = [_set_aside(path) for path in _checkpoints(folder) if _step(path) >= step]
    writing.rename(final)
    _flush(folder)
    for path in stale:
        shutil.rmtree(path)
    return final


def latest(folder: Path) -> Loaded | None:
    """The newest intact checkpoint; None where there is none at all."""
    notes: list[str] = []
    for path in reversed(_checkpoints(folder)):
        damage = _damage(path)
        if damage is None:
            return Loaded(path, _step(path), notes)
        notes.append(f"checkpoint {path} is damaged ({damage}) and was skipped; an earlier one is used")
    if notes:
        raise ValueError(
            f"every checkpoint in {folder} is damaged: {'; '.join(notes)}. "
            "Delete them, or set checkpoint.resume=never to start from step 0"
        )
    return None


def at_step(folder: Path, step: int) -> Loaded:
    """The intact checkpoint of one step.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    steps = [_step(path) for path in _checkpoints(folder)]
    if step not in steps:
        raise ValueError(f"{folder} has checkpoints of the steps {steps}, not of {step}")
    path = folder / f"step_{step:06d}"
    if damage := _damage(path):
        raise ValueError(f"checkpoint {path} is damaged ({damage}); take another of the steps {steps}")
    return Loaded(path, step, [])


def extra(loaded: Loaded) -> dict[str, Any]:
    """What the caller had saved beside models and memory, without restoring anything."""
    tree = json.loads((loaded.path / TREE).read_text())["extra"]
    return unpack(tree, load_file(loaded.path / TENSORS), torch.device("cpu"))


def restore(
    loaded: Loaded, *, student: Student, optimizer: torch.optim.Optimizer, generators: Mapping[str, Generator]
) -> Restored:
    """Put student, optimizer and generators back in place, and hand over the rest."""
    restore_student(loaded, student)
    device = next(student.module.parameters()).device
    tree = unpack(json.loads((loaded.path / TREE).read_text()), load_file(loaded.path / TENSORS), device)
    if tree["generators"].keys() != generators.keys():
        raise ValueError(
            f"checkpoint {loaded.path} holds the generators {sorted(tree['generators'])}, this run has "
            f"{sorted(generators)}; resume with the version that wrote it, or set checkpoint.resume=never"
        )
    optimizer.load_state_dict(tree["optimizer"])
    for name, generator in generators.items():
        generator.set_state(tree["generators"][name])
    return Restored(loaded.step, tree["method_state"], tree["stream"], tree["extra"])


@torch.no_grad()
def restore_student(loaded: Loaded, student: Student) -> None:
    """Put the student's weights back in place."""
    saved, own = load_file(loaded.path / STUDENT), weights(student)
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in own.items()}
    if shapes != {name: (tuple(value.shape), value.dtype) for name, value in saved.items()}:
        different = sorted(saved.keys() ^ own.keys()) or [n for n in saved if saved[n].shape != own[n].shape]
        raise ValueError(
            f"checkpoint {loaded.path} is of another student: it differs in {different[:3] or 'dtype'}; "
            "resume with the model config of the first run, or set checkpoint.resume=never"
        )
    for name, value in own.items():
        value.copy_(saved[name])


@contextmanager
def lent(loaded: Loaded, student: Student) -> Iterator[None]:
    """The student with the weights of a checkpoint; its own wait on the CPU and come back afterwards, bit for bit."""
    own = {name: _on_cpu(value) for name, value in weights(student).items()}
    restore_student(loaded, student)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in weights(student).items():
                value.copy_(own[name])


def prune(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all but the newest `keep_last` checkpoints and the best one, and what a kill left behind."""
    if keep_last < 1:
        raise ValueError(f"checkpoint.keep_last must be >= 1, got {keep_last}")
    for path in _checkpoints(folder)[:-keep_last]:
        if _step(path) != best_step:
            _set_aside(path)
    for prefix in (WRITING, DISCARDED):
        for path in folder.glob(f"{prefix}step_*"):
            shutil.rmtree(path)


def weights(student: Student) -> dict[str, Tensor]:
    """What training changes; a tied parameter comes once."""
    module = student.module
    persistent = module.state_dict().keys()
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    return trained | {name: value for name, value in module.named_buffers() if name in persistent}


def _on_cpu(value: Tensor) -> Tensor:
    """A copy, for safetensors refuses tensors that share memory."""
    return value.detach().to("cpu", copy=True).contiguous()


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON with the tensors taken out. A dict or tuple that JSON would change is written as a list with a tag."""
    if isinstance(value, Tensor):
        key = f"{len(tensors)}:{name}"
        tensors[key] = _on_cpu(value)
        return {"$tensor": key, "$cpu": value.device.type == "cpu"}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [pack(item, f"{name}[{index}]", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        packed = [(pack(k, name, tensors), pack(v, f"{name}.{k}", tensors)) for k, v in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(packed)
        return {"$items": packed}
    raise ValueError(
        f"{name} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold; allowed: "
        "tensors, numbers, strings, None, and lists, tuples and dicts of them"
    )


def unpack(value: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """Undoes `pack`; a tensor that was not on the CPU goes to the student's device."""
    if isinstance(value, list):
        return [unpack(item, tensors, device) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]] if value["$cpu"] else tensors[value["$tensor"]].to(device)
    if "$tuple" in value:
        return tuple(unpack(value["$tuple"], tensors, device))
    if "$items" in value:
        return {unpack(k, tensors, device): unpack(v, tensors, device) for k, v in value["$items"]}
    return {key: unpack(item, tensors, device) for key, item in value.items()}


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted((path for path in folder.glob("step_*") if path.name[5:].isdigit()), key=_step)


def _step(path: Path) -> int:
    return int(path.name[5:])


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["version"] != VERSION:
            return f"its format is version {manifest['version']}, this program reads {VERSION}"
        wrong = [name for name, digest in manifest["sha256"].items() if _digest(path / name) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(wrong)} changed since it was written" if wrong else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have the disk write a file or a folder now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_aside(path: Path) -> Path:
    """Rename before deleting, so that a kill leaves no half a checkpoint under a checkpoint's name."""
    moved = path.with_name(DISCARDED + path.name)
    shutil.rmtree(moved, ignore_errors=True)
    return path.rename(moved)
