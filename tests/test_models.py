"""Loading, the head, hidden states, and what makes two models a pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3ForCausalLM

from opd_lab.models import evaluating, load, save, wrap
from opd_lab.pairing import match
from opd_lab.settings import ModelSettings
from tests.tiny import HEADS, WORDS, make, rollouts, tokenizer


def settings(path: Path | str, dtype: str = "float32") -> ModelSettings:
    return ModelSettings(path=str(path), dtype=dtype, trust_remote_code=False)


RAGGED = ([[3, 4, 5, 6], [7]], [[8, 1], [9, 10, 11]])


@pytest.mark.parametrize("kind", HEADS)
def test_states_and_head_are_the_modules_own_logits_at_the_predicting_positions(kind: str) -> None:
    lm = make(kind)
    states = lm.states(rollouts(*RAGGED))
    # each rollout alone, without padding; token t of the response is predicted one column earlier
    rows = []
    for prompt, response in zip(*RAGGED):
        logits_LV = lm.module(input_ids=torch.tensor([prompt + response])).logits[0]
        rows.append(logits_LV[len(prompt) - 1 : -1])
    torch.testing.assert_close(states.head.logits(states.hidden_NH), torch.cat(rows), atol=1e-5, rtol=1e-4)


def test_scales_and_soft_caps_are_found() -> None:
    found = {kind: (make(kind).head.scale, make(kind).head.softcap) for kind in HEADS}
    assert found["gemma2_softcap"] == (1.0, 0.7)
    assert found["cohere_multiplies"] == (0.25, None)
    assert found["granite_divides"] == (0.125, None)
    assert found["qwen3"] == found["qwen2_tied"] == found["llama"] == (1.0, None)


class OwnHead(Qwen3ForCausalLM):
    """A head that no config tells of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.sin()
        return out


def test_an_unknown_head_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"LM head of OwnHead .* not supported"):
        wrap(OwnHead(HEADS["qwen3"][1]), tokenizer(), name="student", path="x")


def test_padding_changes_no_state() -> None:
    lm = make()
    few, many = lm.states(rollouts(*RAGGED)), lm.states(rollouts(*RAGGED, extra=5))
    torch.testing.assert_close(few.hidden_NH, many.hidden_NH, atol=1e-6, rtol=0)


