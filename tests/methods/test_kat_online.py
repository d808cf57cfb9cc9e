"""KAT in the decode loop: online and post hoc are one method; what the engine decided stands; runs, kills, lengths."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_run import killed_after, run
from safetensors.torch import load_file
from torch import Tensor

from opd_lab.chunk import measure
from opd_lab.methods.base import TRAINED
from opd_lab.methods.kat import KAT
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.step import Gradient, Models, accumulate_gradient, whole_batch
from opd_lab.teacher.local import LocalTeacher
from opd_lab.tracking import read
from opd_lab.types import Batch, Behavior, Rollouts
from tests.methods.traps import stored
from tests.test_run import digest, read_table
from tests.tiny import make

PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11], [3, 3], [12, 13, 14, 15], [16], [5, 4, 3], [17, 18]]
LIMIT = 20
STUDENT, TEACHER = make(seed=0), make(seed=1)
ONLINE = KAT(window=3, consecutive=2, exempt_tokens=2, min_buffer_rollouts=2, warmup_steps=0, top_k=10)
STATE = stored(0.5, 0.7, 0.9)  # at eta 0.3 the threshold is 0.78 nats
UNIFORM_BT = torch.rand((len(PROMPTS), LIMIT), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def rollouts_of(method: KAT, plain: Behavior, rows: int = 64) -> Rollouts:
    every_B = torch.arange(len(PROMPTS))
    return TorchEngine(LIMIT, rows).decode(
        STUDENT,
        PROMPTS,
        behavior=method.behavior(plain, 0, STATE),
        group_B=every_B,
        uid_B=every_B,
        uniform_BT=UNIFORM_BT,
        teacher=TEACHER,
    )


def learn(method: KAT, rollouts: Rollouts, micro_batch: int = 64) -> tuple[Batch, Gradient, list[Tensor]]:
    models = Models(lambda part, signals: STUDENT.states(part), LocalTeacher(TEACHER))
    how: dict[str, Any] = {"micro_batch": micro_batch, "chunk": 7}
    batch, views = whole_batch(method, rollouts, models, state=STATE, step=0, seed=0, **how)
    STUDENT.module.zero_grad()
    found = accumulate_gradient(method, batch, method.weights(batch), models.student, views, **how)
    return replace(batch, losses=found.losses), found, [p.grad.clone() for p in STUDENT.module.parameters()]  # type: ignore[union-attr]


def trained(method: KAT, batch: Batch) -> list[list[int]]:
    """Ids of the tokens with weight, per rollout."""
    weight_BT = method.weights(batch)[TRAINED] > 0
    return [ids_T[on_T].tolist() for ids_T, on_T in zip(batch.rollouts.response_BT, weight_BT)]


SETTINGS = {
    "kept": {},
    "decision": {"exempt_rule": "decision", "exempt_tokens": 9, "eta": 0.5},
    "blocks": {"window_stride": 3, "eta": 0.1},
    "rollouts": {"denominator": "rollouts"},
    "full": {"support": "full"},
    "teacher": {"support": "teacher_top", "eta": 0.8},
}


@pytest.mark.parametrize("keys", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("plain", [Behavior(), Behavior(temperature=0.7, top_p=0.9)], ids=["plain", "filtered"])
def test_online_and_post_hoc_are_one_method(keys: dict[str, Any], plain: Behavior) -> None:
    online = replace(ONLINE, **keys)
    posthoc = replace(online, stop="posthoc")
    one, found, grads = learn(online, rollouts_of(online, plain))
    two, again, others = learn(posthoc, rollouts_of(posthoc, plain))
    tokens = trained(online, one)
    assert tokens == trained(posthoc, two)
    cut_B = one.rollouts.cut_B
    assert 1 < int(cut_B.sum()) < len(PROMPTS)
    assert found.objective == pytest.approx(again.objective, rel=1e-6)
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)
    states = [method.update(STATE, batch)["lowest"] for method, batch in ((online, one), (posthoc, two))]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)
    assert [m.metrics(b, {})["kat/cut_mismatch_fraction"] for m, b in ((online, one), (posthoc, two))] == [0, 0]
    span = online.window + (online.consecutive - 1) * online.window_stride
    if online.exempt_rule == "kept":
        assert torch.equal(one.rollouts.generated_B[cut_B], one.rollouts.length_B[cut_B] + span)
    assert int(one.rollouts.generated_B.sum()) < int(two.rollouts.generated_B.sum())


@pytest.mark.parametrize("rows", [1, 3])
def test_batches_of_the_engine_change_nothing(rows: int) -> None:
    one, two = rollouts_of(ONLINE, Behavior()), rollouts_of(ONLINE, Behavior(), rows)
    assert torch.equal(one.response_BT, two.response_BT)
    assert torch.equal(one.generated_B, two.generated_B)


def test_the_divergence_does_not_know_how_tokens_were_sampled() -> None:
    """d of the same tokens, seen by the engine under a filter and by a plain teacher-forced pass."""
    method = replace(ONLINE, threshold="fixed")  # at 0: nothing is cut
    rollouts = rollouts_of(method, Behavior(temperature=0.5, top_p=0.8))
    mask_BT = rollouts.mask_BT
    assert not torch.equal(rollouts.behavior_logp_BT[mask_BT], rollouts.logp_BT[mask_BT])
    with torch.no_grad():
        states = STUDENT.states(rollouts), TEACHER.states(rollouts)
    wanted = frozenset({method.divergence})
    d_N = measure(wanted, rollouts.response_BT[mask_BT], *states, chunk=9)[method.divergence]
    torch.testing.assert_close(rollouts.extra["stop_score"][mask_BT], d_N, atol=2e-5, rtol=0)


def test_what_the_engine_decided_stands() -> None:
    """The update's own divergences, here far lower, are compared and nothing else."""
    batch, found, _ = learn(ONLINE, rollouts_of(ONLINE, Behavior()))
    other = replace(batch, losses={TRAINED: found.losses[TRAINED] * 0})
    assert ONLINE.metrics(other, {})["kat/cut_mismatch_fraction"] > 0.2
    assert trained(ONLINE, other) == trained(ONLINE, batch)
    assert ONLINE.weights(other)[TRAINED].sum() == batch.rollouts.length_B.sum()


