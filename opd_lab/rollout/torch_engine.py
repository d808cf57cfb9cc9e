"""The engine that decodes with plain torch: exact log-probs, entropies for free, and rows that stop costing.

Prompts are decoded in batches of similar length over a preallocated cache, what several begin with is read once for
all of them, only the last position is projected, and rows that have finished leave the batch. All uniforms are drawn
first, one per row and token, and a token is the inverse of the distribution function at its uniform: so how rows are
batched, sorted or dropped never changes what a row draws.

Where the behavior asks for it, the teacher reads the same tokens beside the student, for as long as some row of the
batch needs it: it writes the first tokens, is blended with the student, or feeds a stop rule. Log-probs and entropies
are the student's on every token, whoever wrote it; a rollout that comes from the data is not decoded and has none.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opd_lab.methods.coins import uniform
from opd_lab.models import LM, evaluating
from opd_lab.rollout.reader import Reader, owners
from opd_lab.rollout.responses import Responses
from opd_lab.types import CAPABILITIES, Behavior, PerRollout, Rollouts, Source

LEAVE = 0.25  # finished share of the rows in the batch at which they leave it; moving the cache costs a little


@dataclass(frozen=True, slots=True)
class TorchEngine:
    max_tokens: int  # response limit
    decode_rows: int  # rows decoded together
    name: str = "torch"
    seed: int = 0  # of the numbers of tokens that a behavior draws per rollout
    supports: frozenset[str] = frozenset(CAPABILITIES)

    def sample(
        self,
        student: LM,
        prompts: list[list[int]],
        *,
        behavior: Behavior,
        group_B: Tensor,
        uid_B: Tensor,
        generator: torch.Generator,
        teacher: LM | None = None,
        solutions: list[list[int]] | None = None,
    ) -> Rollouts:
        """One rollout per prompt, in the order given; uniforms are drawn from `generator` row by row. The teacher is
        wanted where `behavior.helped`, and a solution per prompt, its end included, where it asks for the data's."""
        uniform_BT = torch.rand(
            (len(prompts), self.max_tokens), generator=generator, device=generator.device, dtype=torch.float64
        )
        return self.decode(
            student, prompts, behavior=behavior, group_B=group_B, uid_B=uid_B, uniform_BT=uniform_BT, teacher=teacher,
            solutions=solutions,
        )  # fmt: skip

    @torch.no_grad()
    def decode(
        self,
        student: LM,
        prompts: list[list[int]],
        *,
        behavior: Behavior,
        group_B: Tensor,
        uid_B: Tensor,
        uniform_BT: Tensor,
        teacher: LM | None = None,
        solutions: list[list[int]] | None = None,
    ) -> Rollouts:
        """The same with the uniforms given."""
        assert not behavior.helped or teacher is not None, f"{sorted(behavior.asks)} need the teacher"
        for lm in [student] if teacher is None else [student, teacher]:
            _check(lm, prompts, self.max_tokens)
        out = Responses(student, len(prompts), self.max_tokens)
        plan = _plan(behavior, self.seed, uid_B, group_B, self.max_tokens, student.device)
        drawn = _uniforms(behavior, self.seed, uniform_BT, prompts, group_B)
        drawn = _Uniforms(*(value_BT.to(student.device) for value_BT in drawn))
        given_B = plan.dataset_B.tolist()
        for b, limit in enumerate(plan.limit_B.tolist()):
            if given_B[b]:
                assert solutions is not None, "this behavior needs the data's solutions"
                ids = solutions[b][:limit]
                out.give(b, ids, ids[-1] in student.stop_ids)
        needed_B, owner_B = (plan.teacher_until_B > 0).tolist(), owners(prompts)
        with evaluating(student.module), evaluating((teacher or student).module):
            for helped in (False, True):  # rows that need no teacher do not pay for one
                order = [b for b in range(len(prompts)) if needed_B[b] == helped and not given_B[b]]
                order.sort(key=lambda b: (-len(prompts[owner_B[b]]), owner_B[b], -len(prompts[b])))
                for begin in range(0, len(order), self.decode_rows):
                    rows = order[begin : begin + self.decode_rows]
                    row_R = torch.tensor(rows, device=student.device)
                    readers = (student, teacher if helped else None)
                    _decode(*readers, [prompts[b] for b in rows], row_R, behavior, plan, drawn, out)
        return out.rollouts(prompts, group_B, uid_B, _per_row(behavior, plan, out.generated_B))