def test_states_never_call_the_head_and_carry_gradient_only_where_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make("llama")

    def refuse(*_: Any) -> None:
        raise AssertionError("the LM head was called")

    monkeypatch.setattr(lm.module.lm_head, "forward", refuse)
    states = lm.states(rollouts(*RAGGED))
    states.hidden_NH.sum().backward()
    gradients = [p.grad for p in lm.body.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert max(float(g.abs().max()) for g in gradients if g is not None) > 0
    with torch.no_grad():
        assert not lm.states(rollouts(*RAGGED)).hidden_NH.requires_grad
    assert not lm.freeze().states(rollouts(*RAGGED)).hidden_NH.requires_grad


def test_save_and_load_keep_weights_tokenizer_and_stop_ids(tmp_path: Path) -> None:
    lm = make("qwen2_tied")
    save(lm, tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    again = load(settings(tmp_path), device="cpu", name="teacher")
    assert again.digest() == lm.digest()
    assert (again.name, again.stop_ids, again.vocabulary) == ("teacher", frozenset({1}), 24)
    assert again.tokenizer.get_vocab() == lm.tokenizer.get_vocab()
    assert load(settings(tmp_path, "bfloat16"), device="auto", name="teacher").digest() != lm.digest()


def test_the_digest_sees_one_changed_weight() -> None:
    lm = make()
    before = lm.digest()
    with torch.no_grad():
        lm.module.get_input_embeddings().weight[3, 3] += 1e-6
    assert lm.digest() != before


def test_what_cannot_be_loaded_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.student.path = ./nowhere is not a folder"):
        load(settings("./nowhere"), device="cpu", name="student")
    with pytest.raises(ValueError, match=r"model.student.path = lab:nobody is no model of the lab; allowed: "):
        load(settings("lab:nobody"), device="cpu", name="student")
    with pytest.raises(ValueError, match=r"model.student.dtype must be one of float32, bfloat16, float16, got int8"):
        load(settings(tmp_path, "int8"), device="cpu", name="student")
    lm = make()
    save(lm, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(lm.module.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        load(settings(tmp_path), device="cpu", name="student")


def test_a_checkpoint_without_its_head_is_refused(tmp_path: Path) -> None:
    lm = make("llama")
    save(lm, tmp_path)
    weights = {k: v for k, v in lm.module.state_dict().items() if k != "lm_head.weight"}
    lm.module.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"lacks weights of LlamaForCausalLM.*lm_head.weight"):
        load(settings(tmp_path), device="cpu", name="student")


def test_a_tokenizer_larger_than_the_head_is_refused() -> None:
    with pytest.raises(ValueError, match="30 ids, but the LM head has only 24 rows"):
        wrap(make().module, tokenizer([*WORDS, *map(str, range(10))]), name="student", path="x")


def test_evaluating_restores_dropout() -> None:
    module = make().module.train()
    with evaluating(module):
        assert not module.training
    assert module.training


def test_logits_of_unequal_width_are_cut_to_the_shared_ids() -> None:
    student, teacher = make(seed=0), make(seed=1, vocab_size=22)
    student, teacher, notes = match(student, teacher, None, "merged")
    assert (student.vocabulary, teacher.vocabulary) == (20, 20)
    assert notes == [
        "logits have 24 columns (student) and 22 (teacher): "
        "both are cut to the 20 ids of the shared tokenizer, the rest is padding"
    ]
    states = teacher.states(rollouts(*RAGGED))
    whole = wrap(teacher.module, teacher.tokenizer, name="teacher", path="x").states(rollouts(*RAGGED))
    torch.testing.assert_close(
        states.head.logits(states.hidden_NH), whole.head.logits(whole.hidden_NH)[:, :20], atol=0, rtol=0
    )
    assert match(make(seed=0), make(seed=1), None, "merged")[2] == []


def test_other_tokenizers_are_refused_and_the_first_ids_named() -> None:
    other = wrap(make().module, tokenizer([*WORDS[:5], "X", "Y", *WORDS[7:]]), name="teacher", path="x")
    with pytest.raises(ValueError, match=r"got 2 ids that differ .id 5: 'c' and 'X'; id 6: 'd' and 'Y'"):
        match(make(), other, None, "merged")
    special = wrap(make().module, tokenizer(bos_token="a"), name="teacher", path="x")
    with pytest.raises(ValueError, match="agree on special tokens, got these only in one: 3 = a"):
        match(make(), special, None, "merged")


def test_other_chat_templates_are_said() -> None:
    other = make()
    other.tokenizer.chat_template = "{{ messages }}"
    (note,) = match(make(), other, None, "merged")[2]
    assert note.startswith("chat templates differ (student none, teacher ")


def test_texts_leave_out_the_stop_token_and_padding() -> None:
    assert make().texts(rollouts(*RAGGED)) == ["f", "g h i"]


def test_absolute_positions_are_counted_without_padding() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1)
    lm = wrap(GPT2LMHeadModel(config).eval(), tokenizer(), name="student", path="gpt2")
    together = lm.states(rollouts(*RAGGED)).hidden_NH
    alone = [lm.states(rollouts([prompt], [response])).hidden_NH for prompt, response in zip(*RAGGED)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)
    whole = [lm.body(input_ids=torch.tensor([prompt + response])) for prompt, response in zip(*RAGGED)]
    own = [out.last_hidden_state[0, len(prompt) - 1 : -1] for out, prompt in zip(whole, RAGGED[0])]
    torch.testing.assert_close(together, torch.cat(own), atol=1e-6, rtol=0)
