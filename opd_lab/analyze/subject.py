"""A finished run as its analyses see it: its student at any checkpoint, its teacher, its data, its settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from opd_lab import checkpoint
from opd_lab.chunk import States, measure
from opd_lab.data.prompts import Example
from opd_lab.models import LM, evaluating
from opd_lab.parts import Parts
from opd_lab.results import named_checkpoint, settings_in
from opd_lab.rollout.reader import left_padded
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.run import load_parts
from opd_lab.settings import RunSettings
from opd_lab.types import Behavior, Rollouts, Signal, Source, scatter

GREEDY = Behavior(top_k=1)


@dataclass
class Subject:
    folder: Path
    settings: RunSettings
    parts: Parts
    initial: dict[str, Tensor]  # the student's weights before the first step

    @property
    def student(self) -> LM:
        return self.parts.student

    @torch.no_grad()
    def at(self, which: str) -> int:
        """Put the student of a checkpoint in place (a step, `final`, `best`; 0 is the initial student); its step."""
        if which == "0":
            for name, value in checkpoint.weights(self.student).items():
                value.copy_(self.initial[name])
            return 0
        loaded = named_checkpoint(self.folder / "checkpoints", which)
        checkpoint.restore_student(loaded, self.student)
        return loaded.step

    def held_out(self, split: str, problems: int) -> list[Example]:
        """The first problems of the validation or the test split, at most as many as there are."""
        return getattr(self.parts.data, split)[:problems]

    def sample(
        self,
        examples: Sequence[Example],
        samples: int,
        behavior: Behavior,
        *,
        seed: int,
        max_tokens: int | None = None,
        writer: LM | None = None,
    ) -> Rollouts:
        """Graded rollouts, `samples` per example in a row; `group_B` is the place of the example. What each draws
        depends on the seed and its place alone. The teacher helps where the behavior asks for it."""
        group_B = torch.arange(len(examples)).repeat_interleave(samples)
        engine = TorchEngine(max_tokens or self.settings.evaluate.max_tokens, self.settings.rollout.decode_rows)
        rollouts = engine.sample(
            writer or self.student,
            [list(examples[i].ids) for i in group_B.tolist()],
            behavior=behavior,
            group_B=group_B,
            uid_B=torch.arange(len(group_B)),
            generator=torch.Generator().manual_seed(seed),
            teacher=self.parts.teacher.lm if behavior.asks else None,
        )
        return self.graded(rollouts, examples)

    def graded(self, rollouts: Rollouts, examples: Sequence[Example]) -> Rollouts:
        """With the reward of each: 1 correct, 0 wrong, NaN where nothing can be graded."""
        grade, groups = self.parts.data.grade, rollouts.group_B.tolist()
        answers = [examples[g].answer for g in groups]
        texts = self.student.texts(rollouts)
        reward = [
            float(grade(text, answer) == 1.0) if grade and answer is not None else float("nan")
            for text, answer in zip(texts, answers, strict=True)
        ]
        return replace(rollouts, reward_B=torch.tensor(reward, device=rollouts.reward_B.device))

    @torch.no_grad()
    def views(self, rollouts: Rollouts) -> Iterator[tuple[Tensor, Rollouts, States, States]]:
        """A micro-batch of similar length at a time: its rows, its rollouts, and what student and teacher know of the
        generated tokens.

        Raises:
            ValueError: the teacher gives no full distribution.
        """
        if "full" not in self.parts.teacher.provides:
            raise ValueError(f"this analysis needs a teacher with full distributions, got {self.parts.teacher.name}")
        with evaluating(self.student.module):
            for row_R in rollouts.length_B.argsort(stable=True).split(self.settings.optim.micro_batch):
                part = rollouts.rows(row_R)
                teacher = self.parts.teacher.view(part, frozenset())
                assert isinstance(teacher, States)
                yield row_R, part, self.student.states(part), teacher

    def measured(self, rollouts: Rollouts, wanted: frozenset[Signal]) -> dict[Signal, Tensor]:
        """Signals of the generated tokens, shape BT, NaN elsewhere."""
        nothing_BT = torch.full(rollouts.source_BT.shape, torch.nan, dtype=torch.float64)
        out = {signal: nothing_BT.clone() for signal in wanted}
        for row_R, part, student, teacher in self.views(rollouts):
            ids_N = part.response_BT[part.mask_BT]
            seen = measure(wanted, ids_N, student, teacher, chunk=self.settings.optim.chunk_tokens)
            for signal, value_N in seen.items():
                out[signal][row_R.cpu()] = scatter(value_N.double(), part.mask_BT).cpu()
        return out

    def decode(self, ids: list[int]) -> str:
        return str(self.student.tokenizer.decode(ids))


def open_run(folder: Path) -> Subject:
    """Load what a run was made of.

    Raises:
        ValueError: this is no run folder.
    """
    settings = settings_in(folder)
    parts = load_parts(settings, lambda note: None)
    initial = {name: value.detach().clone() for name, value in checkpoint.weights(parts.student).items()}
    return Subject(folder, settings, parts, initial)


def as_rollouts(student: LM, prompts: list[list[int]], responses: list[list[int]], group: list[int]) -> Rollouts:
    """Stored texts as rollouts of the student, every response token generated; nothing is known of how."""
    pad, device = student.pad_id, student.device
    prompt_BP, attention_BP = left_padded(prompts, pad, device)
    width = max(map(len, responses))
    response_BT = torch.tensor([ids + [pad] * (width - len(ids)) for ids in responses], device=device)
    there_BT = torch.arange(width, device=device) < torch.tensor([[len(ids)] for ids in responses], device=device)
    nan_BT = torch.full(response_BT.shape, torch.nan, device=device)
    return Rollouts(
        ids_BL=torch.cat([prompt_BP, response_BT], 1),
        attention_BL=torch.cat([attention_BP, there_BT], 1),
        source_BT=torch.where(there_BT, int(Source.STUDENT), int(Source.PADDING)).to(torch.int8),
        behavior_logp_BT=nan_BT,
        logp_BT=nan_BT,
        entropy_BT=nan_BT,
        stopped_B=torch.tensor([ids[-1] in student.stop_ids for ids in responses], device=device),
        uid_B=torch.arange(len(prompts), device=device),
        group_B=torch.tensor(group, device=device),
        reward_B=torch.full((len(prompts),), torch.nan, device=device),
    )
