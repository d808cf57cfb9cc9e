"""What a method fits once before the first step: asked of the frozen models, kept on disk, shared between runs.

An entry `<tracking folder>/prepared/<key>` holds `state.safetensors` and `state.json`, which says the digest of the
former. The key is a digest of everything that decides the result. Whoever makes an entry reads it back like everyone
else, so that a hit and a miss give the same bits; runs that want an entry while it is made wait for it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load, save
from torch import Tensor

from opd_lab.checkpoint import pack, unpack
from opd_lab.chunk import States, layers_of
from opd_lab.data.prompts import PromptStream
from opd_lab.methods.base import Frozen, Method, Prepared
from opd_lab.models import evaluating
from opd_lab.parts import Parts, tokenizer_digest
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.settings import RunSettings
from opd_lab.types import Behavior, Rollouts, Signal, State

VERSION = 1
TENSORS, TREE = "state.safetensors", "state.json"


@dataclass(frozen=True, slots=True)
class FrozenPair:
    """Student and teacher of a run as they are before its first step."""

    settings: RunSettings
    parts: Parts

    def rollouts(self, prompts: int, max_tokens: int) -> Rollouts:
        seed = self.settings.seed
        examples = PromptStream(self.parts.data.train, seed).take(prompts)
        engine = TorchEngine(max_tokens, self.settings.rollout.decode_rows)
        every = torch.arange(len(examples))
        generator = torch.Generator().manual_seed(seed)
        return engine.sample(
            self.parts.student,
            [e.ids for e in examples],
            behavior=Behavior(),
            group_B=every,
            uid_B=every,
            generator=generator,
        )

    @torch.no_grad()
    def states(self, rollouts: Rollouts, signals: frozenset[Signal]) -> dict[Signal, Tensor]:
        found = {}
        for owner, view in {"student": self._student, "teacher": self.parts.teacher.view}.items():
            if asked := frozenset(signal for signal in signals if dict(signal.args)["owner"] == owner):
                seen = view(rollouts, asked)
                assert isinstance(seen, States), "a teacher without hidden states is refused before"
                found |= {s: seen.layers[key] for s in asked for key in layers_of(owner, frozenset({s}))}
        return found

    def _student(self, rollouts: Rollouts, signals: frozenset[Signal]) -> States:
        with evaluating(self.parts.student.module):
            return self.parts.models.student(rollouts, signals)


def prepare(settings: RunSettings, parts: Parts, say: Callable[[str], None]) -> Prepared:
    """What the method fits before step 0, from the cache if it is there."""
    method, state = parts.method, parts.method.init_state()
    if method.preparation() is None:
        return Prepared(state, {})
    folder = Path(settings.tracking.folder).absolute() / "prepared" / key(settings, parts)
    return cached(folder, method, FrozenPair(settings, parts), state, parts.student.device, say)


def key(settings: RunSettings, parts: Parts) -> str:
    """A digest of everything that decides the result: neither learning rate nor step budget nor the run's name."""
    kind = type(parts.method)
    facts = {
        "version": VERSION,
        "method": f"{kind.__module__}.{kind.__name__}",
        "fields": parts.method.preparation(),
        "student": parts.student.digest(),
        "teacher": parts.teacher.digest(),
        "tokenizer": tokenizer_digest(parts.student),
        "stop_ids": [sorted(parts.student.stop_ids), *parts.student.one_end],
        "data": [parts.data.digest, hashlib.sha256(repr([e.ids for e in parts.data.train]).encode()).hexdigest()],
        "seed": settings.seed,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def cached(
    folder: Path, method: Method, ask: Frozen, state: State, device: torch.device, say: Callable[[str], None]
) -> Prepared:
    """The entry at `folder`, made if it is not there or damaged."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if folder.is_dir():
            try:
                return _read(folder, device)
            except (OSError, ValueError, KeyError) as error:
                say(f"warning: {folder} is damaged ({error}); it is made anew")
                shutil.rmtree(folder)
        say(f"preparing {type(method).__name__}, once for all runs with these models and settings")
        _write(folder, method.prepare(ask, state))
        return _read(folder, device)


def _write(folder: Path, prepared: Prepared) -> None:
    tensors: dict[str, Tensor] = {}
    tree: dict[str, Any] = {"state": pack(prepared.state, "state", tensors), "metrics": prepared.metrics}
    content = save(tensors)
    tree["sha256"] = hashlib.sha256(content).hexdigest()
    writing = folder.with_suffix(".writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir()
    (writing / TENSORS).write_bytes(content)
    (writing / TREE).write_text(json.dumps(tree, indent=1))
    writing.rename(folder)


def _read(folder: Path, device: torch.device) -> Prepared:
    content, tree = (folder / TENSORS).read_bytes(), json.loads((folder / TREE).read_text())
    if hashlib.sha256(content).hexdigest() != tree["sha256"]:
        raise ValueError(f"{TENSORS} changed since it was written")
    return Prepared(unpack(tree["state"], load(content), device), tree["metrics"])