# whole runs --------------------------------------------------------------------------------------------------------

EARLY = ["method=kat_lab", "method.warmup_steps=1", "method.min_buffer_rollouts=8", "method.eta=0.05"]


def scalar(folder: Path, name: str) -> dict[int, float]:
    found = read.metrics(folder)
    return {int(s): v for s, n, v in zip(found["step"], found["name"], found["value"]) if n == name}


def buffer(folder: Path) -> Tensor:
    """KAT's buffer in the newest checkpoint."""
    saved = load_file(max((folder / "checkpoints").glob("step_*")) / "state.safetensors")
    return next(value for name, value in saved.items() if name.endswith("method_state.lowest"))


def test_four_steps_are_two_a_kill_and_two(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", *EARLY, name="kat_lab").folder
    with killed_after(2):
        run(tmp_path / "cut", *EARLY, name="kat_lab")
    resumed = run(tmp_path / "cut", *EARLY, name="kat_lab").folder
    assert digest(whole / "metrics.parquet") == digest(resumed / "metrics.parquet")
    for table in ("rollout_lengths", "rollouts", "histograms", "evaluations"):
        one, two = (json.dumps(read_table(folder, table)) for folder in (whole, resumed))
        assert one == two, table
    weights = [load_file(folder / "student" / "model.safetensors") for folder in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert scalar(whole, "kat/buffer_rollouts") == {1: 0, 2: 8, 3: 16, 4: 24}
    assert all(scalar(whole, "kat/cut_fraction")[step] > 0 for step in (2, 3, 4))  # so the buffer mattered
    one, two = (buffer(folder) for folder in (whole, resumed))
    assert len(one) == 32
    assert torch.equal(one, two)


def test_whole_runs_train_on_the_same_tokens_online_and_post_hoc(tmp_path: Path) -> None:
    online = run(tmp_path / "a", *EARLY, name="kat_lab").folder
    posthoc = run(tmp_path / "b", *EARLY, "method.stop=posthoc", name="kat_lab").folder
    lengths = [read.table(folder, "rollout_lengths") for folder in (online, posthoc)]
    assert lengths[0]["kept"].tolist() == lengths[1]["kept"].tolist()
    assert not any(a > b for a, b in zip(*(table["generated"] for table in lengths)))
    assert scalar(online, "loss/total_value") == pytest.approx(scalar(posthoc, "loss/total_value"), rel=1e-4)
    for folder, table in zip((online, posthoc), lengths):
        assert scalar(folder, "cost/generated_tokens")[4] == table["generated"].sum()  # cut tokens too
        assert len(table) == 4 * 8
        assert table["uid"].tolist() == list(range(32))
    assert scalar(online, "cost/teacher_scored_tokens")[4] == lengths[0]["kept"].sum()


def test_a_cut_rollout_has_no_reward(tmp_path: Path) -> None:
    folder = run(tmp_path, *EARLY, "diagnostics.sample_rollouts=8", name="kat_lab").folder
    lengths = read.table(folder, "rollout_lengths").set_index("uid")
    shown = read.rollouts(folder).set_index("uid")
    cut = (lengths["kept"] < lengths["generated"]).loc[shown.index]
    assert set(cut) == {True, False}
    assert shown["reward"].isna().tolist() == cut.tolist()
    assert [len(ids) for ids in shown["ids"]] == lengths["kept"].loc[shown.index].tolist()


def test_steps_without_a_token_are_counted_and_harm_nothing(tmp_path: Path) -> None:
    keys = {"window": 1, "consecutive": 1, "exempt_tokens": 0, "exempt_rule": "decision", "threshold": "fixed"}
    keys |= {"threshold_nats": 1e9, "warmup_steps": 1}
    folder = run(tmp_path, "method=kat_lab", *(f"method.{k}={v}" for k, v in keys.items()), name="kat_lab").folder
    assert scalar(folder, "optim/skipped_steps") == {1: 0, 2: 1, 3: 2, 4: 3}
    assert {step: value for step, value in scalar(folder, "loss/total_value").items() if step > 1} == {2: 0, 3: 0, 4: 0}
    assert scalar(folder, "kat/kept_fraction")[4] == 0
    assert all(math.isfinite(value) for value in read.metrics(folder)["value"])
