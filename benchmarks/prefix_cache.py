"""What reading nested prefixes once is worth to a teacher that is asked for continuations.

    python benchmarks/prefix_cache.py [rounds]

A random model of 4 layers x 256 continues 8 rollouts of 512 tokens from 8 prefixes each, 4 texts of 8 tokens from every
prefix. Both ways take turns in one process, so that a busy machine slows both alike. Printed are the medians of the
ratio of their times, the tokens read either way, and whether the texts are the same.
"""

from __future__ import annotations

import statistics
import sys
import time
from unittest.mock import patch

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from opd_lab import models
from opd_lab.methods.base import Continued
from opd_lab.models import LM
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.settings import ModelSettings
from opd_lab.teacher.local import LocalTeacher
from opd_lab.types import Behavior, Rollouts

ROLLOUTS, TOKENS, PREFIXES, SAMPLES, WRITTEN = 8, 512, 8, 4, 8
ALONE = "opd_lab.rollout.{}.owners"


def teacher() -> LM:
    """The lab's tokenizer on a wider and deeper body."""
    small = models.load(
        ModelSettings(path="lab:teacher", dtype="float32", trust_remote_code=False), device="cpu", name="t"
    )
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=small.vocabulary,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        eos_token_id=sorted(small.stop_ids),
    )
    return models.wrap(Qwen3ForCausalLM(config).eval(), small.tokenizer, name="teacher", path="random")


def asked(lm: LM, rollouts: Rollouts) -> tuple[list[Continued], float]:
    row_C = torch.arange(ROLLOUTS).repeat_interleave(PREFIXES)
    cut_C = torch.linspace(0, TOKENS - WRITTEN, PREFIXES).long().repeat(ROLLOUTS)
    begin = time.perf_counter()
    found = LocalTeacher(lm).continue_(
        rollouts.rows(row_C), cut_C, samples=SAMPLES, max_tokens=WRITTEN, temperature=1.0, top_p=1.0, seed=(0,)
    )
    return found, time.perf_counter() - begin


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    lm = teacher()
    uids = torch.arange(ROLLOUTS)
    prompts = [[3 + b, 4] for b in range(ROLLOUTS)]
    endless = Behavior(suppressed=tuple(lm.stop_ids))
    engine = TorchEngine(TOKENS, ROLLOUTS)
    generator = torch.Generator().manual_seed(0)
    rollouts = engine.sample(lm, prompts, behavior=endless, group_B=uids, uid_B=uids, generator=generator)
    ratios, same, cached = [], True, 0
    for _ in range(rounds):
        nested, quick = asked(lm, rollouts)
        alone = lambda prompts: list(range(len(prompts)))  # noqa: E731
        with patch(ALONE.format("reader"), alone), patch(ALONE.format("torch_engine"), alone):
            anew, slow = asked(lm, rollouts)
        ratios.append(slow / quick)
        cached = sum(written.cached for written in nested)
        same &= [written.texts for written in nested] == [written.texts for written in anew]
    prefix = int(ROLLOUTS * 2 * PREFIXES + ROLLOUTS * torch.linspace(0, TOKENS - WRITTEN, PREFIXES).long().sum())
    print(f"{rounds} rounds, torch {torch.__version__}, one thread")
    print(f"prefix tokens {prefix:,}, of which cached {cached:,}; the same texts: {same}")
    print(f"every prefix of every text read anew / nested prefixes read once: {statistics.median(ratios):.2f} x")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
