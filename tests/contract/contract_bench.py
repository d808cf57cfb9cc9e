"""A batch that any method can be tried on: a real student and a real teacher in
miniature (linear bodies over random features), so that every signal exists, with gradient where it should."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from opd_lab.chunk import Head, States, layers_of
from opd_lab.config import CONF, method_of
from opd_lab.lab_models import lab_tokenizer
from opd_lab.methods.base import Continued, Method
from opd_lab.methods.coins import uniform
from opd_lab.parts import tokenizer_digest
from opd_lab.step import Gradient, Models, accumulate_gradient, whole_batch
from opd_lab.types import Behavior, Facts, Rollouts, Signal, Source, State

YAMLS = sorted((CONF / "method").glob("*.yaml"))
V, H = 13, 8
DEPTH = 2
LENGTHS = (5, 3, 4, 5, 2, 1, 4, 0)
REWARDS = (1.0, 0, 1, 0, 0, 1, 0, 0)
SAMPLED = ("behavior_logp_BT", "logp_BT", "entropy_BT")  # what is known of sampled tokens alone
GROUPS = (0, 0, 0, 1, 1, 1, 1, 1)


@dataclass
class Bench:
    """A method on a small step, in float64. `run` gives the gradient the trainer would use."""

    method: Method
    rollouts: Rollouts
    weight_VH: Tensor  # the student's only parameter
    features: Callable[[Rollouts], Tensor]  # NH, what the student's body would give
    teacher: Teacher
    reference_VH: Tensor  # the frozen initial student's
    prepared: State = field(default_factory=dict)  # what the method fitted to these models

    def student(self, rollouts: Rollouts, signals: frozenset[Signal] = frozenset()) -> States:
        return states(self.features(rollouts), self.weight_VH, layers_of("student", signals))

    def reference(self, rollouts: Rollouts, signals: frozenset[Signal]) -> States:
        return States(self.features(rollouts), Head(self.reference_VH))

    def batch(self, micro_batch: int = 100) -> tuple[Any, list[Any]]:
        return whole_batch(
            self.method, self.rollouts, Models(self.student, self.teacher, self.reference, Language()),
            state=self.method.init_state() | self.prepared, step=3, seed=0, micro_batch=micro_batch, chunk=4,
        )  # fmt: skip

    def run(self, micro_batch: int = 100, chunk: int = 4) -> tuple[Gradient, Tensor]:
        self.weight_VH.grad = None
        batch, views = self.batch(micro_batch)
        weights = self.method.weights(batch)
        found = accumulate_gradient(
            self.method, batch, weights, self.student, views, micro_batch=micro_batch, chunk=chunk
        )
        grad_VH = self.weight_VH.grad
        return found, torch.zeros_like(self.weight_VH) if grad_VH is None else grad_VH.clone()

    def but(self, **changes: Any) -> Bench:
        return replace(self, **changes)

    def with_fields(self, fields: Mapping[str, Any]) -> Bench:
        method = dataclasses.replace(self.method, **fields)
        return replace(self, method=method, rollouts=written(self.rollouts, method))


@dataclass
class Teacher:
    features: Callable[[Rollouts], Tensor]
    weight_VH: Tensor
    name: str = "local"
    provides: frozenset[str] = frozenset({"sampled", "topk", "full", "hidden", "text"})

    def view(self, rollouts: Rollouts, signals: frozenset[Signal]) -> States:
        return states(self.features(rollouts), self.weight_VH, layers_of("teacher", signals))

    def continue_(
        self, rollouts: Rollouts, cuts_B: Tensor, *, samples: int, max_tokens: int, seed: tuple[int, ...], **how: Any
    ) -> list[Continued]:
        owners = zip(rollouts.uid_B.tolist(), cuts_B.tolist(), strict=True)
        return [Continued([words(V, max_tokens, *seed, *o, i) for i in range(samples)], max_tokens) for o in owners]


def words(vocabulary: int, tokens: int, *owner: int) -> str:
    ids = (vocabulary * uniform(*owner, torch.arange(tokens))).long()
    return " ".join(f"w{i}" for i in ids.tolist())


class Language:
    """Every token is a word of its own."""

    def texts(self, rollouts: Rollouts) -> list[str]:
        there_BT = rollouts.source_BT != Source.PADDING
        return [
            " ".join(f"w{i}" for i in ids_T[there_T].tolist()) for ids_T, there_T in zip(rollouts.response_BT, there_BT)
        ]

    def shortened(self, text: str, tokens: int) -> str:
        return " ".join(text.split()[:tokens])


@dataclass
class Frozen:
    """The models of a bench before its step."""

    bench: Bench

    def rollouts(self, prompts: int, max_tokens: int) -> Rollouts:
        return self.bench.rollouts

    def states(self, rollouts: Rollouts, signals: frozenset[Signal]) -> dict[Signal, Tensor]:
        bench = self.bench
        seen = {"student": bench.student(rollouts, signals), "teacher": bench.teacher.view(rollouts, signals)}
        return {s: seen[o].layers[k].detach() for s in signals for o in seen for k in layers_of(o, frozenset({s}))}


def states(features_NH: Tensor, weight_VH: Tensor, layers: frozenset[Signal]) -> States:
    """Two blocks stand side by side on the features. They are made of the head's weights, so that there is one
    parameter whatever a loss looks at."""
    blocks = {1: weight_VH[:H], 2: weight_VH[-H:]}
    found = {}
    for signal in layers:
        asked: dict[str, Any] = dict(signal.args)
        seen_NH = features_NH if asked["align"] == "predict" else features_NH.roll(1, -1)
        every = [seen_NH if block == -1 else seen_NH @ blocks[block].T for block in asked["layers"]]
        found[signal] = torch.stack(every, 1)
    return States(features_NH, Head(weight_VH), found)


def features(seed: int) -> Callable[[Rollouts], Tensor]:
    """A body: one random feature vector per (rollout, position), the same whatever the padding or the order."""

    def of(rollouts: Rollouts) -> Tensor:
        rows = []
        for uid, mask_T in zip(rollouts.uid_B.tolist(), rollouts.mask_BT):
            generator = torch.Generator().manual_seed(1000 * seed + uid)
            table = torch.randn(16, H, generator=generator, dtype=torch.float64)
            rows.append(table[: int(mask_T.sum())])
        return torch.cat(rows)

    return of


def small_rollouts(weight_VH: Tensor) -> Rollouts:
    generator = torch.Generator().manual_seed(7)
    B, P, T = len(LENGTHS), 3, max(LENGTHS)
    length_B1 = torch.tensor(LENGTHS)[:, None]
    mask_BT = torch.arange(T) < length_B1
    response_BT = torch.randint(V, (B, T), generator=generator)
    empty_BT = torch.full((B, T), torch.nan, dtype=torch.float64)
    rollouts = Rollouts(
        ids_BL=torch.cat([torch.randint(V, (B, P), generator=generator), response_BT], 1),
        attention_BL=torch.cat([torch.ones(B, P, dtype=torch.bool), mask_BT], 1),
        source_BT=torch.where(mask_BT, int(Source.STUDENT), int(Source.PADDING)).to(torch.int8),
        behavior_logp_BT=empty_BT, logp_BT=empty_BT, entropy_BT=empty_BT,
        stopped_B=torch.tensor([True, True, False, True, True, True, True, True]),
        uid_B=torch.arange(B) + 40,
        group_B=torch.tensor(GROUPS),
        reward_B=torch.tensor(REWARDS, dtype=torch.float64),
    )  # fmt: skip
    logp_NV = (features(1)(rollouts) @ weight_VH.detach().T).log_softmax(-1)
    logp_BT, entropy_BT = empty_BT.clone(), empty_BT.clone()
    logp_BT[mask_BT] = logp_NV.gather(-1, response_BT[mask_BT][:, None])[:, 0]
    entropy_BT[mask_BT] = -(logp_NV.exp() * logp_NV).sum(-1)
    return replace(rollouts, behavior_logp_BT=logp_BT, logp_BT=logp_BT, entropy_BT=entropy_BT)


def written(rollouts: Rollouts, method: Method) -> Rollouts:
    """The same with their authors: the student, but for the first two tokens of most rollouts where the method lets the
    teacher begin them, and the whole of them where it takes them from the data."""
    mask_BT = rollouts.mask_BT
    most_B1 = (rollouts.uid_B % 3 != 0)[:, None]
    if "dataset" in method.asks():
        unknown = {n: getattr(rollouts, n).masked_fill(most_B1, torch.nan) for n in SAMPLED}
        author_BT = torch.where(most_B1, int(Source.DATASET), int(Source.STUDENT))
        return replace(rollouts, source_BT=author_BT.where(mask_BT, int(Source.PADDING)).to(torch.int8), **unknown)
    begun_BT = (torch.arange(mask_BT.shape[1]) < 2) & most_B1
    author_BT = torch.where(begun_BT & ("teacher_tokens" in method.asks()), int(Source.TEACHER), int(Source.STUDENT))
    return replace(rollouts, source_BT=author_BT.where(mask_BT, int(Source.PADDING)).to(torch.int8))


def small_bench(method: Method) -> Bench:
    generator = torch.Generator().manual_seed(3)
    weight_VH = torch.randn(V, H, generator=generator, dtype=torch.float64).requires_grad_()
    other_VH = torch.randn(V, H, generator=generator, dtype=torch.float64)
    reference_VH = weight_VH.detach() + 0.3 * torch.randn(V, H, generator=generator, dtype=torch.float64)
    teacher = Teacher(features(2), other_VH)
    method = dataclasses.replace(method, **method.on_few_tokens).bind(FACTS)
    rollouts = written(small_rollouts(weight_VH), method)
    bench = Bench(method, rollouts, weight_VH, features(1), teacher, reference_VH)
    if method.preparation() is None:
        return bench
    return bench.but(prepared=method.prepare(Frozen(bench), method.init_state()).state)


LAB = lab_tokenizer()
FACTS = Facts(
    steps=50, behavior=Behavior(), max_tokens=48, per_prompt=4, updates_per_rollout=1, vocabulary=len(LAB), graded=True,
    tokenizer=tokenizer_digest(SimpleNamespace(tokenizer=LAB)), data="lab", teacher="local", engine="torch",
    student_shape=(DEPTH, H), teacher_shape=(DEPTH, H),
)  # fmt: skip


def method_in(path: Path) -> Method:
    """The method of a YAML file, under the settings of a run of the lab."""
    run = OmegaConf.create({"steps": 50, "rollout": {"max_tokens": 48}, "method": OmegaConf.load(path)})
    return method_of(OmegaConf.to_container(run, resolve=True)["method"], [])  # type: ignore[index,call-overload]
