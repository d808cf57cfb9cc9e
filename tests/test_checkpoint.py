"""A checkpoint is complete or absent, and what comes back is bitwise what went in."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Generator, nn

from opd_lab import checkpoint
from opd_lab.checkpoint import latest, prune, restore, save


class Tied(nn.Module):
    """An embedding that is also the head, a buffer that is saved and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


class Run:
    """A tiny training with everything a checkpoint has to carry."""

    def __init__(self, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.student = SimpleNamespace(module=Tied())
        self.optimizer = torch.optim.AdamW(self.student.module.parameters(), lr=0.1, betas=(0.8, 0.9))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.generators = {"rollout": Generator().manual_seed(seed), "noise": Generator().manual_seed(seed + 1)}
        self.method_state = {"mean": torch.zeros(6), "seen": 0}

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            ids = torch.randint(11, (8,), generator=self.generators["rollout"])
            targets = torch.randint(11, (8,), generator=self.generators["noise"])
            loss = nn.functional.cross_entropy(self.student.module(ids), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            mean = 0.9 * self.method_state["mean"] + self.student.module.norm.running_mean
            self.method_state = {"mean": mean, "seen": self.method_state["seen"] + 8}
            losses.append(loss.item())
        return losses

    def save(self, folder: Path, step: int, **changes) -> Path:
        parts = {
            "student": self.student,
            "optimizer": self.optimizer,
            "method_state": self.method_state,
            "generators": self.generators,
            "stream": {"epoch": 1, "position": step},
            "extra": {"best": 0.5, "schedule": self.scheduler.state_dict()},
        }
        return save(folder, step, **parts | changes)

    def restore(self, loaded) -> checkpoint.Restored:
        restored = restore(loaded, student=self.student, optimizer=self.optimizer, generators=self.generators)
        self.scheduler.load_state_dict(restored.extra["schedule"])
        self.method_state = restored.method_state
        return restored


def test_four_steps_are_two_and_a_restart_and_two(tmp_path):
    whole = Run(seed=0)
    losses = whole.train(4)

    first = Run(seed=0)
    assert first.train(2) == losses[:2]
    path = first.save(tmp_path, 2)
    assert path == tmp_path / "step_000002"
    second = Run(seed=5)
    loaded = latest(tmp_path)
    assert loaded is not None and (loaded.path, loaded.step, loaded.notes) == (path, 2, [])
    restored = second.restore(loaded)
    assert (restored.step, restored.stream, restored.extra["best"]) == (2, {"epoch": 1, "position": 2}, 0.5)
    assert second.train(2) == losses[2:]

    expected = whole.student.module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in second.student.module.state_dict().items())
    moments, expected = second.optimizer.state_dict(), whole.optimizer.state_dict()
    assert moments["param_groups"] == expected["param_groups"]
    for index, state in expected["state"].items():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(moments["state"][index][key], value) for key, value in state.items())
    assert torch.equal(second.method_state["mean"], whole.method_state["mean"])
    assert second.method_state["seen"] == 32
    assert second.scheduler.state_dict() == whole.scheduler.state_dict()


def test_a_method_may_remember_nested_things(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "half": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
        "views": [shared[:3], shared[::2], shared],
        "empty": torch.zeros(0, 4, dtype=torch.int8),
        "flags": (torch.tensor(True), {7: "seven", "$tensor": None, ("a", 1): [True, 1, 1.0]}),
        "numbers": [0.1 + 0.2, math.inf, 2**70, -0.0],
        "nothing": {"list": [], "dict": {}, "tuple": (), "text": "grün\u2028"},
    }
    Run(seed=0).save(tmp_path, 1, method_state=state)
    run = Run(seed=1)
    back = run.restore(latest(tmp_path)).method_state
    assert torch.equal(back["half"], state["half"]) and back["half"].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(back["views"], state["views"], strict=True))
    assert back["empty"].shape == (0, 4) and back["empty"].dtype == torch.int8
    assert back["flags"][0].item() is True and back["flags"][1:] == state["flags"][1:]
    assert repr(back["flags"][1]) == repr(state["flags"][1])
    assert repr(back["numbers"]) == repr(state["numbers"])
    assert back["nothing"] == state["nothing"]


