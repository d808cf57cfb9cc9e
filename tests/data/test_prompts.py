"""Files and the embedded lab become rendered prompts; splits are disjoint and fixed; the stream resumes bitwise."""

import json
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from opd_lab.data import arithmetic
from opd_lab.data.grading import rates
from opd_lab.data.prompts import Example, PromptStream, load
from opd_lab.settings import DataSettings

CONF = Path(__file__).parents[2] / "conf/data"
TEMPLATE = (
    "{% for m in messages %}<{{m.role}}>{{m.content}}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PUBLIC = [
    ("gsm8k", "gsm8k_train.jsonl", 7000),
    ("dapo_math", "dapo_math_17k.parquet", 16000),
    ("math500", "math500.jsonl", 290),
]


def settings(config: str, **changes) -> DataSettings:
    return DataSettings(**yaml.safe_load((CONF / f"{config}.yaml").read_text()) | changes)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=bytes_, show_progress=False)
    bpe.train_from_iterator(["start 47 + 38 ? What is the sum of the numbers?", "Please reason step by step."], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=TEMPLATE)


def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def questions(count: int) -> list[dict]:
    return [{"prompt": f"What is {n} + 1?", "answer": n + 1} for n in range(count)]


def texts(examples: list[Example]) -> set[str]:
    return {example.messages[-1]["content"] for example in examples}


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_data_config_names_every_setting_and_nothing_else(path):
    keys = list(yaml.safe_load(path.read_text()))
    assert keys == [field.name for field in fields(DataSettings)]
    assert all("#" in line for line in path.read_text().splitlines() if not line.startswith(("name:", "kind:")))


def test_the_lab_has_disjoint_splits_and_renders_the_chat(tokenizer):
    data = load(settings("lab", problems=50, held_out=20), tokenizer)
    assert (len(data.train), len(data.validation), len(data.test)) == (50, 20, 20)
    assert len({e.id for e in data.train + data.validation + data.test}) == 90
    first = data.train[0]
    assert tokenizer.decode(first.ids) == f"<user>{first.messages[0]['content']}\n<assistant>"
    assert arithmetic.grade(f"so answer {first.answer}", first.answer) == 1.0
    assert data.notes == []


def test_both_shapes_of_prompt_and_all_three_formats_give_the_same_data(tokenizer, tmp_path):
    import pandas

    flat = questions(30)
    nested = [
        {"prompt": [{"role": "user", "content": r["prompt"]}], "reward_model": {"ground_truth": str(r["answer"])}}
        for r in flat
    ]
    (tmp_path / "list.json").write_text(json.dumps(flat))
    pandas.DataFrame(nested).to_parquet(tmp_path / "chat.parquet")
    jsonl = settings("jsonl", name="x", held_out=5, answer_field="answer")
    a = load(replace(jsonl, path=write(tmp_path / "flat.jsonl", flat)), tokenizer)
    b = load(replace(jsonl, path=str(tmp_path / "list.json")), tokenizer)
    dapo = settings("dapo_math", held_out=5, grader="none", path=str(tmp_path / "chat.parquet"))
    c = load(dapo, tokenizer)
    assert a.digest == b.digest == c.digest
    assert a.train == b.train == c.train
    assert {e.answer for e in a.train + a.validation + a.test} == {str(n + 1) for n in range(30)}


def test_gsm8k_records_give_the_number_and_the_instruction_once(tokenizer, tmp_path):
    instruction = settings("gsm8k").instruction
    records = [{"question": f"{n} apples?", "answer": f"2*{n}=<<2*{n}>>\n#### 1,{n:03d}"} for n in range(10)]
    records[0]["question"] += f"\n{instruction}"
    path = write(tmp_path / "train.jsonl", records)
    data = load(settings("gsm8k", path=path, held_out=1, system_prompt="Be brief.", grader="none"), tokenizer)
    for example in data.train + data.validation + data.test:
        number = example.messages[1]["content"].split()[0]
        assert example.answer == f"1,{int(number):03d}"
        assert [m["role"] for m in example.messages] == ["system", "user"]
        assert example.messages[1]["content"] == f"{number} apples?\n{instruction}"
        assert tokenizer.decode(example.ids).startswith("<system>Be brief.\n<user>")


