"""Prompts: read, rendered once, split once, handed out in an order that survives a restart.

A prompt is rendered by the student's tokenizer with its chat template, and both models get these very ids. Splits
depend on the prompts alone, not on the run's seed and not on the tokenizer, so that every run of a comparison is tested
on the same questions; records that repeat a prompt are left out, so none can be trained on and tested on.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator

from opd_lab.data import arithmetic
from opd_lab.data.grading import Grader, grader
from opd_lab.data.records import answer_of, messages_of, read, solution_of
from opd_lab.settings import DataSettings

LAB_SEED = 0  # of the embedded lab's problems: the same for every run
Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt; `ids` is what both models see, generation prompt included."""

    id: str
    messages: Messages
    answer: str | None
    ids: list[int]


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits. `digest` covers ids, prompts, answers and solutions; `notes`: what was left out, why."""

    name: str
    digest: str
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    grade: Grader | None
    notes: list[str]
    # Prompt and response -> place of the first wrong word, None without one; None where steps cannot be graded.
    first_slip: Callable[[str, str], int | None] | None = None
    solution: Callable[[Example], str] | None = None  # worked, of a training problem; None where the data have none

    def digest_of(self, split: str) -> str:
        """Of one split, as the student reads it."""
        content = [(e.id, e.ids, e.answer) for e in getattr(self, split)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Record(NamedTuple):
    """A prompt that is not rendered yet."""

    messages: Messages
    answer: str | None
    solution: str | None = None  # of the embedded lab: made when it is asked for

    @property
    def id(self) -> str:
        """A digest of the prompt without its spacing: equal for records that ask the same."""
        text = json.dumps([(m["role"], " ".join(m["content"].split())) for m in self.messages])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def content(self) -> tuple[Any, ...]:
        return (self.id, self.messages, self.answer, *([] if self.solution is None else [self.solution]))


def load(settings: DataSettings, tokenizer: Any) -> Dataset:
    """Read, split and render; `tokenizer` is the student's."""
    grade = grader(settings)
    notes: list[str] = []
    if settings.kind == "arithmetic":
        splits = _arithmetic(settings)
    elif settings.kind == "file":
        splits = _file(settings, notes)
    else:
        raise ValueError(f"data.kind must be arithmetic (the embedded lab) or file, got {settings.kind!r}")
    if not tokenizer.chat_template:
        notes.append("the student's tokenizer has no chat template: prompts are plain text")
    rendered = {split: _render(split, records, settings, tokenizer, notes) for split, records in splits.items()}
    content = [[split, [record.content for record in records]] for split, records in splits.items()]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    slip = arithmetic.first_slip if settings.kind == "arithmetic" else None
    solution = _worked if settings.kind == "arithmetic" else _found(splits["train"])
    return Dataset(
        name=settings.name, digest=digest, grade=grade, notes=notes, first_slip=slip, solution=solution, **rendered
    )


class PromptStream:
    """Endless examples, reshuffled every epoch. The order is a function of seed and epoch: two numbers resume it."""

    def __init__(self, examples: list[Example], seed: int) -> None:
        assert examples, "a stream needs at least one prompt"
        self.examples, self.seed = examples, seed
        self._enter(epoch=0, position=0)

    def take(self, n: int) -> list[Example]:
        """The next n; they may reach into the next epoch."""
        taken = []
        for _ in range(n):
            if self.position == len(self.examples):
                self._enter(self.epoch + 1, 0)
            taken.append(self.examples[self.order[self.position]])
            self.position += 1
        return taken

    def state_dict(self) -> dict[str, int | str]:
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        before = {key: state[key] for key in self._identity()}
        if before != self._identity():
            raise ValueError(
                f"the checkpoint's prompts ({before}) are not those of this run ({self._identity()}); "
                "resume with the data and the seed of the first run, or start anew with checkpoint.resume=never"
            )
        self._enter(state["epoch"], state["position"])

    def _identity(self) -> dict[str, int | str]:
        ids = " ".join(example.id for example in self.examples)
        return {
            "seed": self.seed,
            "prompts": len(self.examples),
            "digest": hashlib.sha256(ids.encode()).hexdigest()[:16],
        }

    def _enter(self, epoch: int, position: int) -> None:
        own = int.from_bytes(hashlib.sha256(f"prompts {self.seed} {epoch}".encode()).digest()[:7], "big")
        self.order = torch.randperm(len(self.examples), generator=Generator().manual_seed(own)).tolist()
        self.epoch, self.position = epoch, position