def test_what_cannot_be_held_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"method_state.buffer\[1\].seen is a builtins.set, which a checkpoint cannot"):
        Run(seed=0).save(tmp_path, 1, method_state={"buffer": [0, {"seen": {1, 2}}]})
    assert list(tmp_path.iterdir()) == []


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_one(tmp_path, monkeypatch):
    """Dies at the first, second, ... call that changes the disk: in a first save, a later one, one that replaces."""

    class Killed(BaseException):
        pass

    run, countdown = Run(seed=0), [0]

    def deadly(function):
        def wrapped(*args, **kwargs):
            countdown[0] -= 1
            if countdown[0] == 0:
                raise Killed
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(checkpoint, "save_file", deadly(checkpoint.save_file))
    monkeypatch.setattr(os, "fsync", deadly(os.fsync))
    monkeypatch.setattr(Path, "write_text", deadly(Path.write_text))
    monkeypatch.setattr(Path, "rename", deadly(Path.rename))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", deadly(checkpoint.shutil.rmtree))
    survived = []
    for moment in range(1, 30):
        folder = tmp_path / str(moment)
        for step, allowed in [(1, (None, 1)), (2, (1, 2)), (2, (1, 2))]:
            countdown[0] = moment
            try:
                run.save(folder, step)
                survived.append(moment)
            except Killed:
                pass
            countdown[0] = 0
            found = latest(folder)
            assert (found and found.step) in allowed
            run.save(folder, step)
            prune(folder, keep_last=2, best_step=None)
            assert sorted(p.name for p in folder.iterdir()) == [f"step_{s:06d}" for s in range(1, step + 1)]
    assert 11 <= min(survived) <= 20, "the moments above do not reach from the first to the last call"


@pytest.mark.parametrize("name", ["student.safetensors", "state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_skipped_with_a_note(tmp_path, name, damage):
    run = Run(seed=0)
    run.save(tmp_path, 9)
    file = run.save(tmp_path, 10) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    loaded = latest(tmp_path)
    assert loaded is not None and loaded.step == 9
    assert len(loaded.notes) == 1 and "step_000010 is damaged" in loaded.notes[0]
    assert "was skipped; an earlier one is used" in loaded.notes[0]

    run.restore(loaded)
    run.save(tmp_path, 9)
    prune(tmp_path, keep_last=1, best_step=None)
    assert latest(tmp_path).step == 9, "the damaged one must not crowd out the good one"


def test_damage_everywhere_stops_the_run(tmp_path):
    assert latest(tmp_path) is None and latest(tmp_path / "absent") is None
    (Run(seed=0).save(tmp_path, 1) / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged.*checkpoint.resume=never"):
        latest(tmp_path)


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    run = Run(seed=0)
    for step in (5, 10, 999_995, 1_000_000):
        run.save(tmp_path, step)
    (tmp_path / ".writing_step_000007").mkdir()
    (tmp_path / "step_of_the_user").mkdir()
    prune(tmp_path, keep_last=2, best_step=5)
    names = {"step_000005", "step_999995", "step_1000000", "step_of_the_user"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert latest(tmp_path).step == 1_000_000
    with pytest.raises(ValueError, match=r"checkpoint\.keep_last must be >= 1, got 0"):
        prune(tmp_path, keep_last=0, best_step=None)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    Run(seed=0).save(tmp_path, 1)
    loaded = latest(tmp_path)
    run = Run(seed=0)
    run.student.module.embed = nn.Embedding(11, 6)  # no longer tied
    with pytest.raises(ValueError, match=r"is of another student: it differs in \['head.weight'\]"):
        run.restore(loaded)
    run = Run(seed=0)
    del run.generators["noise"]
    with pytest.raises(ValueError, match=r"holds the generators \['noise', 'rollout'\], this run has \['rollout'\]"):
        run.restore(loaded)


def test_frozen_weights_stay_with_the_model_they_came_from(tmp_path):
    run = Run(seed=0)
    run.student.module.embed.weight.requires_grad_(False)
    path = run.save(tmp_path, 1)
    names = load_file(path / "student.safetensors").keys()
    assert names == {f"norm.{name}" for name in run.student.module.norm.state_dict()}
    assert json.loads((path / "manifest.json").read_text())["step"] == 1
