"""The engine that decodes with plain torch: exact log-probs, entropies for free, and rows that stop costing.

Prompts are decoded in batches of similar length over a preallocated cache, only the last position is projected, and
rows that have finished leave the batch. All uniforms are drawn first, one per row and token, and a token is the inverse
of the distribution function at its uniform: so how rows are batched, sorted or dropped never changes what a row draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.models import LM, evaluating, positions
from opd_lab.rollout.torch_cache import PreallocatedCache, attention_layers
from opd_lab.types import Behavior, Rollouts, Source

LEAVE = 0.25  # finished share of the rows in the batch at which they leave it; moving the cache costs a little


@dataclass(frozen=True, slots=True)
class TorchEngine:
    max_tokens: int  # response limit
    decode_rows: int  # rows decoded together
    name: str = "torch"

    def sample(
        self,
        student: LM,
        prompts: list[list[int]],
        *,
        behavior: Behavior,
        group_B: Tensor,
        uid_B: Tensor,
        generator: torch.Generator,
    ) -> Rollouts:
        """One rollout per prompt, in the order given; uniforms are drawn from `generator` row by row."""
        uniform_BT = torch.rand(
            (len(prompts), self.max_tokens), generator=generator, device=generator.device, dtype=torch.float64
        )
        return self.decode(student, prompts, behavior=behavior, group_B=group_B, uid_B=uid_B, uniform_BT=uniform_BT)

    @torch.no_grad()
    def decode(
        self,
        lm: LM,
        prompts: list[list[int]],
        *,
        behavior: Behavior,
        group_B: Tensor,
        uid_B: Tensor,
        uniform_BT: Tensor,
    ) -> Rollouts:
        """The same with the uniforms given."""
        _check(lm, prompts, self.max_tokens)
        out = _Responses(lm, len(prompts), self.max_tokens)
        order = sorted(range(len(prompts)), key=lambda b: len(prompts[b]), reverse=True)
        uniform_BT = uniform_BT.to(lm.device)
        with evaluating(lm.module):
            for begin in range(0, len(order), self.decode_rows):
                rows = order[begin : begin + self.decode_rows]
                _decode(lm, [prompts[b] for b in rows], torch.tensor(rows, device=lm.device), behavior, uniform_BT, out)
        return out.rollouts(prompts, group_B, uid_B)


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
    lm: LM, prompts: list[list[int]], row_R: Tensor, behavior: Behavior, uniform_BT: Tensor, out: _Responses
) -> None:
    """Decode one batch; row r of it is row `row_R[r]` of the output."""
    longest, limit = max(map(len, prompts)), uniform_BT.shape[1]
    ids_RL, attention_RP = _left_padded(prompts, lm.pad_id, lm.device)
    attention_RL = torch.ones((len(prompts), longest + limit), dtype=torch.bool, device=lm.device)
    attention_RL[:, :longest] = attention_RP
    position_RL = positions(attention_RP)
    cache = PreallocatedCache(attention_layers(lm.module.config), longest + limit)
    head, body = lm.head, lm.body
    stop_S = torch.tensor(sorted(lm.stop_ids), dtype=torch.long, device=lm.device)
    running_R = torch.ones_like(row_R, dtype=torch.bool)
    for t in range(limit):
        hidden_RLH = body(
            input_ids=ids_RL,
            attention_mask=attention_RL[:, : longest + t],
            position_ids=position_RL,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits_RV = head.logits(hidden_RLH[:, -1])
        logp_RV = logits_RV.log_softmax(-1)
        behavior_RV = logp_RV if behavior.plain else filtered(logits_RV, behavior)
        ids_R = draw(behavior_RV, uniform_BT[row_R, t])
        stopped_R = torch.isin(ids_R, stop_S)
        live_R = row_R[running_R]
        out.write(live_R, t, ids_R, behavior_RV, logp_RV, running_R)
        out.stopped_B[live_R] = stopped_R[running_R]
        running_R = running_R & ~stopped_R
        left = int(running_R.sum())
        if left == 0:
            return
        ids_RL, position_RL = ids_R[:, None], position_RL[:, -1:] + 1
        if left <= (1 - LEAVE) * len(row_R):
            keep_R = running_R.nonzero()[:, 0]
            cache.keep(keep_R)
            ids_RL, position_RL, attention_RL = ids_RL[keep_R], position_RL[keep_R], attention_RL[keep_R]
            row_R, running_R = row_R[keep_R], running_R[keep_R]


class _Responses:
    """What has been sampled so far, at its final place."""

    def __init__(self, lm: LM, rows: int, columns: int) -> None:
        def full(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((rows, columns), value, dtype=dtype, device=lm.device)

        self.pad_id = lm.pad_id
        self.ids_BT = full(lm.pad_id, torch.long)
        self.source_BT = full(Source.PADDING, torch.int8)
        self.behavior_logp_BT, self.logp_BT, self.entropy_BT = (full(torch.nan, torch.float32) for _ in range(3))
        self.stopped_B = torch.zeros(rows, dtype=torch.bool, device=lm.device)

    def write(self, row_R: Tensor, t: int, ids_R: Tensor, behavior_RV: Tensor, logp_RV: Tensor, on_R: Tensor) -> None:
        """Token t of the rows that are still running."""
        at_R1 = ids_R[:, None]
        self.ids_BT[row_R, t] = ids_R[on_R]
        self.source_BT[row_R, t] = Source.STUDENT
        self.behavior_logp_BT[row_R, t] = behavior_RV.gather(-1, at_R1)[on_R, 0]
        self.logp_BT[row_R, t] = logp_RV.gather(-1, at_R1)[on_R, 0]
        self.entropy_BT[row_R, t] = d.entropy(logp_RV)[on_R]

    def rollouts(self, prompts: list[list[int]], group_B: Tensor, uid_B: Tensor) -> Rollouts:
        source_BT = self.source_BT
        width = int((source_BT != Source.PADDING).any(0).sum())
        prompt_BP, attention_BP = _left_padded(prompts, self.pad_id, source_BT.device)
        return Rollouts(
            ids_BL=torch.cat([prompt_BP, self.ids_BT[:, :width]], 1),
            attention_BL=torch.cat([attention_BP, source_BT[:, :width] != Source.PADDING], 1),
            source_BT=source_BT[:, :width],
            behavior_logp_BT=self.behavior_logp_BT[:, :width],
            logp_BT=self.logp_BT[:, :width],
            entropy_BT=self.entropy_BT[:, :width],
            stopped_B=self.stopped_B,
            uid_B=uid_B.to(source_BT.device),
            group_B=group_B.to(source_BT.device),
            reward_B=torch.full((len(prompts),), torch.nan, device=source_BT.device),
        )


def _left_padded(prompts: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids_BP = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompts], device=device)
    length_B = torch.tensor([len(ids) for ids in prompts], device=device)
    return ids_BP, torch.arange(width, device=device)[None] >= width - length_B[:, None]


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
