"""What is fitted once before the first step: kept, shared, checked, and never asked for by a resumed run."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_run import killed_after, run, settings

from opd_lab import preparation
from opd_lab.methods.base import Method, Prepared
from opd_lab.parts import Parts
from opd_lab.run import load_parts
from opd_lab.types import hidden

BRIDGE = ("method=oprd_bridge_lab", "method.fit_prompts=12", "method.fit_max_new_tokens=24")
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Fits(Method):
    """Fits nothing, slowly, and counts how often; what it makes cannot be made twice."""

    paper = "https://example.org"
    times: list[float] = field(default_factory=list)

    def preparation(self) -> dict[str, Any]:
        return {}

    def prepare(self, ask: object, state: dict[str, Any]) -> Prepared:
        self.times.append(time.time())
        time.sleep(0.05)
        return Prepared(state | {"map": torch.randn(3) / 3, "pairs": ((1, 2),)}, {"x/y_raw": 1 / 3})


def cached(folder: Path, method: Method, said: list[str]) -> Prepared:
    return preparation.cached(folder, method, None, {"kept": 2}, CPU, said.append)  # type: ignore[arg-type]


def test_a_hit_is_bitwise_a_miss(tmp_path: Path) -> None:
    method, said = Fits(), []
    miss, hit = (cached(tmp_path / "prepared" / "k", method, said) for _ in range(2))
    assert torch.equal(miss.state.pop("map"), hit.state.pop("map"))
    assert miss == hit == Prepared({"kept": 2, "pairs": ((1, 2),)}, {"x/y_raw": 1 / 3})
    assert len(method.times) == 1
    assert said == ["preparing Fits, once for all runs with these models and settings"]


@pytest.mark.parametrize("file", [preparation.TENSORS, preparation.TREE])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, file: str, damage: str) -> None:
    method, said = Fits(), []
    cached(tmp_path / "k", method, said)
    path = tmp_path / "k" / file
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-3] if damage == "cut" else b"{}" + content[2:])
    found = cached(tmp_path / "k", method, said)
    assert torch.equal(found.state["map"], cached(tmp_path / "k", method, said).state["map"])
    assert len(method.times) == 2
    assert len([line for line in said if line.startswith("warning") and "made anew" in line]) == 1


def test_a_fit_that_was_killed_leaves_no_entry(tmp_path: Path) -> None:
    (tmp_path / "k.writing").mkdir()
    (tmp_path / "k.writing" / preparation.TENSORS).write_text("half")
    method = Fits()
    cached(tmp_path / "k", method, [])
    assert len(method.times) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"k", "k.lock"}


def test_those_who_come_while_it_is_made_wait_for_it(tmp_path: Path) -> None:
    method, found = Fits(), []
    runs = [threading.Thread(target=lambda: found.append(cached(tmp_path / "k", method, []))) for _ in range(4)]
    for one in runs:
        one.start()
    for one in runs:
        one.join()
    assert len(method.times) == 1
    assert len({tuple(one.state["map"].tolist()) for one in found}) == 1


def parts_of(tmp_path: Path, *overrides: str) -> tuple[Any, Parts]:
    chosen = settings(tmp_path, *BRIDGE, *overrides)
    return chosen, load_parts(chosen, lambda line: None)


def test_the_key_is_of_what_decides_the_result(tmp_path: Path) -> None:
    def key(*overrides: str) -> str:
        return preparation.key(*parts_of(tmp_path, *overrides))

    plain = key()
    assert plain == key("steps=9", "optim.lr=1", "method.coef=3", "tracking.name=other", "rollout.prompts=2")
    others = ["seed=1", "method.rank=4", "method.fit_seed=1", "data.problems=150", "model=lab_same_shape"]
    assert len({plain, *(key(other) for other in others)}) == 1 + len(others)
    chosen, parts = parts_of(tmp_path)
    with torch.no_grad():
        next(parts.student.module.parameters()).view(-1)[0] += 1e-3
    assert preparation.key(chosen, parts) != plain


def test_frozen_models_answer_as_in_a_step_and_keep_no_gradient(tmp_path: Path) -> None:
    chosen, parts = parts_of(tmp_path)
    ask = preparation.FrozenPair(chosen, parts)
    given = ask.rollouts(5, 7)
    assert len(given) == 5
    assert given.source_BT.shape[1] <= 7
    assert len({tuple(row) for row in given.ids_BL[:, : given.prompt_columns].tolist()}) == 5  # one rollout each
    assert torch.equal(given.ids_BL, ask.rollouts(5, 7).ids_BL)
    own, theirs = hidden("student", (1, 2), "predict"), hidden("teacher", (1, 3), "predict")
    seen = ask.states(given, frozenset({own, theirs}))
    tokens = int(given.mask_BT.sum())
    assert [tuple(seen[s].shape) for s in (own, theirs)] == [(tokens, 2, 64), (tokens, 2, 96)]
    torch.testing.assert_close(seen[theirs][:, 1], parts.teacher.view(given).hidden_NH)
    assert not seen[own].requires_grad


def test_two_runs_share_one_fit_and_report_it(tmp_path: Path) -> None:
    said: list[str] = []
    one = run(tmp_path, *BRIDGE, "steps=1", say=said.append)
    two = run(tmp_path, *BRIDGE, "steps=1", "optim.lr=1e-5", say=said.append)
    assert len([line for line in said if line.startswith("preparing OprdBridge")]) == 1
    assert len(list((tmp_path / "prepared").glob("*/state.json"))) == 1
    metrics = [train_metrics(result.folder) for result in (one, two)]
    assert metrics[0] == metrics[1] != {}
    assert metrics[0]["oprd/bridge_cosine_after_fraction"] > metrics[0]["oprd/bridge_cosine_before_fraction"]


def train_metrics(folder: Path) -> dict[str, float]:
    from opd_lab.tracking import read

    found = read.metrics(folder)
    found = found[(found["step"] == 0) & found["name"].str.startswith("oprd/bridge")]
    return dict(zip(found["name"], found["value"]))


def test_a_resumed_run_never_asks_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole", *BRIDGE, "steps=2")
    with killed_after(1):
        run(tmp_path / "cut", *BRIDGE, "steps=2")

    def refuse(*_: Any) -> None:
        raise AssertionError("the cache was asked")

    monkeypatch.setattr(preparation, "cached", refuse)
    resumed = run(tmp_path / "cut", *BRIDGE, "steps=2")
    weights = [(result.folder / "student" / "model.safetensors").read_bytes() for result in (whole, resumed)]
    assert weights[0] == weights[1]


def test_nothing_is_prepared_for_a_method_that_asks_for_nothing(tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    parts = load_parts(chosen, lambda line: None)
    assert preparation.prepare(chosen, parts, print) == Prepared(parts.method.init_state(), {})
    assert not (tmp_path / "prepared").exists()


def test_a_fit_that_the_models_cannot_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"method\.fit_max_new_tokens=4096 cannot be had: .* 256 positions"):
        run(tmp_path, "method=oprd_bridge", "method.fit_prompts=4")
