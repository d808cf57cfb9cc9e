"""The laws of rock tokens on a student and a teacher in miniature, and on the lab's own tokenizer.

The contract's bench has a vocabulary of 13, in which the lab's rocks do not occur; here some of it are rocks.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from contract_bench import Bench, method_in, small_bench
from torch import Generator, Tensor
from torch.nn.functional import pad
from transformers import AutoTokenizer

import opd_lab
from opd_lab.config import CONF
from opd_lab.data import arithmetic
from opd_lab.methods.opd import OPD
from opd_lab.methods.rock_tokens import RockTokens
from opd_lab.parts import tokenizer_digest
from opd_lab.types import Rollouts
from tests.methods.rocks import rocks

ROCKS = (1, 4, 9, 12)
FLOATS = ("behavior_logp_BT", "logp_BT", "entropy_BT")
VARIANTS: list[dict[str, Any]] = [
    {},
    {"align": "previous", "normalizer": "rollout_kept_weight"},
    {"rock_weight": 0.5, "normalizer": "kept_weight"},
    {"window": "high_run", "window_radius": 1},
    {"window": "radius", "window_radius": 1},
    {"mask": "random_positions"},
]


def bench_of(**keys: Any) -> Bench:
    return small_bench(rocks(**{"token_ids": ROCKS} | keys))


@pytest.mark.parametrize("keys", VARIANTS)
def test_order_padding_and_micro_batches_change_nothing(keys: dict[str, Any]) -> None:
    bench = bench_of(**keys)
    found, grad_VH = bench.run()
    _, plain_VH = bench.but(method=OPD()).run()
    assert not torch.allclose(grad_VH, plain_VH)  # some tokens are frozen, others are not
    assert found.objective > 0
    order = torch.tensor([3, 1, 7, 5, 0, 6, 4, 2])
    for other in (bench, bench.but(rollouts=wide(bench.rollouts)), bench.but(rollouts=bench.rollouts.rows(order))):
        for micro_batch in (1, 3, 100):
            again, again_VH = other.run(micro_batch)
            assert again.objective == pytest.approx(found.objective, rel=1e-12)
            torch.testing.assert_close(again_VH, grad_VH, rtol=1e-9, atol=1e-12)


def wide(rollouts: Rollouts) -> Rollouts:
    """More padding on both sides, all of it rock tokens."""
    rock_BX = torch.full((len(rollouts), 2), 9)
    right = {name: pad(getattr(rollouts, name), (0, 2), value=math.nan) for name in FLOATS}
    return replace(
        rollouts,
        ids_BL=torch.cat([rock_BX, rollouts.ids_BL, rock_BX], 1),
        attention_BL=pad(rollouts.attention_BL, (2, 2)),
        source_BT=pad(rollouts.source_BT, (0, 2)),
        **right,
    )


@pytest.mark.parametrize("value", [7.0, math.inf])
def test_the_teacher_does_not_matter_on_frozen_tokens(value: float) -> None:
    """With inf its log-probs there are not even numbers: 0 times that would spoil the step."""
    bench = bench_of()

    def spoilt(rollouts: Rollouts) -> Tensor:
        hit_N = torch.isin(rollouts.response_BT, torch.tensor(ROCKS))[rollouts.mask_BT]
        assert 0 < hit_N.sum() < len(hit_N)
        return bench.teacher.features(rollouts).masked_fill(hit_N[:, None], value)

    found, grad_VH = bench.run()
    again, again_VH = bench.but(teacher=replace(bench.teacher, features=spoilt)).run()
    assert again.objective == pytest.approx(found.objective, rel=1e-12)
    torch.testing.assert_close(again_VH, grad_VH, rtol=1e-12, atol=0)


@pytest.mark.parametrize("keys", VARIANTS)
def test_weight_one_is_plain_opd_under_any_other_keys(keys: dict[str, Any]) -> None:
    bench = bench_of(**keys)
    neutral, grad_VH = bench.with_fields(RockTokens.neutral or {}).run()
    plain, plain_VH = bench.but(method=OPD()).run()
    assert neutral.objective == pytest.approx(plain.objective, rel=1e-12)
    torch.testing.assert_close(grad_VH, plain_VH, rtol=1e-9, atol=1e-12)


# the lab's files ---------------------------------------------------------------------------------------------------

ZOO = Path(opd_lab.__file__).parent / "zoo" / "student"
FILES = sorted((CONF / "method").glob("rock_tokens*.yaml"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    if not ZOO.is_dir():
        pytest.skip("the lab's models are not there: run opd-lab make-lab-models")
    return AutoTokenizer.from_pretrained(ZOO)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_files_belong_to_the_shipped_tokenizer(path: Path, tokenizer: Any) -> None:
    """When this fails the lab's words have changed: write their ids and the new digest into the files."""
    method = cast(RockTokens, method_in(path))
    if method.source == "online":
        assert method.token_ids == ()
        return
    assert method.tokenizer_digest == tokenizer_digest(cast(Any, SimpleNamespace(tokenizer=tokenizer)))
    words = tokenizer.convert_ids_to_tokens(list(method.token_ids))
    (said,) = re.findall(r"(?:here the lab's|# Types:) (?:connectives: )?([^.\n]*)", path.read_text())
    assert words == said.split(), "the file says which types it freezes"
    others = ("random_types", "top_frequency", "top_mean_kl", "recalcitrance", "protect_pillars")
    assert (set(words) == set(arithmetic.CONNECTIVES)) == (not path.stem.endswith(others))


def test_the_random_types_are_as_frequent_as_the_connectives(tokenizer: Any) -> None:
    control = cast(RockTokens, method_in(CONF / "method" / "rock_tokens_random_types.yaml")).token_ids
    assert not set(control) & {
        *tokenizer.convert_tokens_to_ids(list(arithmetic.CONNECTIVES)),
        *tokenizer.all_special_ids,
    }
    generator, counts = Generator().manual_seed(1), Counter()
    for problem in arithmetic.problems("train", (2, 3), 500, seed=1):
        counts.update(arithmetic.solution(problem, arithmetic.STUDENT_STYLE, generator).split())
    frozen = sum(counts[word] for word in tokenizer.convert_ids_to_tokens(list(control)))
    assert 0.8 < frozen / sum(counts[word] for word in arithmetic.CONNECTIVES) < 1.2
