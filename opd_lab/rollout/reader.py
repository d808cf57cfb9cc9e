"""A model that reads a batch of rollouts while they are written: the prompts, then a token of each row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_lab.models import LM, positions
from opd_lab.rollout.torch_cache import PreallocatedCache, attention_layers


class Reader:
    """The logits of the next token; nothing but the last position is projected."""

    def __init__(self, lm: LM, attention_RP: Tensor, limit: int) -> None:
        self._body, self._head = lm.body, lm.head
        rows, prompt = attention_RP.shape
        self._cache = PreallocatedCache(attention_layers(lm.module.config), prompt + limit)
        self._attention_RL = torch.ones((rows, prompt + limit), dtype=torch.bool, device=attention_RP.device)
        self._attention_RL[:, :prompt] = attention_RP
        self._position_RL = positions(attention_RP)
        self._columns = prompt

    def read(self, ids_RL: Tensor) -> Tensor:
        """Read the prompts, or one more token of every row; [R, V] logits of what comes next."""
        hidden_RLH = self._body(
            input_ids=ids_RL,
            attention_mask=self._attention_RL[:, : self._columns],
            position_ids=self._position_RL,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        self._columns += 1
        self._position_RL = self._position_RL[:, -1:] + 1
        return self._head.logits(hidden_RLH[:, -1])

    def keep(self, rows_R: Tensor) -> None:
        """Only these rows go on, in increasing order."""
        self._cache.keep(rows_R)
        self._attention_RL, self._position_RL = self._attention_RL[rows_R], self._position_RL[rows_R]


def left_padded(prompts: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention, padded on the left."""
    width = max(map(len, prompts))
    ids_BP = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompts], device=device)
    length_B = torch.tensor([len(ids) for ids in prompts], device=device)
    return ids_BP, torch.arange(width, device=device)[None] >= width - length_B[:, None]