def test_solutions_come_with_their_training_problems(tokenizer, tmp_path):
    records = [{"question": f"{n} apples?", "answer": f" 2*{n}=<<2*{n}>>\n#### {n} "} for n in range(10)]
    path = write(tmp_path / "train.jsonl", records)
    test_path = write(tmp_path / "test.jsonl", [{"question": "11 apples?", "answer": "#### 22", "n": 0}])
    base = settings("gsm8k", path=path, test_path=test_path, held_out=1, grader="none", instruction=None)
    data = load(base, tokenizer)
    assert data.solution is not None and len(data.train) == 9
    for example in data.train:
        n = example.messages[0]["content"].split()[0]
        assert data.solution(example) == f"2*{n}=<<2*{n}>>\n#### {n}"
    unsolved = load(replace(base, solution_field=None), tokenizer)
    assert unsolved.solution is None and unsolved.train == data.train and unsolved.digest != data.digest
    lab = load(settings("lab", problems=5, held_out=1), tokenizer)
    assert lab.solution is not None and lab.train[0].answer is not None
    assert arithmetic.grade(lab.solution(lab.train[0]), lab.train[0].answer) == 1.0


def test_splits_do_not_depend_on_the_order_of_the_file_or_on_the_tokenizer(tokenizer, tmp_path):
    records = questions(40)
    base = settings("jsonl", held_out=8)
    a = load(replace(base, path=write(tmp_path / "a.jsonl", records)), tokenizer)
    b = load(replace(base, path=write(tmp_path / "b.jsonl", records[::-1])), tokenizer)
    assert (a.train, a.validation, a.test) == (b.train, b.validation, b.test)
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    c = load(replace(base, path=str(tmp_path / "a.jsonl")), plain)
    assert texts(a.test) == texts(c.test)
    assert c.notes == ["the student's tokenizer has no chat template: prompts are plain text"]
    assert plain.decode(c.test[0].ids) == c.test[0].messages[0]["content"]


def test_a_repeated_prompt_is_never_on_both_sides(tokenizer, tmp_path):
    records = [*questions(30), *questions(30), {"prompt": "What  is 3 + 1?\n", "answer": 5}]
    path = write(tmp_path / "a.jsonl", records)
    base = settings("jsonl", path=path, held_out=10, answer_field="answer")
    data = load(base, tokenizer)
    sides = [texts(data.train), texts(data.validation), texts(data.test)]
    assert [len(side) for side in sides] == [10, 10, 10]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert data.notes == [
        f"31 of 61 records of {path} repeat a prompt and were left out (1 of them with another answer)"
    ]

    test_path = write(tmp_path / "test.jsonl", questions(4))
    data = load(replace(base, test_path=test_path), tokenizer)
    assert texts(data.test) == {f"What is {n} + 1?" for n in range(4)}
    assert (len(data.train), len(data.validation)) == (16, 10)
    assert "4 prompts of data.path also stand in data.test_path: they are only tested on" in data.notes


def test_long_prompts_are_left_out_and_counted(tokenizer, tmp_path):
    records = [{"prompt": "short " * n} for n in range(1, 21)]
    path = write(tmp_path / "a.jsonl", records)
    lengths = sorted(len(e.ids) for e in load(settings("jsonl", path=path, held_out=0), tokenizer).train)
    data = load(settings("jsonl", path=path, held_out=0, max_prompt_tokens=lengths[12]), tokenizer)
    assert sorted(len(e.ids) for e in data.train) == lengths[:13]
    assert data.notes == [f"7 of 20 train prompts are longer than max_prompt_tokens={lengths[12]} and were left out"]
    with pytest.raises(ValueError, match=f"has at most data.max_prompt_tokens=2 tokens; the shortest has {lengths[0]}"):
        load(settings("jsonl", path=path, held_out=0, max_prompt_tokens=2), tokenizer)


