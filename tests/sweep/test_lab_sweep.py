"""Sweeps of real runs: what they ask is checked beforehand, and MLflow shows one tree with the right ends."""

import subprocess
import sys

import pytest
import yaml
from bench import launcher
from lab_sweep import asked
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from opd_lab import config
from opd_lab.sweep import run


@pytest.mark.parametrize("path", sorted(config.SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_file_asks_what_can_be_run(tmp_path, path):
    said = yaml.safe_load(path.read_text())
    assert said["question"].strip().endswith(("?", ".")) and said["cost"]
    question = asked(tmp_path, f"sweeps={path.stem}", short=[])
    assert question.name == path.stem
    assert question.samples[0][1].tracking.experiment == path.stem
    if question.space.finite:
        assert len(question.space.points()) > 1


def test_the_command_line_beats_the_file(tmp_path):
    question = asked(tmp_path, "sweeps=smoke", "method=opd", "seed=0,1", "steps=3", short=[])
    assert [p.key for p in question.space.parameters] == ["seed"]
    order, settings = question.samples[0]
    assert (order.method, settings.steps, settings.rollout.prompts) == ("opd", 3, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["method=opd,scope", "sweep.objective={loss/total_value: minimize}"], "must mean the same for every trial"),
        (["method=opd,scope", "sweep.objective={scope/kept_fraction: maximize}"], "must mean the same.*over method"),
        (["method.nope=1,2"], "sweep.space.method.nope is a key of no run"),
        (["optim.lrr=1,2"], "did you mean lr"),
        (["optim.lr=high,1e-4"], "optim.lr must be float, got 'high'"),
        (["seed=0,1", "sweep.seeds=[0,1]"], "seed cannot be in the space"),
        (["seed=1", "sweep.seeds=[0,1]", "steps=1,2"], "seed=1 has no effect with sweep.seeds"),
        (["steps=2,4", "sweep.pruner=median", "evaluate.every=0"], "needs a number from every evaluation"),
        (["steps=2,4", "sweep.pruner=wilcoxon", "objective=kl/reverse_mean_nats"], "compares the accuracy of problems"),
        (["steps=2,4", "sweep.sampler=bayes"], "sweep.sampler must be one of null, grid, random"),
        (
            [
                "steps=2,4",
                "sweep.pruner=median",
                "sweep.objective={eval/validation/avg_at_2: maximize, cost/x: minimize}",
            ],
            "sweep.pruner must be null for several objectives",
        ),
        (["steps=2,4", "sweep.condition=os:system"], "module:function of a package in allow"),
        (["steps=2,4", "objective=alarm/what"], "sweep.objective must say which way alarm/what is better"),
    ],
)
def test_questions_that_cannot_be_asked(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        assert asked(tmp_path, *arguments).samples


def test_mlflow_and_optuna_never_share_a_database(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with pytest.raises(ValueError, match="must be another database than MLflow's"):
        run.run(asked(tmp_path, "steps=2,4", f"sweep.storage={uri}"), launcher())


@pytest.mark.slow
def test_what_trials_are_forked_from_imports_all_it_names():
    """The fork server says nothing of a module that is not there."""
    code = "import gc, opd_lab.sweep.warm; assert gc.get_freeze_count() > 100_000"
    done = subprocess.run([sys.executable, "-c", code], cwd=config.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_every_fate_in_optuna_and_in_mlflow(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    question = asked(tmp_path, "seed=0,1,2,3,4", "sweep.name=fates", "sweep.time_limit_seconds=15", mlflow=True)
    assert run.run(question, launcher(slots=2), task="fated:train") == 0
    out = capsys.readouterr().out
    assert "RuntimeError: no such luck" in out and "killed by SIGKILL" in out and "time limit of 15 s" in out
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "optuna" / "fates.journal")))
    trials = storage.get_all_trials(0)
    assert [t.state.name for t in trials] == ["COMPLETE", "FAIL", "FAIL", "FAIL", "FAIL"]
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("opd_lab").experiment_id])
    by_seed = {r.data.tags["seed"]: r for r in runs if r.data.tags["kind"] == "run"}
    (sweep,) = (r for r in runs if r.data.tags["kind"] == "sweep")
    assert len(runs) == 6
    assert {s: r.info.status for s, r in by_seed.items()} == {
        "0": "FINISHED", "1": "KILLED", "2": "FAILED", "3": "KILLED", "4": "FAILED",
    }  # fmt: skip
    assert {r.data.tags["mlflow.parentRunId"] for r in by_seed.values()} == {sweep.info.run_id}
    assert [by_seed[str(n)].data.tags["sweep.state"] for n in range(5)] == ["complete"] + ["failed"] * 4
    assert by_seed["3"].data.tags["sweep.why"] == "time limit of 15 s"
    assert sweep.info.status == "FINISHED"
    files = {f.path for f in client.list_artifacts(sweep.info.run_id)}
    assert {"trials.parquet", "trials.csv", "trials.json", "sweep.html", "sweep.md"} <= files
    assert "Trial 2 failed: `RuntimeError: no such luck`" in sweep.data.tags["mlflow.note.content"]


@pytest.mark.slow
def test_seeds_are_runs_below_their_trial(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["method=opd,scope", "sweep.seeds=[0,1]", "sweep.name=seeds", "steps=2"]
    assert run.run(asked(tmp_path, *words, mlflow=True), launcher(slots=2)) == 0
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "optuna" / "seeds.journal")))
    for trial in storage.get_all_trials(0):
        by_seed = [one for (one,) in trial.user_attrs["values_by_seed"]]
        assert trial.value == sum(by_seed) / 2
        assert trial.user_attrs["spread"] == [pytest.approx(abs(by_seed[0] - by_seed[1]) / 2**0.5)]
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("opd_lab").experiment_id])
    kind = {r.info.run_id: r.data.tags["kind"] for r in runs}
    parents = sorted((kind[r.info.run_id], kind.get(r.data.tags.get("mlflow.parentRunId", ""), "")) for r in runs)
    assert parents == [("run", "trial")] * 4 + [("sweep", "")] + [("trial", "sweep")] * 2
    assert {r.info.status for r in runs} == {"FINISHED"}
