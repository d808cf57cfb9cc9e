"""Any local checkpoint on any file of prompts: a small random Qwen3 whose tokenizer was trained on that very text."""

import json
import os
from pathlib import Path

import pytest
import torch
from lab_run import run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd_lab.tracking import read

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHORT = ["model=pair", "evaluate.max_tokens=8", "rollout.max_tokens=8", "data.max_prompt_tokens=300", "steps=2"]
GSM8K = [
    {"question": f"Ann has {a} pears and buys {b} more. How many?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"}
    for a in range(3, 9)
    for b in range(2, 9)
]


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=TEMPLATE,
        padding_side="left",
    )


def pair(folder: Path, texts: list[str]) -> list[str]:
    """A student and a wider teacher on disk, as overrides."""
    tokenizer = tokenizer_of(texts)
    overrides = []
    for seed, (name, width) in enumerate((("student", 32), ("teacher", 48))):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=width // 4,
            max_position_embeddings=1024,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        Qwen3ForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        overrides.append(f"model.{name}.path={folder / name}")
    return overrides


def trained(folder: Path) -> bool:
    kl = read.metrics(folder)
    kl = kl[kl["name"] == "kl/reverse_mean_nats"]["value"]
    return len(kl) == 2 and bool((kl > 0).all())


def test_questions_with_rationales_and_a_number(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in GSM8K))
    models = pair(tmp_path, [row["question"] + row["answer"] for row in GSM8K])
    result = run(tmp_path, "data=gsm8k", f"data.path={path}", "data.held_out=8", *SHORT, *models)
    assert trained(result.folder)
    assert 0 <= result.objective < 0.5, "a random model hits a digit now and then"


def test_chat_messages_in_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {a} times {b}?"}],
            "reward_model": {"ground_truth": str(a * b), "style": "rule"},
            "extra_info": {"index": f"{a}-{b}"},
        }
        for a in range(2, 9)
        for b in range(2, 8)
    ]
    path = tmp_path / "dapo.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    models = pair(tmp_path, [row["prompt"][0]["content"] for row in rows])
    result = run(tmp_path, "data=dapo_math", f"data.path={path}", "data.held_out=8", *SHORT, *models)
    assert trained(result.folder)


@pytest.mark.slow
@pytest.mark.skipif("OPD_LAB_DATA" not in os.environ, reason="OPD_LAB_DATA names no folder with the public files")
@pytest.mark.parametrize(("data", "file"), [("gsm8k", "gsm8k_train.jsonl"), ("dapo_math", "dapo_math_17k.parquet")])
def test_the_public_files(tmp_path, data, file):
    path = Path(os.environ["OPD_LAB_DATA"]) / file
    models = pair(tmp_path, [row["question"] for row in GSM8K] + ["Solve the following math problem step by step."])
    result = run(tmp_path, f"data={data}", f"data.path={path}", "data.held_out=16", *SHORT, *models)
    assert trained(result.folder)
