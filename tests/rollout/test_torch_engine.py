"""The torch engine: what it samples, what it says of it, and what it does not spend."""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from opd_lab.chunk import measure
from opd_lab.models import LM
from opd_lab.rollout.torch_engine import TorchEngine, draw, filtered
from opd_lab.types import ENTROPY_STUDENT, LOGP_STUDENT, Behavior, Rollouts, Source
from tests.tiny import make

PLAIN = Behavior()
PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11], [3, 3], [12, 13, 14, 15], [16], [5, 4, 3]]
ONE_OF_FIVE = torch.tensor([[0.50, 0.20, 0.15, 0.10, 0.05]])
KINDS = ["qwen3", "qwen2_tied", "llama", "gemma2_softcap", "cohere_multiplies", "granite_divides"]


def sample(
    lm: LM,
    prompts: list[list[int]] = PROMPTS,
    behavior: Behavior = PLAIN,
    *,
    max_tokens: int = 12,
    decode_rows: int = 64,
    seed: int = 0,
) -> Rollouts:
    rows_B = torch.arange(len(prompts))
    engine = TorchEngine(max_tokens, decode_rows)
    generator = torch.Generator().manual_seed(seed)
    return engine.sample(lm, prompts, behavior=behavior, group_B=rows_B // 2, uid_B=rows_B + 100, generator=generator)


def stopping_often(lm: LM) -> LM:
    return replace(lm, stop_ids=frozenset({1, 5, 8, 12}))


def responses(rollouts: Rollouts) -> list[list[int]]:
    return [ids_T[on_T].tolist() for ids_T, on_T in zip(rollouts.response_BT, rollouts.mask_BT)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("behavior", [PLAIN, Behavior(temperature=0.7, top_p=0.9)], ids=["plain", "filtered"])
def test_log_probs_and_entropies_equal_a_teacher_forced_pass(kind: str, behavior: Behavior) -> None:
    lm = stopping_often(make(kind))
    rollouts = sample(lm, behavior=behavior, decode_rows=3)
    mask_BT = rollouts.mask_BT
    assert len(set(rollouts.length_B.tolist())) > 1  # rows that finish at different tokens
    with torch.no_grad():
        states = lm.states(rollouts)
    seen = measure(frozenset({LOGP_STUDENT, ENTROPY_STUDENT}), rollouts.response_BT[mask_BT], states, None, chunk=8)
    torch.testing.assert_close(rollouts.logp_BT[mask_BT], seen[LOGP_STUDENT], atol=1e-4, rtol=0)
    torch.testing.assert_close(rollouts.entropy_BT[mask_BT], seen[ENTROPY_STUDENT], atol=1e-4, rtol=0)
    behavior_NV = filtered(states.head.logits(states.hidden_NH), behavior)
    expected_N = behavior_NV.gather(-1, rollouts.response_BT[mask_BT][:, None])[:, 0]
    torch.testing.assert_close(rollouts.behavior_logp_BT[mask_BT], expected_N, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("behavior", [Behavior(temperature=1e-4), Behavior(top_k=1)], ids=["cold", "top_1"])
def test_greedy_sampling_equals_generate(kind: str, behavior: Behavior) -> None:
    lm = make(kind, seed=2)
    ours = responses(sample(lm, behavior=behavior))
    for prompt, response in zip(PROMPTS, ours):
        out_1L = lm.module.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)  # pyright: ignore
        assert response == out_1L[0, len(prompt) :].tolist()


@pytest.mark.parametrize("decode_rows", [1, 2, 3])
def test_batching_changes_nothing(decode_rows: int) -> None:
    lm = make()
    together, split = sample(lm), sample(lm, decode_rows=decode_rows)
    for name in ("ids_BL", "attention_BL", "source_BT", "stopped_B", "uid_B", "group_B"):
        assert torch.equal(getattr(together, name), getattr(split, name)), name
    for name in ("behavior_logp_BT", "logp_BT", "entropy_BT"):
        torch.testing.assert_close(
            getattr(together, name), getattr(split, name), atol=1e-5, rtol=0, equal_nan=True, msg=name
        )


def test_a_longer_neighbour_and_its_padding_change_nothing() -> None:
    lm = make()
    alone = sample(lm, PROMPTS[:2])
    padded = sample(lm, [*PROMPTS[:2], list(range(3, 20)) * 2])
    assert responses(padded)[:2] == responses(alone)


def test_rows_come_back_in_the_order_given_with_all_that_is_known() -> None:
    lm = make()
    rollouts = sample(lm)
    for b, prompt in enumerate(PROMPTS):
        assert rollouts.ids_BL[b][rollouts.attention_BL[b]].tolist() == prompt + responses(rollouts)[b]
    ends = [ids[-1] == 1 for ids in responses(rollouts)]
    assert rollouts.stopped_B.tolist() == ends and any(ends) and not all(ends)
    assert all(1 not in ids[:-1] for ids in responses(rollouts))
    assert [len(ids) for ids, end in zip(responses(rollouts), ends) if not end] == [12] * ends.count(False)
    assert torch.equal(rollouts.mask_BT, rollouts.source_BT == Source.STUDENT)
    for value_BT in (rollouts.behavior_logp_BT, rollouts.logp_BT, rollouts.entropy_BT):
        assert torch.equal(value_BT.isnan(), ~rollouts.mask_BT)
    assert rollouts.reward_B.isnan().all()
    assert (rollouts.uid_B.tolist(), rollouts.group_B.tolist()) == (
        [100, 101, 102, 103, 104, 105, 106],
        [0, 0, 1, 1, 2, 2, 3],
    )


def test_the_same_generator_state_gives_the_same_rollouts_and_moves_on() -> None:
    lm = make()
    assert responses(sample(lm)) == responses(sample(lm))
    assert responses(sample(lm)) != responses(sample(lm, seed=1))
    rows_B, generator = torch.arange(1), torch.Generator().manual_seed(0)
    TorchEngine(5, 64).sample(lm, [[3]], behavior=PLAIN, group_B=rows_B, uid_B=rows_B, generator=generator)
    expected = torch.Generator().manual_seed(0)
    torch.rand((1, 5), generator=expected, dtype=torch.float64)
    assert torch.equal(generator.get_state(), expected.get_state())


def test_finished_rows_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = stopping_often(make())
    seen: list[tuple[int, int]] = []
    forward = lm.body.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(lm.body, "forward", counting)
    rollouts = sample(lm, PROMPTS * 8, max_tokens=40)
    rows = [r for r, _ in seen]
    assert seen[0] == (7, 5), "each prompt is read once for its eight rows"
    assert all(columns == 1 for _, columns in seen[1:])
    assert len(seen) == rollouts.length_B.max()  # it ends with the last row
    running = [(rollouts.length_B > t).sum().item() for t in range(len(seen))]
    assert all(alive <= r <= alive / 0.75 + 1 for r, alive in zip(rows[1:], running[1:]))
    assert rows[-1] < 10


def test_only_the_last_position_is_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make()

    def refuse(*_: Any) -> None:
        raise AssertionError("the module's own head was called")

    monkeypatch.setattr(lm.module.lm_head, "forward", refuse)
    sample(lm)


def test_dropout_is_off_while_sampling_and_back_on_afterwards() -> None:
    lm = make(attention_dropout=0.9)
    expected = responses(sample(lm))
    lm.module.train()
    assert responses(sample(lm)) == expected
    assert lm.module.training


def test_no_gradient_is_recorded() -> None:
    rollouts = sample(make())
    assert not rollouts.logp_BT.requires_grad and not rollouts.entropy_BT.requires_grad


def test_suppressed_ids_never_appear() -> None:
    lm = make()
    everything = {i for ids in responses(sample(lm, PROMPTS * 5)) for i in ids}
    banned = (1, *sorted(everything - {1})[:8])
    rollouts = sample(lm, PROMPTS * 5, Behavior(suppressed=banned))
    assert everything & set(banned)
    assert not {i for ids in responses(rollouts) for i in ids} & set(banned)
    assert not rollouts.stopped_B.any()  # the stop id is suppressed


def test_ids_beyond_the_shared_vocabulary_are_never_sampled() -> None:
    lm = replace(make("llama"), vocabulary=4)
    with torch.no_grad():
        lm.module.lm_head.weight.zero_()  # uniform over 4 ids
    rollouts = sample(lm, PROMPTS * 5)
    assert {i for ids in responses(rollouts) for i in ids} == {0, 1, 2, 3}
    torch.testing.assert_close(
        rollouts.logp_BT[rollouts.mask_BT], torch.full((int(rollouts.length_B.sum()),), -log(4)), atol=1e-6, rtol=0
    )


def test_frequencies_are_the_probabilities() -> None:
    uniform_R = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids_R = draw(ONE_OF_FIVE.log().expand(20_000, -1), uniform_R)
    counts_V = torch.bincount(ids_R, minlength=5)
    assert chisquare(counts_V.numpy(), (ONE_OF_FIVE[0].double() * 20_000).numpy()).pvalue > 0.01


def test_draw_is_the_inverse_of_the_distribution_function() -> None:
    logp_RV = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).log().expand(5, -1)
    uniform_R = torch.tensor([0.0, 0.2499, 0.2501, 0.9, 1 - 2**-53], dtype=torch.float64)
    assert draw(logp_RV, uniform_R).tolist() == [1, 1, 3, 3, 3]  # never an id without mass, at either end


@pytest.mark.parametrize(
    ("behavior", "expected"),
    [
        (Behavior(), [0.50, 0.20, 0.15, 0.10, 0.05]),
        (Behavior(top_k=2), [5 / 7, 2 / 7, 0, 0, 0]),
        (Behavior(top_k=9), [0.50, 0.20, 0.15, 0.10, 0.05]),
        (Behavior(top_p=0.6), [5 / 7, 2 / 7, 0, 0, 0]),  # .5 is not enough, .7 is
        (Behavior(top_p=0.01), [1.0, 0, 0, 0, 0]),  # the likeliest always stays
        (Behavior(temperature=0.5), [100 / 130, 16 / 130, 9 / 130, 4 / 130, 1 / 130]),  # p squared
        (Behavior(top_k=3, top_p=0.75), [5 / 7, 2 / 7, 0, 0, 0]),  # of .85 left, .5 and .2 are .82
        (Behavior(suppressed=(0, 2)), [0, 4 / 7, 0, 2 / 7, 1 / 7]),
        (Behavior(suppressed=(0,), top_k=1), [0, 1.0, 0, 0, 0]),
    ],
)
def test_filters_by_hand(behavior: Behavior, expected: list[float]) -> None:
    logits_RV = ONE_OF_FIVE.log() + 3.0
    before_RV = logits_RV.clone()
    torch.testing.assert_close(filtered(logits_RV, behavior).exp(), torch.tensor([expected]), atol=1e-6, rtol=0)
    assert torch.equal(logits_RV, before_RV)


def test_a_sliding_window_is_kept() -> None:
    lm = make("gemma2_softcap", sliding_window=4)
    rollouts = sample(lm)
    with torch.no_grad():
        states = lm.states(rollouts)
    seen = measure(frozenset({LOGP_STUDENT}), rollouts.response_BT[rollouts.mask_BT], states, None, chunk=64)
    torch.testing.assert_close(rollouts.logp_BT[rollouts.mask_BT], seen[LOGP_STUDENT], atol=1e-4, rtol=0)
    assert responses(rollouts) != responses(sample(make("gemma2_softcap")))  # and it matters


def test_what_cannot_be_decoded_is_refused() -> None:
    lm = make()
    with pytest.raises(ValueError, match="at least one token"):
        sample(lm, [[3], []])
    with pytest.raises(ValueError, match="prompt of 5 tokens and a response limit of 60 exceed the 64 positions"):
        sample(lm, max_tokens=60)
    lm.module.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="layers of kind linear_attention"):
        sample(lm)
