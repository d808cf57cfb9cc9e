"""A key-value cache that is allocated once per batch, written in place, and shrinks as rows finish.

transformers' own growing cache copies every key and value at every token, and its fixed one attends to columns that
are still empty. Here a layer owns [rows, heads, columns, dim], writes the new columns in place and returns a view of
what is filled. Sliding-window layers keep all columns; the model's own mask hides what is out of the window.
"""

from __future__ import annotations

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
        for layer in self.layers:
            assert isinstance(layer, PreallocatedLayer)
            if layer.is_initialized:
                layer.keep(rows_R)


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
