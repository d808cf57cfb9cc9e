"""Whole runs on the data's own solutions: the loss by hand, what they cost, one seed, resuming, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lab_run import killed_after, run, settings
from torch.nn.functional import cross_entropy

from opd_lab import train
from opd_lab.data import arithmetic
from opd_lab.doctor import WARNING, compatible, first_step
from opd_lab.parts import facts_of
from opd_lab.run import load_parts
from opd_lab.tracking import read
from opd_lab.tracking.run_folder import read_table, volatile

SMALL = ("evaluate.problems=1", "evaluate.test_problems=1", "evaluate.samples=2", "evaluate.every=0")
SFT = (*SMALL, "method=sft_dataset", "rollout.per_prompt=1")


def table_of(folder: Path) -> pd.DataFrame:
    table = read.metrics(folder).pivot(index="step", columns="name", values="value")
    return table.filter(items=[name for name in table if not volatile(name)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("sft"), *SFT, name="sft_dataset").folder


def trainer_of(folder: Path, *overrides: str) -> train.Trainer:
    chosen = settings(folder, *overrides)
    return train.Trainer(chosen, load_parts(chosen, lambda line: None), None, folder)  # type: ignore[arg-type]


def test_the_loss_is_that_of_the_words_of_the_solutions(tmp_path, finished):
    """As anybody would write it: chats with their answers, one at a time, the mean of -log p over all answer tokens."""
    trainer = trainer_of(tmp_path, *SFT)
    student, losses = trainer.parts.student, []
    for example in trainer.stream.take(4):
        question = example.messages[0]["content"]
        assert arithmetic.grade(arithmetic.worked(question), str(example.answer)) == 1.0
        text = f"<user> {question} <assistant> {arithmetic.worked(question)} <end>"
        ids_L = torch.tensor(student.tokenizer(text, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logits_LV = student.module(input_ids=ids_L[None]).logits[0]
        begin = len(example.ids)
        losses.append(cross_entropy(logits_LV[begin - 1 : -1], ids_L[begin:], reduction="none"))
    first = table_of(finished).loc[1]
    assert first["loss/opd_value"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert first["cost/dataset_tokens"] == sum(map(len, losses))


def test_solutions_cost_no_sampling_and_evaluations_are_the_students_own(tmp_path, finished):
    table = table_of(finished)
    steps = table.loc[1:]
    assert (steps["cost/dataset_tokens"] == steps["cost/generated_tokens"]).all()
    assert (steps[["cost/teacher_generated_tokens", "cost/teacher_decoded_tokens"]] == 0).all(axis=None)
    assert (steps["rollout/reward_mean_fraction"] == 1).all() and (steps["rollout/truncated_fraction"] == 0).all()
    assert {source for row in read_table(finished, "rollouts").to_pylist() for source in row["source"]} == {"dataset"}
    plain = table_of(run(tmp_path, *SMALL, "rollout.per_prompt=1", name="opd").folder)
    evaluated = [name for name in table if name.startswith(("eval/", "probe/"))]
    assert evaluated and table.loc[0, evaluated].equals(plain.loc[0, evaluated])
    assert (plain.loc[1:, "cost/dataset_tokens"] == 0).all()


def test_one_seed_one_batch_and_a_solution_belongs_to_its_problem_for_all_time(tmp_path):
    def batch(*overrides: str) -> Any:
        return trainer_of(tmp_path, *SMALL, "method=sft_dataset", *overrides).collect()[0].rollouts

    one, again, other = batch(), batch(), batch("seed=1")
    assert torch.equal(one.ids_BL, again.ids_BL) and torch.equal(one.source_BT, again.source_BT)
    assert torch.equal(one.ids_BL[::2], one.ids_BL[1::2])  # two of each problem
    assert one.ids_BL.tolist() != other.ids_BL.tolist()
    question = "start 47 + 8 * 3 ?"
    assert arithmetic.worked(question) == arithmetic.worked(question)
    assert arithmetic.first_slip(question, arithmetic.worked(question)) is None
    openers = [arithmetic.worked(f"start {n} + 8 ?").split()[0] for n in range(100)]
    assert 20 < openers.count("so") < 60  # .4 in the teacher's style, .03 in the student's


def test_a_killed_run_ends_with_the_same_bits(tmp_path, finished):
    with killed_after(2):
        run(tmp_path, *SFT, name="sft_dataset")
    again = run(tmp_path, *SFT, name="sft_dataset").folder
    pd.testing.assert_frame_equal(table_of(again), table_of(finished), check_exact=True)
    weights = "student/model.safetensors"
    assert (again / weights).read_bytes() == (finished / weights).read_bytes()


def test_gkd_takes_from_the_data_what_the_student_does_not_write(tmp_path):
    folder = run(tmp_path, *SMALL, "method=gkd_dataset", name="gkd_dataset").folder
    steps, share = table_of(folder).loc[1:], table_of(folder).loc[1:, "gkd/on_policy_fraction"].tolist()
    assert set(share) <= {0, 0.25, 0.5, 0.75, 1} and len(set(share)) > 1
    gained = steps["cost/dataset_tokens"].diff().fillna(steps["cost/dataset_tokens"]).tolist()
    assert [one == 1 for one in share] == [tokens == 0 for tokens in gained]
    assert (steps["cost/teacher_generated_tokens"] == 0).all()


def write(path: Path, **more: str) -> str:
    records = [{"prompt": f"start {n} + {k} ?", "answer": str(n + k), **more} for n in range(40) for k in (2, 3)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_data_without_solutions_are_refused_before_the_first_token(tmp_path):
    of_a_file = ("data=jsonl", "data.held_out=4", "data.max_prompt_tokens=64")
    words = (
        r"SFT trains on the data's own solutions, data=jsonl has none; name the field that holds them in "
        r"data\.solution_field, or method\.source=teacher"
    )
    bare = (*of_a_file, f"data.path={write(tmp_path / 'bare.jsonl')}")
    with pytest.raises(ValueError, match=words):
        run(tmp_path, *SFT, *bare, name="sft_dataset")
    with pytest.raises(ValueError, match=r"GKD trains on the data's own .*, or method\.lambda_=1"):
        run(tmp_path, *SMALL, "method=gkd_dataset", *bare, name="gkd_dataset")
    with pytest.raises(ValueError, match=r"data.solution_field=worked names no field of record 0"):
        run(tmp_path, *SFT, *bare, "data.solution_field=worked", name="sft_dataset")
    assert not list(tmp_path.glob("*/*/journal.jsonl"))
    worked = write(tmp_path / "worked.jsonl", worked=" so 1 plus 2 makes 3 , answer 3\n")
    trainer = trainer_of(tmp_path, *SFT, *of_a_file, f"data.path={worked}", "data.solution_field=worked")
    rollouts = trainer.collect()[0].rollouts
    assert trainer.parts.student.texts(rollouts) == ["so 1 plus 2 makes 3 , answer 3"] * 4
    assert rollouts.stopped_B.all()


def test_the_doctor_shows_a_solution_and_warns_of_repeated_and_cut_ones(tmp_path):
    def seen(*overrides: str) -> list[str]:
        trainer = trainer_of(tmp_path, *SMALL, *overrides)
        return first_step(trainer.settings, trainer.parts, trainer.state)

    once = seen("method=sft_dataset", "rollout.per_prompt=1")
    assert any(line.startswith("its solution: ") and "<end>" in line for line in once)
    assert not [line for line in once if line.startswith(WARNING)]
    (warned,) = [line for line in seen("method=sft_dataset") if line.startswith(WARNING)]
    assert "rollout.per_prompt=2 shows each solution of the data 2 times in a step" in warned
    assert "with 1, and rollout.prompts=8, a step has as many rollouts of more problems" in warned
    assert any("cut to rollout.max_tokens=5" in line for line in seen("method=sft_dataset", "rollout.max_tokens=5"))
    assert not any("its solution" in line for line in seen("method=sft"))


def test_an_engine_that_cannot_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, *SFT)

    class OnlySamples:
        name, supports = "vllm", frozenset()

    facts = replace(facts_of(trainer.settings, trainer.parts), engine="vllm")
    with pytest.raises(ValueError, match=r"rollout=vllm cannot take rollouts from the data; use rollout=torch, or"):
        compatible(facts, replace(trainer.parts, engine=OnlySamples()))  # type: ignore[arg-type]

    class Remote:
        name, lm, provides = "server", None, trainer.parts.teacher.provides

    compatible(facts, replace(trainer.parts, teacher=Remote()))  # type: ignore[arg-type]  # nobody asks it
