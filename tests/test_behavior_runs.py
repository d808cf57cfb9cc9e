"""Whole runs in which the teacher takes part in rollouts: schedules, costs, neutral settings, resuming, refusals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from lab_run import killed_after, run, settings

from opd_lab import train
from opd_lab.doctor import compatible
from opd_lab.methods.off_policy import SFT, TeacherStart
from opd_lab.methods.skd import SKD
from opd_lab.methods.trb import TRB
from opd_lab.parts import facts_of
from opd_lab.run import load_parts
from opd_lab.tracking import read
from opd_lab.tracking.run_folder import read_table, volatile

TRB_SHORT = ("method=trb", "method.warmup_steps=2", "method.initial_budget_nats=0.2")
SMALL = ("evaluate.problems=1", "evaluate.test_problems=1", "evaluate.samples=2", "evaluate.every=0")


def metrics(folder: Path, *overrides: str, name: str) -> pd.DataFrame:
    done = run(folder, *SMALL, *overrides, name=name)
    return table_of(done.folder)


def table_of(folder: Path) -> pd.DataFrame:
    return read.metrics(folder).pivot(index="step", columns="name", values="value").loc[1:]


def shared(table: pd.DataFrame) -> pd.DataFrame:
    """What every method reports, in an order of its own."""
    areas = ("kl", "entropy", "rollout", "optim", "loss", "eval")
    return table.filter(items=[name for name in sorted(table) if name.split("/")[0] in areas])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> pd.DataFrame:
    return metrics(tmp_path_factory.mktemp("opd"), name="opd")


@pytest.fixture(scope="module")
def blended_run(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("trb"), *SMALL, *TRB_SHORT, name="trb").folder


@pytest.fixture(scope="module")
def blended(blended_run) -> pd.DataFrame:
    return table_of(blended_run)


@pytest.mark.parametrize(
    ("name", "neutral"),
    [
        ("trb", ["method.initial_budget_nats=0", "method.support=full"]),
        ("skd", ["method.teacher_k=1000"]),
        ("gkd", ["method.lambda_=1", "method.beta=1"]),
        ("temperature_warmup", ["method.initial_temperature=1"]),
        ("fixed_prefix1024", []),
        ("sft_warmup25", ["method.warmup_steps=0"]),
    ],
)
def test_neutral_settings_are_plain_opd_rollouts_included(tmp_path, plain, name, neutral):
    table = metrics(tmp_path, f"method={name}", *neutral, name=name)
    pd.testing.assert_frame_equal(shared(table).filter(items=list(shared(plain))), shared(plain), check_exact=True)


def test_the_ball_shrinks_and_the_teacher_stops_decoding(blended, plain):
    assert blended["blend/budget_nats"].tolist() == pytest.approx([0.2, 0.1, 0.0, 0.0])
    assert blended["blend/beta_mean_fraction"].notna().tolist() == [True, True, False, False]
    decoded = blended["cost/teacher_decoded_tokens"].tolist()
    assert 0 < decoded[0] < decoded[1] == decoded[2] == decoded[3]
    assert decoded[1] == blended["cost/generated_tokens"].tolist()[1]
    nothing = [0.0] * 4
    assert blended["cost/teacher_generated_tokens"].tolist() == nothing
    assert plain["cost/teacher_generated_tokens"].tolist() == plain["cost/teacher_decoded_tokens"].tolist() == nothing


def test_what_the_blend_says_of_itself(blended):
    first = blended.loc[1]
    assert 0 < first["blend/deviation_mean_nats"] <= 0.2
    whole = first["blend/deviation_sequence_mean_nats"]
    assert whole == pytest.approx(first["blend/deviation_mean_nats"] * first["rollout/length_mean_tokens"])
    assert first["blend/log_ratio_sequence_mean_nats"] == pytest.approx(whole, abs=1.5)  # 8 rollouts: 3 standard errors
    assert first["blend/teacher_gain_mean_nats"] > 0
    feasible, active = first["blend/teacher_feasible_fraction"], first["blend/budget_active_fraction"]
    assert feasible + active == pytest.approx(1.0)


def test_sampled_rollouts_show_the_columns_of_the_blend(blended_run):
    rows = read_table(blended_run, "rollouts").to_pylist()
    blended, after = ([row for row in rows if row["step"] == step] for step in (2, 4))
    assert blended and after
    for row in blended:
        assert set(row["source"]) == {"blend"}
        assert len(row["beta"]) == len(row["deviation"]) == len(row["ids"]) and all(0 <= b <= 1 for b in row["beta"])
    for row in after:
        assert set(row["source"]) == {"student"} and row["beta"] is None


def test_no_token_of_a_run_leaves_the_ball_around_the_student(blended_run):
    """KL(mu || p) <= eps_k at every sampled token; eps_k = 0.2 (1 - k / 2) at step k, reported as k + 1."""
    rows = [row for row in read_table(blended_run, "rollouts").to_pylist() if row["deviation"] is not None]
    spent = [(value, 0.2 * (1 - (row["step"] - 1) / 2)) for row in rows for value in row["deviation"]]
    assert len(spent) > 50
    assert all(-1e-6 <= value <= budget * (1 + 1e-6) for value, budget in spent)
    assert max(value / budget for value, budget in spent) > 0.99, "somewhere the budget is used up"


def test_a_resumed_run_goes_on_with_the_budget_of_its_step(tmp_path, blended):
    with killed_after(1):
        run(tmp_path, *SMALL, *TRB_SHORT, name="trb")
    again = metrics(tmp_path, *TRB_SHORT, name="trb")
    named = [n for n in blended if not volatile(n)]
    pd.testing.assert_frame_equal(again.filter(items=named), blended.filter(items=named), check_exact=True)


def test_the_teachers_answers_cost_the_teacher(tmp_path):
    table = metrics(tmp_path / "sft", "method=sft", name="sft")
    generated = table["cost/generated_tokens"].tolist()
    assert table["cost/teacher_generated_tokens"].tolist() == table["cost/teacher_decoded_tokens"].tolist() == generated
    assert max(table["rollout/reward_mean_fraction"]) > 0.5  # the lab's teacher is nearly always right
    table = metrics(tmp_path / "gkd", "method=gkd", name="gkd")
    share, total = table["gkd/on_policy_fraction"].tolist(), [0, *table["cost/teacher_generated_tokens"]]
    assert set(share) <= {0, 0.25, 0.5, 0.75, 1}
    assert [one == 1 for one in share] == [before == after for before, after in pairwise(total)]
    table = metrics(tmp_path / "start", "method=sft_warmup25", "method.warmup_steps=1", name="sft_warmup25")
    written = table["cost/teacher_generated_tokens"].tolist()
    assert 0 < written[0] == written[3]
    assert [value > 0 for value in table["loss/start_value"]] == [True, False, False, False]
    assert [value > 0 for value in table["loss/opd_value"]] == [False, True, True, True]


@dataclass(frozen=True, slots=True)
class OnlySamples:
    """A rollout engine that can sample the student and nothing else."""

    name: str = "vllm"
    supports: frozenset[str] = frozenset()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (TRB(), r"rollout=vllm cannot blend two models token by token; use rollout=torch, or .*initial_budget_nats=0"),
        (SKD(), r"rollout=vllm cannot blend two models token by token; use rollout=torch$"),
        (SFT(), r"rollout=vllm cannot let the teacher write tokens of a rollout; use rollout=torch$"),
        (TeacherStart(), r"use rollout=torch, or method\.warmup_steps=0"),
    ],
)
def test_what_engine_or_teacher_cannot_do_is_refused(tmp_path, method, words):
    chosen = settings(tmp_path)
    parts = replace(load_parts(chosen, lambda line: None), method=method)
    facts = facts_of(chosen, parts)
    compatible(facts, parts)
    served = replace(facts, engine="vllm")
    with pytest.raises(ValueError, match=words):
        compatible(served, replace(parts, engine=OnlySamples()))  # type: ignore[arg-type]

    class Remote:
        name, lm, provides = "server", None, parts.teacher.provides

    with pytest.raises(ValueError, match=r"teacher=server scores finished text .*; use teacher=local"):
        compatible(replace(facts, teacher="server"), replace(parts, teacher=Remote()))  # type: ignore[arg-type]


def test_rewards_of_cut_rollouts_are_not_known(tmp_path):
    chosen = settings(tmp_path)
    parts = load_parts(chosen, lambda line: None)
    trainer = train.Trainer(chosen, parts, None, tmp_path)  # type: ignore[arg-type]
    batch, _ = trainer.collect()
    cut = replace(batch.rollouts, extra={"generated": batch.rollouts.length_B + torch.tensor([1, 0] * 4)})
    graded = trainer.graded(cut, [parts.data.train[0]] * 8)
    assert graded.reward_B.isnan().tolist() == [True, False] * 4
