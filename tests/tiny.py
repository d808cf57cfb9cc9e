"""Tiny randomly initialised checkpoints of several architectures, and rollouts written by hand."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opd_lab.models import LM, wrap
from opd_lab.types import Rollouts, Source

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopq"]  # 20 ids
SHAPE: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.3,
}
HEADS = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=4)),
    "qwen2_tied": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=False)),
    "gemma2_softcap": (Gemma2ForCausalLM, Gemma2Config(**SHAPE, head_dim=4, final_logit_softcapping=0.7)),
    "cohere_multiplies": (CohereForCausalLM, CohereConfig(**SHAPE, logit_scale=0.25)),
    "granite_divides": (GraniteForCausalLM, GraniteConfig(**SHAPE, logits_scaling=8.0)),
}


def tokenizer(words: list[str] = WORDS, **special: str) -> PreTrainedTokenizerFast:
    words_to_ids = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(words_to_ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=inner, **roles)


def make(kind: str = "qwen3", seed: int = 0, **changes: Any) -> LM:
    build, config = HEADS[kind]
    torch.manual_seed(seed)
    module = build(type(config)(**(config.to_dict() | changes))).eval()
    return wrap(module, tokenizer(), name="student", path=kind)


def rollouts(prompts: list[list[int]], responses: list[list[int]], extra: int = 0) -> Rollouts:
    """By hand: prompts padded on the left by `extra` columns more than needed, responses on the right likewise."""
    p, t = max(map(len, prompts)) + extra, max(map(len, responses)) + extra
    rows = [[0] * (p - len(a)) + a + b + [0] * (t - len(b)) for a, b in zip(prompts, responses)]
    real = [[0] * (p - len(a)) + [1] * len(a + b) + [0] * (t - len(b)) for a, b in zip(prompts, responses)]
    source = [[int(Source.STUDENT)] * len(b) + [0] * (t - len(b)) for b in responses]
    nan_BT, zero_B = torch.full((len(prompts), t), torch.nan), torch.zeros(len(prompts), dtype=torch.long)
    return Rollouts(
        ids_BL=torch.tensor(rows),
        attention_BL=torch.tensor(real).bool(),
        source_BT=torch.tensor(source, dtype=torch.int8),
        behavior_logp_BT=nan_BT,
        logp_BT=nan_BT,
        entropy_BT=nan_BT,
        stopped_B=torch.tensor([b[-1] == 1 for b in responses]),
        uid_B=zero_B,
        group_B=zero_B,
        reward_B=torch.full((len(prompts),), torch.nan),
    )
