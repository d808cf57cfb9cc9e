"""Makes the embedded lab's models by supervised learning: a sloppy student and two teachers that know the task.

    python -m opd_lab.lab_models FOLDER        (or: opd-lab make-lab-models FOLDER)

The student can calculate but slips: it learnt the task in its own style of connectives and then, for a few steps, from
solutions full of slips. On-policy distillation has to bring back what it knows, so methods separate within minutes; an
undertrained student would have to be taught arithmetic first. `teacher` is larger and of another lineage.
`teacher_same_shape` is the student's clean checkpoint trained on, for methods that compare hidden states one to one.
"""

import argparse
import copy
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd_lab.data import arithmetic
from opd_lab.data.arithmetic import STUDENT_STYLE, TEACHER_STYLE, Style

SPECIAL_TOKENS = ("<pad>", "<end>", "<user>", "<assistant>")
PAD, END, USER, ASSISTANT = range(len(SPECIAL_TOKENS))  # their ids
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}{{ '<user> ' + message.content + ' ' }}"
    "{%- elif message.role == 'assistant' -%}{{ '<assistant> ' + message.content + ' <end> ' }}"
    "{%- else -%}{{ raise_exception('the lab knows the roles user and assistant, got ' + message.role) }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<assistant> ' }}{%- endif -%}"
)
OPERATIONS = (2, 3)
TRAINING_PROBLEMS = 20_000
BATCH = 64
MAX_NEW_TOKENS = 48

Progress = Callable[[str], None]
Model = Any  # a Qwen3ForCausalLM; transformers' types refuse its own `generate`


@dataclass(frozen=True)
class Stage:
    """Supervised learning: AdamW; the learning rate rises over the first twentieth of the steps, then falls to zero."""

    steps: int
    lr: float
    style: Style
    seed: int


@dataclass(frozen=True)
class Plan:
    """A model's shape, the seed of its first weights, and the stages it goes through."""

    layers: int
    width: int
    seed: int
    stages: tuple[Stage, ...]


CLEAN = Stage(1500, 3e-3, STUDENT_STYLE, seed=1)
SLOPPY = Stage(200, 1e-3, replace(STUDENT_STYLE, slip=0.3), seed=2)
CONVERGED = Stage(1000, 3e-3, TEACHER_STYLE, seed=3)
RECIPE = {
    "student": Plan(2, 64, 0, (CLEAN, SLOPPY)),
    "teacher_same_shape": Plan(2, 64, 0, (CLEAN, CONVERGED)),
    "teacher": Plan(3, 96, 1, (Stage(2000, 3e-3, TEACHER_STYLE, seed=4),)),
}


def make_lab_models(
    folder: str | Path, *, recipe: dict[str, Plan] = RECIPE, measured: int = 1000, progress: Progress = print
) -> dict[str, Any]:
    """Trains every model of the recipe into a folder of its own, measures it on `measured` test problems per length of
    chain, and writes and returns the card. A stage that two models share is trained once."""
    folder, tokenizer = Path(folder), lab_tokenizer()
    made: dict[Plan, Model] = {}
    card: dict[str, Any] = {"problems_measured": measured, "temperature": 1.0, "models": {}}
    for name, plan in recipe.items():
        model = made.setdefault(replace(plan, stages=()), new_model(plan, tokenizer))
        for done, stage in enumerate(plan.stages, start=1):
            so_far = replace(plan, stages=plan.stages[:done])
            if so_far not in made:
                progress(f"{name}: stage {done} of {len(plan.stages)}")
                made[so_far] = train(copy.deepcopy(model), tokenizer, stage, progress)
            model = made[so_far]
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        card["models"][name] = {
            "plan": asdict(plan),
            "parameters": model.num_parameters(),
            "sha256": hashlib.sha256((folder / name / "model.safetensors").read_bytes()).hexdigest(),
            "accuracy": {str(n): accuracy(model, tokenizer, n, measured, seed=0) for n in OPERATIONS},
        }
        progress(f"{name}: sampled accuracy {card['models'][name]['accuracy']}")
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    (folder / "README.md").write_text(model_card(card))
    return card


def lab_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the task, 0..99 included. It refuses any other word: the models know none."""
    words = (*SPECIAL_TOKENS, *arithmetic.WORDS)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[PAD],
        eos_token=SPECIAL_TOKENS[END],
        additional_special_tokens=[SPECIAL_TOKENS[USER], SPECIAL_TOKENS[ASSISTANT]],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def new_model(plan: Plan, tokenizer: PreTrainedTokenizerFast) -> Model:
    """Random weights, except that each number begins with its place on the clocks of 100, 50, 25, 20, 10, 5, 4 and 2
    hours, so that the modulus need not be discovered first."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=plan.width,
        intermediate_size=2 * plan.width,
        num_hidden_layers=plan.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=plan.width // 4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(plan.seed)
        model = Qwen3ForCausalLM(config)
        hours = torch.tensor([hours for hours in range(2, arithmetic.MODULUS + 1) if arithmetic.MODULUS % hours == 0])
        angles = 2 * math.pi * torch.arange(arithmetic.MODULUS)[:, None] / hours
        clocks = torch.cat([angles.cos(), angles.sin()], dim=1)
        numbers = tokenizer.convert_tokens_to_ids([str(number) for number in range(arithmetic.MODULUS)])
        model.model.embed_tokens.weight[numbers, : clocks.shape[1]] += 0.1 * clocks
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS,
        pad_token_id=PAD, eos_token_id=END,
    )  # fmt: skip
    return model


