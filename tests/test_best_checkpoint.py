"""The best checkpoint is chosen on validation and tested once, at the end; training does not notice."""

import shutil

import pyarrow.parquet as pq
import pytest
from lab_run import run
from safetensors.torch import load_file

from opd_lab.compare.table import table
from opd_lab.results import score
from opd_lab.tracking import read
from opd_lab.train import Trainer

# This rate ruins the student, so no later validation is better than the first, after step 2 of 4.
RUINOUS = ["optim.lr=0.05", "rollout.max_tokens=12", "evaluate.test_problems=12"]


def scalars(folder, area):
    rows = pq.read_table(folder / "metrics.parquet").to_pylist()
    return {row["name"].removeprefix(area): row["value"] for row in rows if row["name"].startswith(area)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run(tmp_path_factory.mktemp("best"), *RUINOUS).folder


def test_the_test_scores_of_the_best_are_those_of_its_checkpoint(folder):
    best = scalars(folder, "eval/test_best/")
    assert best.pop("step") == 2
    again = score(folder, "best", "test", problems=12, samples=2)
    assert best == {name.removeprefix("eval/test/"): value for name, value in again.items()}
    assert best["reverse_kl_mean_nats"] != scalars(folder, "eval/test/")["reverse_kl_mean_nats"]


def test_the_table_shows_the_gap(folder):
    (row,) = table(folder).rows.to_dict("records")
    found = read.evaluations(folder)
    at = found[found["set"] == "test"].groupby("step")[["correct", "n"]].sum()
    assert list(at.index) == [0, 2, 4]
    accuracy = at["correct"] / at["n"]
    assert row["best_step"] == 2
    assert row["accuracy_best"] == pytest.approx(accuracy[2])
    assert row["best_gain"] == pytest.approx(accuracy[2] - accuracy[4])


def test_without_it_the_run_is_the_same(folder, tmp_path):
    plain = run(tmp_path, *RUINOUS, "evaluate.test_best=false").folder
    assert scalars(plain, "eval/test_best/") == {}
    with_it, without = (load_file(f / "student" / "model.safetensors") for f in (folder, plain))
    assert all((with_it[name] == value).all() for name, value in without.items())
    rows = pq.read_table(folder / "metrics.parquet").to_pylist()
    kept = [row for row in rows if not row["name"].startswith("eval/test_best/")]
    assert kept == pq.read_table(plain / "metrics.parquet").to_pylist()


def test_a_best_checkpoint_that_is_also_the_last_is_not_tested_twice(tmp_path):
    last = run(tmp_path, *RUINOUS, "steps=2").folder
    best = scalars(last, "eval/test_best/")
    assert best.pop("step") == 2
    assert best == scalars(last, "eval/test/")
    assert sorted(set(read.evaluations(last).query("set == 'test'").step)) == [0, 2]


@pytest.mark.slow
def test_a_best_checkpoint_that_is_gone_is_named_and_the_run_ends_well(tmp_path, monkeypatch):
    said = []
    test_best = Trainer.test_best

    def lost(self, report, last):
        shutil.rmtree(self.folder / "checkpoints" / "step_000002")
        test_best(self, report, last)

    monkeypatch.setattr(Trainer, "test_best", lost)
    folder = run(tmp_path, *RUINOUS, say=said.append).folder
    assert any("the best checkpoint is not tested" in line and "not of 2" in line for line in said)
    assert scalars(folder, "eval/test_best/") == {}
    assert read.status(folder)["status"] == "FINISHED"
