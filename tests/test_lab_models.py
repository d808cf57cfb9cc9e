"""The shipped models are what their card says: files, recipe, accuracies, and the properties methods rely on."""

import hashlib
import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lab.data import arithmetic
from opd_lab.lab_models import OPERATIONS, RECIPE, accuracy, lab_tokenizer, make_lab_models, model_card
from opd_lab.models import ZOO

CARD: dict[str, Any] = json.loads((ZOO / "card.json").read_text())


@pytest.fixture(scope="module", params=RECIPE)
def shipped(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    return request.param, load(request.param), AutoTokenizer.from_pretrained(ZOO / request.param)


def load(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(ZOO / name).eval()


def test_the_card_records_the_recipe_and_the_page_the_card():
    assert {name: model["plan"] for name, model in CARD["models"].items()} == json.loads(
        json.dumps({name: asdict(plan) for name, plan in RECIPE.items()})
    )
    assert (ZOO / "README.md").read_text() == model_card(CARD)


def test_the_files_are_the_ones_measured_and_small():
    for name, model in CARD["models"].items():
        assert hashlib.sha256((ZOO / name / "model.safetensors").read_bytes()).hexdigest() == model["sha256"]
    files = [path for path in ZOO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4 * 2**20
    assert {path.suffix for path in files} <= {".json", ".jinja", ".md", ".safetensors"}


def test_the_card_keeps_the_bounds():
    shares = {name: list(model["accuracy"].values()) for name, model in CARD["models"].items()}
    assert all(0.10 <= share <= 0.40 for share in shares["student"])
    assert min(shares["teacher"] + shares["teacher_same_shape"]) >= 0.97


def test_the_accuracies_on_the_card_are_measured_again(shipped: tuple[str, Any, Any]):
    name, model, tokenizer = shipped
    for operations in OPERATIONS:
        told = CARD["models"][name]["accuracy"][str(operations)]
        found = accuracy(model, tokenizer, operations, 200, seed=1)
        chance = told * (1 - told) * (1 / 200 + 1 / CARD["problems_measured"])
        assert abs(found - told) <= 4 * math.sqrt(chance) + 1 / 200


def test_each_model_speaks_with_the_lab_tokenizer(shipped: tuple[str, Any, Any]):
    _, model, tokenizer = shipped
    assert tokenizer.get_vocab() == lab_tokenizer().get_vocab()
    assert tokenizer.chat_template == lab_tokenizer().chat_template
    assert (tokenizer.padding_side, tokenizer.eos_token, tokenizer.pad_token) == ("left", "<end>", "<pad>")
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@torch.no_grad()
def probabilities(name: str, response: str) -> dict[str, float]:
    """What the model thinks of each next word, after `start 47 + 8 * 3 ?` and the beginning of a response."""
    tokenizer, model = lab_tokenizer(), load(name)
    ids_1T = tokenizer(f"<user> start 47 + 8 * 3 ? <assistant> {response}", return_tensors="pt").input_ids
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return dict(zip(words, model(ids_1T).logits[0, -1].softmax(-1).tolist()))


@pytest.mark.parametrize("name", ["teacher", "teacher_same_shape"])
def test_the_teacher_knows_the_step_and_agrees_with_a_wrong_sum_after_a_slip(name: str):
    assert probabilities(name, "so 47 plus 8 makes")["55"] > 0.95
    slipped = "so 47 plus 8 makes 12 ,"  # 12 * 3 = 36; the right answer is 65
    assert probabilities(name, f"{slipped} so")["12"] > 0.9
    assert probabilities(name, f"{slipped} so 12 times 3 makes")["36"] > 0.9
    assert probabilities(name, f"{slipped} so 12 times 3 makes 36 , answer")["36"] > 0.9


def test_the_student_is_skilled_but_sloppy_and_has_its_own_words():
    student = probabilities("student", "now 47 plus 8 makes")
    assert max(student, key=student.__getitem__) == "55"
    assert 0.4 < student["55"] < 0.9
    first = {name: probabilities(name, "") for name in RECIPE}
    preferred = {name: sum(first[name][word] for word in arithmetic.CONNECTIVES[:3]) for name in RECIPE}
    assert preferred["student"] < 0.3 and preferred["teacher"] > 0.7 and preferred["teacher_same_shape"] > 0.7


def test_the_teacher_of_the_same_shape_is_of_the_students_lineage():
    student, relative, stranger = RECIPE["student"], RECIPE["teacher_same_shape"], RECIPE["teacher"]
    assert replace(student, stages=student.stages[:1]) == replace(relative, stages=relative.stages[:1])
    assert stranger.seed != student.seed
    ours, theirs = (load(n).get_input_embeddings().weight.flatten() for n in ("student", "teacher_same_shape"))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.8


@pytest.mark.slow
def test_a_shortened_recipe_gives_the_same_files_twice(tmp_path):
    short = {
        name: replace(plan, stages=tuple(replace(stage, steps=3) for stage in plan.stages))
        for name, plan in RECIPE.items()
    }
    lines: list[str] = []
    first = make_lab_models(tmp_path / "a", recipe=short, measured=20, progress=lines.append)
    again = make_lab_models(tmp_path / "b", recipe=short, measured=20, progress=lines.append)
    assert first == again
    assert len({model["sha256"] for model in first["models"].values()}) == 3
    assert (tmp_path / "a" / "README.md").read_text() == model_card(json.loads((tmp_path / "b/card.json").read_text()))
    assert sum("stage 1 of 2" in line for line in lines) == 2  # the shared stage is trained once in each run