class _Plan(NamedTuple):
    """What the behavior says of each row, in tokens."""

    limit_B: Tensor
    teacher_first_B: Tensor  # tokens that the teacher writes
    teacher_until_B: Tensor  # tokens of which it is asked at all
    dataset_B: Tensor  # bool, the data's own solution


def _plan(
    behavior: Behavior, seed: int, uid_B: Tensor, group_B: Tensor, max_tokens: int, device: torch.device
) -> _Plan:
    def tokens(number: int | PerRollout, low: int) -> Tensor:
        number_B = torch.full_like(uid_B, number) if isinstance(number, int) else number(seed, uid_B, group_B).long()
        return number_B.clamp(low, max_tokens).to(device)

    limit_B, first_B = tokens(behavior.limit, 1), tokens(behavior.teacher_first, 0)
    dataset_B = tokens(behavior.dataset, 0) > 0
    always = behavior.mix is not None or behavior.stop is not None
    until_B = torch.full_like(first_B, max_tokens) if always else first_B
    return _Plan(limit_B, first_B, until_B.masked_fill(dataset_B, 0), dataset_B)


class _Uniforms(NamedTuple):
    """What decides each token: the student's or a blend's, and the teacher's."""

    own_BT: Tensor
    teacher_BT: Tensor


def _uniforms(
    behavior: Behavior, seed: int, uniform_BT: Tensor, prompts: list[list[int]], group_B: Tensor
) -> _Uniforms:
    if behavior.teacher_draws == "rollout":
        return _Uniforms(uniform_BT, uniform_BT)
    member_BB = group_B[:, None] == group_B
    if behavior.teacher_draws == "group":
        return _Uniforms(uniform_BT, uniform_BT[member_BB.int().argmax(1)])
    prompt_B = torch.tensor([int(hashlib.sha256(repr(ids).encode()).hexdigest()[:15], 16) for ids in prompts])
    number_B = member_BB.tril(-1).sum(1)  # of the rollout among those of its prompt
    return _Uniforms(uniform_BT, uniform(seed, prompt_B[:, None], number_B[:, None], torch.arange(uniform_BT.shape[1])))


def _per_row(behavior: Behavior, plan: _Plan, generated_B: Tensor) -> dict[str, Tensor]:
    out = {"generated": generated_B} if behavior.stop is not None else {}
    return out | ({"teacher_decoded": generated_B.minimum(plan.teacher_until_B)} if behavior.helped else {})


def filtered(logits_RV: Tensor, behavior: Behavior) -> Tensor:
    """Log-probs of the distribution that is sampled: suppress, temper, keep the top k, of these the top p."""
    logits_RV = logits_RV / behavior.temperature
    if behavior.suppressed:
        logits_RV[:, list(behavior.suppressed)] = -torch.inf
    if 0 < behavior.top_k < logits_RV.shape[-1]:
        top = logits_RV.topk(behavior.top_k, dim=-1)
        logits_RV = torch.full_like(logits_RV, -torch.inf).scatter(-1, top.indices, top.values)
    if behavior.top_p < 1.0:
        sorted_RV, index_RV = logits_RV.sort(dim=-1, descending=True)
        p_RV = sorted_RV.softmax(-1)
        outside_RV = p_RV.cumsum(-1) - p_RV >= behavior.top_p  # the likelier ones have the mass already
        outside_RV[:, 0] = False
        logits_RV = logits_RV.masked_fill(outside_RV.scatter(-1, index_RV, outside_RV), -torch.inf)
    return logits_RV.log_softmax(-1)


