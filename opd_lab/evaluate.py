"""How good is the student? Accuracy, pass@k, length, diversity, and the exact distance to the teacher.

Sampling has its own generator, seeded anew at every evaluation: training randomness is untouched, and every method, run
and step sees the same uniforms. The reverse KL here is the whole-vocabulary KL(student || teacher) over the tokens of
held-out rollouts, the one number that means the same for every method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from statistics import fmean
from typing import Protocol

import torch

from opd_lab.diagnostics.scoring import score
from opd_lab.models import LM
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.step import Scorer
from opd_lab.types import REVERSE_KL, Behavior, Rollouts


class Example(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def ids(self) -> list[int]:
        """The rendered prompt."""
        ...

    @property
    def answer(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Correct counts per graded problem, and what was seen over all rollouts."""

    ids: list[str]  # of the graded problems
    n: int  # rollouts per problem
    c: list[int]  # of these correct, per graded problem
    length_mean_tokens: float
    truncated_fraction: float  # rollouts cut at the response limit
    distinct_fraction: float  # distinct responses of a problem / n, mean over problems
    reverse_kl_mean_nats: float | None  # None without a teacher that knows its full distribution

    def scalars(self, prefix: str) -> dict[str, float]:
        """Metrics under `<prefix>/`, such as `eval/validation/pass_at_8`."""
        out = {
            "length_mean_tokens": self.length_mean_tokens,
            "truncated_fraction": self.truncated_fraction,
            "distinct_fraction": self.distinct_fraction,
        }
        if self.c:
            out[f"avg_at_{self.n}"] = fmean(c / self.n for c in self.c)
            for k in (2**i for i in range(self.n.bit_length())):
                out[f"pass_at_{k}"] = fmean(pass_at_k(self.n, c, k) for c in self.c)
        if self.reverse_kl_mean_nats is not None:
            out["reverse_kl_mean_nats"] = self.reverse_kl_mean_nats
        return {f"{prefix}/{name}": value for name, value in out.items()}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n rollouts, c of them correct, hold a correct one: 1 - C(n - c, k) / C(n, k), unbiased."""
    _check(n, c, k)
    return 1.0 - prod(1.0 - k / i for i in range(n - c + 1, n + 1)) if n - c >= k else 1.0


def pass_at_k_with_replacement(n: int, c: int, k: int) -> float:
    """1 - (1 - c/n)^k, as if one of n rollouts were drawn k times: too low, but what some papers print."""
    _check(n, c, k)
    return 1.0 - (1.0 - c / n) ** k


def _check(n: int, c: int, k: int) -> None:
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n = {n}, c = {c}, k = {k}")


def evaluate(
    student: LM,
    teacher: Scorer | None,
    engine: TorchEngine,
    examples: Sequence[Example],
    grade: Callable[[str, str], float] | None,
    *,
    samples: int,
    behavior: Behavior,
    seed: int,
    chunk: int,
    micro_batch: int,
) -> Evaluation:
    """`samples` rollouts of every example. `chunk` tokens are projected at a time, `micro_batch` rollouts scored."""
    problem_B = torch.arange(len(examples)).repeat_interleave(samples)
    rollouts = engine.sample(
        student,
        [list(examples[i].ids) for i in problem_B.tolist()],
        behavior=behavior,
        group_B=problem_B,
        uid_B=torch.arange(len(problem_B)),
        generator=torch.Generator().manual_seed(seed),
    )
    texts = student.texts(rollouts)
    answers = [texts[begin : begin + samples] for begin in range(0, len(texts), samples)]
    graded = [(e.id, e.answer, a) for e, a in zip(examples, answers, strict=True) if grade and e.answer is not None]
    return Evaluation(
        ids=[name for name, _, _ in graded],
        n=samples,
        c=[sum(grade(text, answer) == 1.0 for text in many) for _, answer, many in graded] if grade else [],
        length_mean_tokens=float(rollouts.length_B.double().mean()),
        truncated_fraction=1.0 - float(rollouts.stopped_B.double().mean()),
        distinct_fraction=fmean(len(set(many)) / samples for many in answers),
        reverse_kl_mean_nats=_reverse_kl(student, teacher, rollouts, chunk, micro_batch),
    )


def _reverse_kl(student: LM, teacher: Scorer | None, rollouts: Rollouts, chunk: int, micro_batch: int) -> float | None:
    """Mean over the generated tokens."""
    if teacher is None or "full" not in teacher.provides:
        return None
    seen = score(frozenset({REVERSE_KL}), rollouts, student, teacher, chunk=chunk, micro_batch=micro_batch)
    return float(seen[REVERSE_KL][rollouts.mask_BT].double().mean())
