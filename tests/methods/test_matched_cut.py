"""Matched cut: the lengths of another run, drawn for each rollout on its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lab_run import run, settings

from opd_lab.methods.matched_cut import MatchedCut
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.tracking import read
from opd_lab.tracking.run_folder import RunFolder
from opd_lab.types import ENDLESS, Behavior, Report
from tests.methods.by_hand import FACTS
from tests.tiny import make
from tests.tracking.runs import info

UID_B = torch.arange(3000)


def test_every_length_is_drawn_as_often_as_it_occurs() -> None:
    method = MatchedCut(lengths=(3, 5, 5, 9))
    cut_B = method.draw(0, UID_B, UID_B)
    shares = [(cut_B == length).double().mean().item() for length in (3, 5, 9)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


def test_a_cut_belongs_to_seed_and_rollout() -> None:
    method = MatchedCut(lengths=tuple(range(1, 101)))
    cut_B = method.draw(0, UID_B, UID_B)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(method.draw(0, UID_B[order], UID_B), cut_B[order])
    assert not torch.equal(method.draw(1, UID_B, UID_B), cut_B)


def test_a_rollout_is_kept_up_to_the_shorter_of_cut_and_end() -> None:
    engine, every_B = TorchEngine(12, 64), torch.arange(16)
    uniform_BT = torch.rand((16, 12), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def sample(behavior: Behavior):
        return engine.decode(
            make(), [[3, 4]] * 16, behavior=behavior, group_B=every_B, uid_B=every_B, uniform_BT=uniform_BT
        )

    whole, method = sample(Behavior()), MatchedCut(lengths=(2, 5, 12))
    cut = sample(method.behavior(Behavior(), 0, {}))
    wanted_B = torch.minimum(whole.length_B, method.draw(0, every_B, every_B))
    assert torch.equal(cut.length_B, wanted_B)
    assert 0 < int((wanted_B < whole.length_B).sum()) < 16
    width = cut.source_BT.shape[1]
    assert torch.equal(cut.response_BT[cut.mask_BT], whole.response_BT[:, :width][cut.mask_BT])
    neutral = sample(replace(method, lengths=(ENDLESS,)).behavior(Behavior(), 0, {}))
    assert torch.equal(neutral.ids_BL, whole.ids_BL)


def folder_of(path: Path, rows: list[tuple[int, int]]) -> Path:
    """A run that logged the lengths (kept, generated), with a response limit of 48."""
    path.mkdir()
    tracker = RunFolder()
    tracker.start(info(path, params={"rollout.max_tokens": 48}))
    lengths = [{"uid": i, "kept": kept, "generated": generated} for i, (kept, generated) in enumerate(rows)]
    tracker.log(Report(1, tables={"rollout_lengths": lengths} if rows else {}))
    return path


def test_the_lengths_of_a_run(tmp_path: Path) -> None:
    """Of a rollout that was not cut only the limit is known."""
    folder = folder_of(tmp_path / "kat", [(7, 10), (20, 20), (3, 6), (7, 9)])
    assert read.cut_lengths(folder, 4) == [3, 7, 7, 48]
    assert read.cut_lengths(folder, 8) == [3, 3, 7, 7, 7, 7, 48, 48]
    assert len(read.cut_lengths(folder)) == 100


def test_the_lengths_are_settings_and_decide_the_name_of_the_run(tmp_path: Path) -> None:
    one, two = (folder_of(tmp_path / name, rows) for name, rows in (("a", [(7, 9)]), ("b", [(8, 9)])))
    chosen = [
        settings(tmp_path, "method=matched_cut", f"method.run={folder}").method["lengths"] for folder in (one, two)
    ]
    assert chosen == [[7] * 100, [8] * 100]


def test_a_run_without_lengths_is_refused(tmp_path: Path) -> None:
    text = "method.run must be the folder of a run with method=kat or a variant of it, got"
    with pytest.raises(ValueError, match=f"^{text} .*plain, which has no table rollout_lengths$"):
        settings(tmp_path, "method=matched_cut", f"method.run={folder_of(tmp_path / 'plain', [])}")
    with pytest.raises(ValueError, match=f"^{text} none$"):
        MatchedCut().check(FACTS)


def test_a_run_is_as_short_as_the_one_it_is_matched_to(tmp_path: Path) -> None:
    early = ["method.warmup_steps=1", "method.min_buffer_rollouts=8", "method.eta=0.05"]
    kat = run(tmp_path, "method=kat_lab", *early, name="kat_lab").folder
    lengths = set(read.cut_lengths(kat))
    folder = run(tmp_path, "method=matched_cut", f"method.run={kat}", name="matched_cut").folder
    shown = read.rollouts(folder)
    assert all(stopped or len(ids) in lengths for stopped, ids in zip(shown["stopped"], shown["ids"]))
    assert set(shown["stopped"]) == {True, False}
