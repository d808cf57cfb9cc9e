"""A key-value cache that is allocated once per batch, written in place, and shrinks as rows finish.

transformers' own growing cache copies every key and value at every token, and its fixed one attends to columns that
are still empty. Here a layer owns [rows, heads, columns, dim], writes the new columns in place and returns a view of
what is filled. Sliding-window layers keep all columns; the model's own mask hides what is out of the window.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class PreallocatedLayer(CacheLayerMixin):
    is_sliding = False
    is_croppable = False

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.filled = columns, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty((*key_states.shape[:2], self.columns, key_states.shape[3]))
        self.values = value_states.new_empty((*value_states.shape[:2], self.columns, value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        begin, self.filled = self.filled, self.filled + key_states.shape[2]
        assert self.filled <= self.columns, f"{self.filled} columns do not fit into {self.columns}"
        self.keys[:, :, begin : self.filled] = key_states
        self.values[:, :, begin : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def keep(self, rows_R: Tensor) -> None:
        """Only these rows go on, in increasing order; they move to the front and what is behind them is not touched."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old[: len(rows_R)]
            new[:, :, : self.filled] = old[rows_R, :, : self.filled]
            setattr(self, name, new)

    def branch(self, row_R: Tensor, behind_R: Tensor, columns: int) -> PreallocatedLayer:
        """A layer of `columns` columns whose row r holds what row `row_R[r]` holds here, without its last `behind_R[r]`
        columns, flush right."""
        width = self.filled - int(behind_R.min())
        column_RP = torch.arange(width, device=behind_R.device) + (self.filled - width - behind_R)[:, None]
        at = row_R[:, None], column_RP.clamp(min=0)  # in front of a row is padding, whatever stands there
        new = PreallocatedLayer(columns)
        assert self.keys is not None and self.values is not None
        new.update(*(old.transpose(1, 2)[at].transpose(1, 2) for old in (self.keys, self.values)))
        return new

    def get_seq_length(self) -> int:
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    def get_max_length(self) -> int:
        return self.columns

    get_max_cache_shape = get_max_length  # its name in earlier releases of transformers


class PreallocatedCache(Cache):
    """One `PreallocatedLayer` per attention layer that the model turns out to have."""

    def __init__(self, layers: int, columns: int) -> None:
        super().__init__(layers=[PreallocatedLayer(columns) for _ in range(layers)])

    def keep(self, rows_R: Tensor) -> None:
        for layer in self._used():
            layer.keep(rows_R)

    def branch(self, row_R: Tensor, behind_R: Tensor, columns: int) -> PreallocatedCache:
        """A cache in which row r begins as row `row_R[r]` does here, `behind_R[r]` columns shorter."""
        new = PreallocatedCache(0, columns)
        new.layers = [layer.branch(row_R, behind_R, columns) for layer in self._used()]
        return new

    def _used(self) -> list[PreallocatedLayer]:
        return [layer for layer in self.layers if isinstance(layer, PreallocatedLayer) and layer.is_initialized]


def attention_layers(config: object) -> int:
    """How many layers cache keys and values; ValueError where a layer remembers anything else."""
    config = getattr(config, "get_text_config", lambda: config)()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ValueError(
            f"the torch engine decodes full and sliding attention, got a {type(config).__name__} with layers of kind "
            f"{', '.join(sorted(kinds))}; choose a model without them or another rollout engine"
        )
    return config.num_hidden_layers  # pyright: ignore[reportAttributeAccessIssue]