def train(model: Model, tokenizer: PreTrainedTokenizerFast, stage: Stage, progress: Progress) -> Model:
    """Trains the model in place on worked solutions, the response tokens only, and returns it."""
    problems = arithmetic.problems("train", OPERATIONS, TRAINING_PROBLEMS, seed=0)
    generator = Generator().manual_seed(stage.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr, weight_decay=0.01)
    rising = max(1, stage.steps // 20)
    model.train()
    for step in range(stage.steps):
        chosen = torch.randint(len(problems), (BATCH,), generator=generator).tolist()
        solutions = [arithmetic.solution(problems[i], stage.style, generator) for i in chosen]
        chats = [_chat(problems[i].prompt, text) for i, text in zip(chosen, solutions)]
        encoded: Any = tokenizer.apply_chat_template(
            chats, return_tensors="pt", padding=True, tokenizer_kwargs={"padding_side": "right"}
        )
        ids_BT: Tensor = encoded["input_ids"]
        labels_BT = ids_BT[:, 1:]
        response_BT = ((ids_BT == ASSISTANT).cumsum(1)[:, :-1] > 0) & (labels_BT != PAD)
        loss = cross_entropy(model(ids_BT).logits[:, :-1][response_BT], labels_BT[response_BT])
        optimizer.param_groups[0]["lr"] = stage.lr * min((step + 1) / rising, (stage.steps - step) / stage.steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == stage.steps - 1:
            progress(f"  step {step:4d}  loss {loss.item():.4f} nats per token")
    return model.eval()


@torch.no_grad()
def accuracy(model: Model, tokenizer: PreTrainedTokenizerFast, operations: int, count: int, seed: int) -> float:
    """Share of `count` test problems answered rightly by one response each, sampled at temperature 1."""
    problems = arithmetic.problems("test", (operations,), count, seed)
    prompts: Any = tokenizer.apply_chat_template(
        [_chat(problem.prompt) for problem in problems],
        add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ids_BT = model.generate(**prompts)
    responses = tokenizer.batch_decode(ids_BT[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(arithmetic.grade(text, problem.answer) for text, problem in zip(responses, problems)) / count


def _chat(question: str, *answer: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), (question, *answer))]


def model_card(card: dict[str, Any]) -> str:
    """The card as a page."""
    rows, plans = [], []
    for name, model in card["models"].items():
        plan, accuracies = model["plan"], " | ".join(f"{share:.3f}" for share in model["accuracy"].values())
        shape = f"{plan['layers']} x {plan['width']}"
        rows.append(f"| `{name}` | {shape} | {model['parameters']:,} | {accuracies} | `{model['sha256']}` |")
        for stage in plan["stages"]:
            weights = ", ".join(f"{x:g}" for x in stage["style"]["connectives"])
            steps, slip = f"{stage['steps']} | {stage['lr']:g}", f"{stage['style']['slip']:g}"
            plans.append(f"| `{name}` | {steps} | {weights} | {slip} | {stage['seed']} |")
    words, headings = ", ".join(arithmetic.CONNECTIVES), " | ".join(card["models"]["student"]["accuracy"])
    return PAGE.format(
        rows="\n".join(rows), plans="\n".join(plans), words=words, headings=headings, batch=BATCH, **card
    )


PAGE = """# The embedded lab's models

Small Qwen3 models (float32, safetensors) for chains of arithmetic modulo 100 (`opd_lab/data/arithmetic.py`): a skilled
but sloppy student and teachers that know the task, for trying methods of on-policy distillation. `opd-lab
make-lab-models FOLDER` trains and measures them and writes this page. The tokenizer refuses words of other tasks.

| model | layers x width | parameters | accuracy at operations {headings} | sha256 of `model.safetensors` |
|---|---|---|---|---|---|
{rows}

Accuracy: one response to each of {problems_measured} test problems, sampled at temperature {temperature:g}.

Recipe: batches of {batch} worked solutions, loss on the response only, AdamW, the learning rate rises for a twentieth
of the steps, then falls to zero. A slip replaces a step's result by a random number, from which the chain goes on. A
stage that two models share is trained once: `teacher_same_shape` is of the student's lineage.

| model | steps | learning rate | weights of {words} | slip probability | seed |
|---|---|---|---|---|---|
{plans}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded lab's models.")
    parser.add_argument("folder", type=Path, help="where the models, card.json and README.md go")
    make_lab_models(parser.parse_args().folder)


if __name__ == "__main__":
    main()