REFUSED = [
    ({"kind": "csv"}, [{"prompt": "a"}], "data.kind must be arithmetic .* or file, got 'csv'"),
    ({"path": None}, [{"prompt": "a"}], "data.path must name a .jsonl, .json or .parquet file, got null"),
    ({"path": "nowhere.jsonl"}, [{"prompt": "a"}], "nowhere.jsonl does not exist"),
    ({"path": "a.csv"}, [{"prompt": "a"}], "end in .jsonl, .json, .parquet, got a.csv"),
    ({}, [], "holds no records"),
    ({"prompt_field": "q.text"}, [{"q": {"body": "a"}, "n": 1}], "prompt_field=q.text names no field .*has q.body, n"),
    ({"answer_field": "answer"}, [{"prompt": "a"}], "data.answer_field=answer names no field of record 0"),
    ({"answer_field": "answer"}, [{"prompt": "a", "answer": [1]}], r"must hold a text or a number, got '\[1\]'"),
    ({"solution_field": "s"}, [{"prompt": "a"}], "data.solution_field=s names no field of record 0"),
    ({"solution_field": "s"}, [{"prompt": "a", "s": " "}], "solution_field=s must hold a text, got ' ' in record 0"),
    (
        {"solution_field": "s"},
        [{"prompt": "a", "s": 7}],
        "must hold a text, got '7' in record 0",
    ),
    ({}, [{"prompt": "a"}, {"prompt": 7}], "must hold a text or chat messages .* got '7' in record 1"),
    ({}, [{"prompt": [{"role": "assistant", "content": "a"}]}], "the last one the user's"),
    ({}, [{"prompt": " \n"}], "the prompt of record 0 .* is empty"),
    ({"held_out": 1}, [{"prompt": "a"}, {"prompt": "b"}], "held_out=1 keeps 2 prompts apart, .* has 2 different ones"),
    ({"grader": "exact"}, [{"prompt": "a"}], "data.grader=exact needs answers, but data.answer_field is null"),
    ({"grader": "magic"}, [{"prompt": "a"}], "must be one of exact, math_verify, none, got 'magic'"),
    (
        {"answer_field": "answer", "answer_pattern": "#### (.+)"},
        [{"prompt": "a", "answer": "#### 1"}, {"prompt": "b", "answer": "2"}],
        "finds no first group in '2', the answer of record 1",
    ),
    (
        {"system_prompt": "Be brief."},
        [{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}],
        "already has a system message; set data.system_prompt to null",
    ),
]


@pytest.mark.parametrize("changes, records, message", REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_what_cannot_be_read_is_refused_by_name(tokenizer, tmp_path, changes, records, message):
    path = write(tmp_path / "a.jsonl", records)
    with pytest.raises(ValueError, match=message):
        load(settings("jsonl", **{"path": path, "held_out": 0} | changes), tokenizer)


def test_broken_lines_are_named(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": ')
    with pytest.raises(ValueError, match=r"line 3 of .*a.jsonl is not valid JSON"):
        load(settings("jsonl", path=str(tmp_path / "a.jsonl")), tokenizer)


def examples(count: int) -> list[Example]:
    return [Example(str(n), ({"role": "user", "content": str(n)},), None, [n]) for n in range(count)]


def test_the_stream_shows_every_prompt_once_an_epoch_in_a_new_order():
    stream = PromptStream(examples(50), seed=0)
    epochs = [[e.id for e in stream.take(50)] for _ in range(3)]
    assert all(sorted(epoch, key=int) == [str(n) for n in range(50)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [e.id for e in PromptStream(examples(50), seed=1).take(50)] not in epochs


@pytest.mark.parametrize("before", [0, 3, 10, 23])
def test_the_stream_goes_on_where_it_was(before):
    stream = PromptStream(examples(10), seed=0)
    stream.take(before)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = PromptStream(examples(10), seed=0)
    resumed.load_state_dict(state)
    assert resumed.take(25) == stream.take(25)
    for other in (
        PromptStream(examples(9), seed=0),
        PromptStream(examples(10), seed=1),
        PromptStream(examples(11)[1:], seed=0),
    ):
        with pytest.raises(ValueError, match="are not those of this run"):
            other.load_state_dict(state)


@pytest.mark.skipif("OPD_LAB_DATA" not in os.environ, reason="OPD_LAB_DATA names no folder with the public data files")
@pytest.mark.parametrize("config, file, least", PUBLIC)
def test_public_data_files_load_and_grade(tokenizer, config, file, least):
    path = str(Path(os.environ["OPD_LAB_DATA"]) / file)
    data = load(settings(config, path=path, max_prompt_tokens=10_000), tokenizer)
    assert len(data.train) >= least and data.grade is not None
    assert rates(data.grade, data.train[:100]) == (1.0, 0.0)