def _arithmetic(settings: DataSettings) -> dict[str, list[Record]]:
    counts = {"train": settings.problems, "validation": settings.held_out, "test": settings.held_out}
    operations = tuple(settings.operations)
    return {
        split: [
            Record(messages_of(problem.prompt, settings, problem.id), problem.answer)
            for problem in arithmetic.problems(split, operations, count, LAB_SEED)
        ]
        for split, count in counts.items()
    }


def _worked(example: Example) -> str:
    return arithmetic.worked(example.messages[-1]["content"])


def _found(records: list[Record]) -> Callable[[Example], str] | None:
    """Looks up the solution that a record came with; None where none did."""
    solutions = {record.id: record.solution for record in records if record.solution is not None}
    return (lambda example: solutions[example.id]) if solutions else None


def _file(settings: DataSettings, notes: list[str]) -> dict[str, list[Record]]:
    if settings.path is None:
        raise ValueError(
            "data.path must name a .jsonl, .json or .parquet file, got null; data.kind=arithmetic needs none"
        )
    known = _unique(settings.path, settings, notes)
    if settings.test_path is None:
        test, apart = [], 2 * settings.held_out
    else:
        unsolved = replace(settings, solution_field=None)  # nobody is trained on them
        test, apart = list(_unique(settings.test_path, unsolved, notes).values()), settings.held_out
        shared = [known.pop(record.id) for record in test if record.id in known]
        if shared:
            notes.append(f"{len(shared)} prompts of data.path also stand in data.test_path: they are only tested on")
    if apart >= len(known):
        raise ValueError(
            f"data.held_out={settings.held_out} keeps {apart} prompts apart, but {settings.path} has {len(known)} "
            "different ones; lower data.held_out"
        )
    ordered = [known[digest] for digest in sorted(known)]
    train, rest = ordered[: len(ordered) - apart], ordered[len(ordered) - apart :]
    return {"train": train, "validation": rest[: settings.held_out], "test": test or rest[settings.held_out :]}


def _unique(path: str, settings: DataSettings, notes: list[str]) -> dict[str, Record]:
    found: dict[str, Record] = {}
    contradicting = 0
    raw = read(Path(path))
    for number, fields in enumerate(raw):
        where = f"record {number} of {path}"
        answer, solution = answer_of(fields, settings, where), solution_of(fields, settings, where)
        record = Record(messages_of(fields, settings, where), answer, solution)
        first = found.setdefault(record.id, record)
        contradicting += first.answer != record.answer
    if repeated := len(raw) - len(found):
        notes.append(
            f"{repeated} of {len(raw)} records of {path} repeat a prompt and were left out"
            + (f" ({contradicting} of them with another answer)" if contradicting else "")
        )
    return found


def _render(
    split: str, records: list[Record], settings: DataSettings, tokenizer: Any, notes: list[str]
) -> list[Example]:
    examples = [
        Example(record.id, record.messages, record.answer, ids)
        for record, ids in zip(records, _encode([record.messages for record in records], tokenizer), strict=True)
    ]
    short = [example for example in examples if len(example.ids) <= settings.max_prompt_tokens]
    if records and not short:
        shortest = min(len(example.ids) for example in examples)
        raise ValueError(
            f"no {split} prompt has at most data.max_prompt_tokens={settings.max_prompt_tokens} tokens; "
            f"the shortest has {shortest}; raise data.max_prompt_tokens"
        )
    if left_out := len(examples) - len(short):
        notes.append(
            f"{left_out} of {len(examples)} {split} prompts are longer than "
            f"max_prompt_tokens={settings.max_prompt_tokens} and were left out"
        )
    return short


def _encode(prompts: list[Messages], tokenizer: Any) -> Iterable[list[int]]:
    if not prompts:
        return []
    template = bool(tokenizer.chat_template)
    if template:
        texts = [tokenizer.apply_chat_template(list(p), add_generation_prompt=True, tokenize=False) for p in prompts]
    else:
        texts = ["\n\n".join(message["content"] for message in prompt) for prompt in prompts]
    return tokenizer(texts, add_special_tokens=not template, return_attention_mask=False)["input_ids"]
