"""MLflow, really: a SQLite store in a folder of its own."""

from __future__ import annotations

import json
import math
import multiprocessing
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from opd_lab.tracking import read
from opd_lab.tracking.mlflow import MLflow, open_store
from opd_lab.tracking.replay import sync
from opd_lab.tracking.run_folder import RunFolder
from opd_lab.tracking.tracker import FanOut, key
from opd_lab.types import Report
from tests.tracking.runs import info, report

# MLflow's own table definitions use a loader that SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for the module: a new one takes seconds."""
    return tmp_path_factory.mktemp("store")


def client_of(home: Path) -> Any:
    return open_store(None, home, "tests").client


def test_a_run_with_everything(home: Path) -> None:
    tracker = MLflow(None, home)
    fan = FanOut([RunFolder(), tracker])
    folder = home / "whole"
    fan.start(
        info(folder, params={"seed": 0, "optim.betas[0]": 0.9, "data.path": "p", "long": "x" * 7000}, parent="abc")
    )
    for step in range(3):
        fan.log(report(step))
    fan.log(Report(3, {"kl/reverse_mean_nats": math.inf, "eval/pass@1": 3 / 7}))
    fan.tag("best@1", "2")
    fan.finish("FINISHED")
    client = client_of(home)
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "whole")
    assert run.data.params["optim.betas_0_"] == "0.9" and "data.path" not in run.data.params
    whole = json.loads(Path(client.download_artifacts(tracker.run_id, "params.json")).read_text())
    assert whole == {"seed": 0, "optim.betas_0_": 0.9, "data.path": "p", "long": "x" * 7000}
    assert len(run.data.params["long"]) == 6000 and run.data.params["long"].endswith("x... (whole in params.json)")
    assert run.data.tags["method"] == "opd" and run.data.tags["best_at_1"] == "2"
    assert run.data.tags["mlflow.parentRunId"] == "abc"
    history = client.get_metric_history(tracker.run_id, "eval/pass_at_1")
    assert [(m.step, m.value) for m in history] == [(0, 0), (1, 1 / 7), (2, 2 / 7), (3, 3 / 7)]
    assert math.isnan(client.get_metric_history(tracker.run_id, "kl/reverse_mean_nats")[-1].value)
    inputs = {i.tags[0].value: (i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs}
    assert inputs == {"train": ("lab", "0" * 36), "test": ("lab", "1" * 36)}
    files = {f.path for f in client.list_artifacts(tracker.run_id)}
    assert {"config.yaml", "metrics.parquet", "histograms.parquet", "high_loss_tokens.json", "rollouts"} <= files
    pictures = [f.path for f in client.list_artifacts(tracker.run_id, "images") if f.path.endswith(".png")]
    by_key = {"kl~reverse_nats": ["0", "1", "2"], "kl~by_position_nats": ["0", "1", "2"]}
    found = {name: sorted(p.split("+")[2] for p in pictures if f"images/{name}+" in p) for name in by_key}
    assert found == by_key
    table = json.loads(Path(client.download_artifacts(tracker.run_id, "high_loss_tokens.json")).read_text())
    assert table == {"columns": ["token", "count", "step", "rank"], "data": [["a", 3, 2, 0]]}  # the last report's
    table = json.loads(Path(client.download_artifacts(tracker.run_id, "rollouts.json")).read_text())
    assert table["columns"][:4] == ["prompt", "kl_mean_nats", "text", "reward"]
    assert table["data"][0][:4] == ["p", 0.5, "t u", None]
    page = Path(client.download_artifacts(tracker.run_id, "rollouts/step_000002.html")).read_text()
    assert 'class="token student kl3"' in page
    shown = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert shown == [{"path": f"{name}.json", "type": "table"} for name in ("high_loss_tokens", "rollouts")]
    assert run.data.tags["mlflow.loggedImages"] == "True"


def test_pictures_come_every_so_many_steps_and_at_the_end_also_when_half_of_the_run_is_there(tmp_path: Path) -> None:
    def pictured(tracker: MLflow, name: str) -> list[int]:
        client, found = open_store(None, tmp_path, "tests").client, []
        for file in client.list_artifacts(tracker.run_id, "images"):
            key, _, step, *_ = file.path.removeprefix("images/").split("+")
            if file.path.endswith(".png") and key == name:
                found.append(int(step))
        return sorted(found)

    tracker = MLflow(None, tmp_path, picture_every=5)
    fan = FanOut([RunFolder(), tracker])
    fan.start(info(tmp_path / "a"))
    for step in range(1, 4):
        fan.log(report(step))
    fan.finish("KILLED")
    assert pictured(tracker, "kl~reverse_nats") == [1]
    tracker = MLflow(None, tmp_path, picture_every=5)
    fan = FanOut([RunFolder(), tracker])
    fan.start(info(tmp_path / "a", step=4))
    for step in range(4, 14):
        fan.log(report(step))
    fan.finish("FINISHED")
    assert pictured(tracker, "kl~reverse_nats") == pictured(tracker, "kl~by_position_nats") == [1, 5, 10, 13]


def test_a_resumed_run_goes_on_in_its_own_run_and_logs_no_step_twice(home: Path) -> None:
    folder = home / "resumed"

    def attempt(steps: range, status: str) -> str:
        tracker = MLflow(None, home)
        fan = FanOut([RunFolder(), tracker])
        fan.start(info(folder, step=steps.start))
        for step in steps:
            fan.log(report(step))
        fan.finish(status)
        return tracker.run_id

    first = attempt(range(4), "KILLED")
    assert attempt(range(2, 6), "FINISHED") == first
    client = client_of(home)
    assert client.get_run(first).info.status == "FINISHED"
    for name in ("kl/reverse_mean_nats", "time/step_seconds"):
        history = client.get_metric_history(first, name)
        assert [m.step for m in history] == list(range(6))
        said = read.metrics(folder, name).sort_values("step")["value"].tolist()
        assert [m.value for m in history] == said
    pictures = [f.path for f in client.list_artifacts(first, "images") if f.path.endswith(".png")]
    assert len(pictures) == 2 * 6


def test_a_report_that_was_logged_in_part_is_logged_again_into_the_same_places(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = MLflow(None, home)
    tracker.start(info(home / "partly"))
    one = report(0)
    one.time = 1e9
    with monkeypatch.context() as patch:
        patch.setattr(tracker._client, "log_batch", lambda *_, **__: 1 / 0)
        tracker.log(one)
        with pytest.raises(ZeroDivisionError):
            tracker.flush()
    before = [f.path for f in tracker._client.list_artifacts(tracker.run_id, "images")]
    for _ in range(2):
        tracker.log(one)
        tracker.flush()
    assert [f.path for f in tracker._client.list_artifacts(tracker.run_id, "images")] == before
    (point,) = tracker._client.get_metric_history(tracker.run_id, "kl/reverse_mean_nats")
    assert (point.step, point.timestamp) == (0, 10**12)
    again = MLflow(None, home)
    again.start(info(home / "partly", step=1))
    again._last = -1  # as if it had not known
    again.log(one)
    again.flush()
    assert len(tracker._client.get_metric_history(tracker.run_id, "kl/reverse_mean_nats")) == 1


def test_a_run_killed_before_its_first_checkpoint_is_closed_when_it_starts_anew(home: Path) -> None:
    first, second = MLflow(None, home), MLflow(None, home)
    first.start(info(home / "early"))
    second.start(info(home / "early"))
    assert first.run_id != second.run_id
    assert client_of(home).get_run(first.run_id).info.status == "KILLED"


def test_a_run_made_by_a_parent_is_taken_over(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(None, home, "tests")
    made = store.client.create_run(store.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    tracker = MLflow(None, home)
    tracker.start(info(home / "child"))
    tracker.finish("FINISHED")
    assert tracker.run_id == made


def test_a_lost_store_is_rebuilt_from_the_run_folder(home: Path) -> None:
    folder = home / "lost"
    fan = FanOut([RunFolder()])
    fan.start(info(folder))
    for step in range(2):
        fan.log(report(step))
    fan.finish("FAILED")
    tracker = MLflow(None, home)
    sync(folder, tracker)
    run = client_of(home).get_run(tracker.run_id)
    assert run.info.status == "FAILED"
    assert run.data.metrics["eval/pass_at_1"] == 1 / 7


def test_the_store_is_in_wal_mode_with_absolute_artifacts(home: Path) -> None:
    with closing(sqlite3.connect(home / "mlflow.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    location = client_of(home).get_experiment_by_name("tests").artifact_location
    assert location == (home / "artifacts").resolve().as_uri()


def test_a_store_that_cannot_be_written_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=r"tracking.uri must be a store .*, got sqlite.*; choose another"):
        open_store(None, tmp_path / "file", "tests")
    (tmp_path / "mlflow.db").write_text("not a database" * 100)
    with pytest.raises(ValueError, match=r"not a database.*; choose another"):
        open_store(None, tmp_path, "tests")


def _open(home: Path, out: Any) -> None:
    out.put(open_store(None, home, "tests").experiment_id)


@pytest.mark.slow
def test_processes_that_open_a_new_store_at_once_agree(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    out = spawn.Queue()
    children = [spawn.Process(target=_open, args=(tmp_path, out)) for _ in range(2)]
    for child in children:
        child.start()
    experiments = {out.get(timeout=60) for _ in children}
    for child in children:
        child.join()
    out.close()
    assert [child.exitcode for child in children] == [0, 0]
    assert len(experiments) == 1


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("eval/pass@1", "eval/pass_at_1"),
        ("optim.betas[0]", "optim.betas_0_"),
        ("a=b,c", "a_b_c"),
        ("a//b", "a/b"),
        ("../x", "x"),
        ("kl/reverse_mean_nats", "kl/reverse_mean_nats"),
        ("k" * 300, "k" * 250),
    ],
)
def test_names_that_mlflow_takes(name: str, allowed: str) -> None:
    assert key(name) == allowed


def test_the_run_folder_knows_its_mlflow_run(home: Path) -> None:
    known = json.loads((home / "whole" / "mlflow.json").read_text())
    assert client_of(home).get_run(known["run_id"]).info.run_name == "whole"


@pytest.mark.slow
def test_the_student_is_a_model_that_mlflow_and_transformers_load_again(tmp_path: Path) -> None:
    import mlflow.transformers
    import torch
    from lab_run import run
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run(tmp_path, "steps=1", mlflow=True).folder
    store = open_store(None, tmp_path, "opd_lab")
    (model,) = store.client.search_logged_models([store.experiment_id])
    run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
    assert (model.name, model.source_run_id, str(model.status)) == ("student", run_id, "READY")
    (shown,) = store.client.get_run(run_id).outputs.model_outputs  # what the run's page lists
    assert (shown.model_id, shown.step) == (model.model_id, 1)
    kept = Path(model.artifact_location.removeprefix("file://"))
    assert not [path for path in kept.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pickle")]
    mlflow.set_tracking_uri(store.uri)
    parts = mlflow.transformers.load_model(f"models:/{model.model_id}", return_type="components")
    again = AutoModelForCausalLM.from_pretrained(kept / "model")
    trained = load_file(folder / "student" / "model.safetensors")
    for loaded in (parts["model"], again):
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in trained.items())
    text = "start 47 + 8 ?"
    assert parts["tokenizer"](text)["input_ids"] == AutoTokenizer.from_pretrained(folder / "student")(text)["input_ids"]


def test_a_student_that_is_too_large_is_no_model(home: Path) -> None:
    folder = home / "large"
    fan = FanOut([RunFolder(), MLflow(None, home, log_model_megabytes=0.001)])
    fan.start(info(folder))
    (folder / "student").mkdir()
    (folder / "student" / "model.safetensors").write_bytes(b"0" * 1001)
    fan.finish("FINISHED")
    store = open_store(None, home, "tests")
    assert not store.client.search_logged_models([store.experiment_id])