def draw(logp_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The token at which the distribution function passes the uniform; never one without mass."""
    cdf_RV = logp_RV.double().exp().cumsum(-1)
    return torch.searchsorted(cdf_RV, uniform_R[:, None] * cdf_RV[:, -1:], right=True)[:, 0]


def _decode(
    student: LM,
    teacher: LM | None,
    prompts: list[list[int]],
    row_R: Tensor,
    behavior: Behavior,
    plan: _Plan,
    drawn: _Uniforms,
    out: Responses,
) -> None:
    """Decode one batch; row r of it is row `row_R[r]` of the output."""
    limit, until = int(plan.limit_B[row_R].max()), int(plan.teacher_until_B[row_R].max())
    own = Reader(student, prompts, limit)
    other = None if teacher is None else Reader(teacher, prompts, min(limit, until))
    out.shared_B[row_R] = torch.tensor(own.shared_R, device=student.device)
    ids_R1 = None
    stop_S = torch.tensor(sorted(student.stop_ids), dtype=torch.long, device=student.device)
    running_R = torch.ones_like(row_R, dtype=torch.bool)
    score_RT = torch.zeros((len(row_R), limit if behavior.stop else 0), device=student.device)
    for t in range(limit):
        other = other if t < until else None  # its cache is freed
        logp_RV = own.read(ids_R1)
        said_RV, source_R, uniform_R, kept_R = logp_RV, None, drawn.own_BT[row_R, t], None
        if other is not None:
            logq_RV = other.read(ids_R1)
            if behavior.mix is not None:
                said_RV, columns = behavior.mix(logp_RV, logq_RV)
                for name, value_R in columns.items():
                    out.note(name, row_R, t, value_R, running_R)
            if behavior.stop is not None:
                score_RT[:, t] = behavior.stop.score(logp_RV, logq_RV)
                out.note("stop_score", row_R, t, score_RT[:, t], running_R)
                kept_R = behavior.stop.cut(score_RT[:, : t + 1])
            teacher_R = t < plan.teacher_first_B[row_R]
            said_RV = torch.where(teacher_R[:, None], logq_RV, said_RV)
            student_or_blend = Source.STUDENT if behavior.mix is None else Source.BLEND
            source_R = torch.where(teacher_R, int(Source.TEACHER), int(student_or_blend)).to(torch.int8)
            uniform_R = torch.where(teacher_R, drawn.teacher_BT[row_R, t], uniform_R)
        behavior_RV = said_RV if behavior.unfiltered else filtered(said_RV, behavior)
        ids_R = draw(behavior_RV, uniform_R)
        out.write(row_R, t, ids_R, behavior_RV, logp_RV, source_R, running_R)
        running_R = out.finish(row_R, torch.isin(ids_R, stop_S), kept_R, running_R) & (t + 1 < plan.limit_B[row_R])
        left = int(running_R.sum())
        if left == 0:
            return
        ids_R1 = ids_R[:, None]
        if left <= (1 - LEAVE) * len(row_R):
            keep_R = running_R.nonzero()[:, 0]
            for reader in (own, other):
                if reader is not None:
                    reader.keep(keep_R)
            ids_R1, row_R, running_R, score_RT = ids_R1[keep_R], row_R[keep_R], running_R[keep_R], score_RT[keep_R]
            until = int(plan.teacher_until_B[row_R].max())


def _check(lm: LM, prompts: list[list[int]], max_tokens: int) -> None:
    if not prompts or not all(prompts):
        raise ValueError(f"every rollout needs a prompt of at least one token, got {len(prompts)} prompts, some empty")
    longest = max(map(len, prompts))
    limit = getattr(lm.module.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest + max_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and a response limit of {max_tokens} exceed the {limit} positions of "
            f"model.{lm.name} ({lm.path}); lower rollout.max_tokens or data.max_prompt_tokens"
        )
