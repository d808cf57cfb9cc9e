"""A model that reads a batch of rollouts while they are written: the prompts, then a token of each row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_lab.models import LM, positions
from opd_lab.rollout.torch_cache import PreallocatedCache, attention_layers


class Reader:
    """Log-probs of the next token; nothing but the last position is projected. A prompt that another one of the batch
    begins with is not read again: its keys and values are those of the other's first tokens."""

    def __init__(self, lm: LM, prompts: list[list[int]], limit: int) -> None:
        self._body, self._head = lm.body, lm.head
        ids_RP, attention_RP = left_padded(prompts, lm.pad_id, lm.device)
        rows, self._columns = ids_RP.shape
        self._attention_RL = torch.ones((rows, self._columns + limit), dtype=torch.bool, device=lm.device)
        self._attention_RL[:, : self._columns] = attention_RP
        self._position_R1 = attention_RP.sum(1, keepdim=True)
        layers, owner_R = attention_layers(lm.module.config), owners(prompts)
        self.shared_R = [len(prompts[r]) if owner != r else 0 for r, owner in enumerate(owner_R)]
        read = sorted(set(owner_R))
        every = len(read) == rows
        self._cache = PreallocatedCache(layers, self._columns + (limit if every else 0))
        hidden_RPH = self._run(ids_RP[read], attention_RP[read], positions(attention_RP[read]))
        self._first_RH = hidden_RPH[:, -1]
        if not every:
            row_R = torch.tensor([read.index(owner) for owner in owner_R], device=lm.device)
            behind_R = self._position_R1[owner_R, 0] - self._position_R1[:, 0]  # tokens of the other that follow
            self._first_RH = hidden_RPH[row_R, -1 - behind_R]
            self._cache = self._cache.branch(row_R, behind_R, self._columns + limit)

    def read(self, ids_R1: Tensor | None) -> Tensor:
        """Read one more token of every row, none at first; [R, V] log-probs of what comes next."""
        if ids_R1 is None:
            return self._head.log_probs(self._first_RH)
        self._columns += 1
        hidden_R1H = self._run(ids_R1, self._attention_RL[:, : self._columns], self._position_R1)
        self._position_R1 = self._position_R1 + 1
        return self._head.log_probs(hidden_R1H[:, -1])

    def _run(self, ids_RL: Tensor, attention_RL: Tensor, position_RL: Tensor) -> Tensor:
        return self._body(
            input_ids=ids_RL,
            attention_mask=attention_RL,
            position_ids=position_RL,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state

    def keep(self, rows_R: Tensor) -> None:
        """Only these rows go on, in increasing order."""
        self._cache.keep(rows_R)
        self._attention_RL, self._position_R1 = self._attention_RL[rows_R], self._position_R1[rows_R]


def owners(prompts: list[list[int]]) -> list[int]:
    """For each prompt the number of one that begins with it, its own where no other does."""
    order = sorted(range(len(prompts)), key=lambda b: prompts[b])  # a prompt stands before all that begin with it
    found, owner = [0] * len(prompts), order[-1]
    for b in reversed(order):
        owner = owner if prompts[owner][: len(prompts[b])] == prompts[b] else b
        found[b] = owner
    return found


def left_padded(prompts: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention, padded on the left."""
    width = max(map(len, prompts))
    ids_BP = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompts], device=device)
    length_B = torch.tensor([len(ids) for ids in prompts], device=device)
    return ids_BP, torch.arange(width, device=device)[None] >= width - length_B[:, None]
