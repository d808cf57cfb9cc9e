"""Whole runs of the lab: reproducible, resumable, finished once, and what they leave behind."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from lab_run import killed_after, run, settings
from safetensors.torch import load_file

from opd_lab.run import run_folder
from opd_lab.tracking import read


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_one_seed_gives_one_metrics_file_and_another_seed_another(tmp_path):
    one, two = run(tmp_path / "a"), run(tmp_path / "b")
    other = run(tmp_path / "c", "seed=1")
    assert digest(one.folder / "metrics.parquet") == digest(two.folder / "metrics.parquet")
    assert digest(one.folder / "metrics.parquet") != digest(other.folder / "metrics.parquet")
    assert one.objective == two.objective


@pytest.mark.parametrize("method", ["opd", "scope", "tropd_lab"])
def test_four_steps_are_two_a_kill_and_two(tmp_path, method):
    whole = run(tmp_path / "whole", f"method={method}", name=method)
    with killed_after(2):
        run(tmp_path / "cut", f"method={method}", name=method)
    said: list[str] = []
    resumed = run(tmp_path / "cut", f"method={method}", name=method, say=said.append)
    assert any("resumed after step 2" in line for line in said)
    assert digest(whole.folder / "metrics.parquet") == digest(resumed.folder / "metrics.parquet")
    for table in ("histograms", "high_loss_tokens", "rollouts", "evaluations"):
        one, two = (read_table(r.folder, table) for r in (whole, resumed))
        assert one == two, table
    weights = [load_file(r.folder / "student" / "model.safetensors") for r in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def read_table(folder: Path, name: str) -> list[dict]:
    from opd_lab.tracking.run_folder import read_table

    return sorted(read_table(folder, name).to_pylist(), key=lambda row: json.dumps(row, default=str, sort_keys=True))


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path):
    with killed_after(2):
        run(tmp_path)
    folder = run_folder(settings(tmp_path), "opd")
    (folder / "checkpoints" / "step_000002" / "student.safetensors").write_bytes(b"torn")
    said: list[str] = []
    result = run(tmp_path, say=said.append)
    assert any("step_000002 is damaged" in line for line in said), said
    assert any("resumed after step 1" in line for line in said), said
    assert digest(result.folder / "metrics.parquet") == digest(run(tmp_path / "whole").folder / "metrics.parquet")


def test_a_finished_run_is_not_run_again(tmp_path):
    first = run(tmp_path)
    before = digest(first.folder / "journal.jsonl")
    said: list[str] = []
    again = run(tmp_path, say=said.append)
    assert again == first
    assert "finished already" in said[0]
    assert digest(first.folder / "journal.jsonl") == before
    anew = run(tmp_path, "checkpoint.resume=never")
    assert digest(anew.folder / "metrics.parquet") == digest(
        first.folder.with_name(first.folder.name + "-old1") / "metrics.parquet"
    )


def test_the_run_folder_holds_everything(tmp_path):
    folder = run(tmp_path).folder
    have = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "code.diff", "environment.txt", "status.json", "metrics.parquet", "timing.parquet"} <= have
    assert {"histograms.parquet", "high_loss_tokens.parquet", "rollouts.parquet", "evaluations.parquet"} <= have
    status = json.loads((folder / "status.json").read_text())
    assert status["status"] == "FINISHED"
    assert status["tags"]["divergence"] == "reverse_kl"
    assert status["tags"]["pass_at_k_estimator"] == "unbiased"
    assert status["params"]["optim.lr"] == 3e-4
    names = set(read.metrics(folder)["name"])
    wanted = "kl/reverse_mean_nats kl/reverse_p50_nats kl/reverse_p90_nats kl/reverse_p99_nats gap/mean_nats"
    wanted += " entropy/student_mean_nats entropy/teacher_mean_nats overlap/top16_fraction eval/test/avg_at_2"
    wanted += " eval/test/reverse_kl_mean_nats eval/validation/pass_at_2 loss/opd_value optim/gradient_norm"
    assert set(wanted.split()) <= names


def test_the_dearest_scalars_come_with_the_tables(tmp_path):
    folder = run(tmp_path, "diagnostics.every=2").folder
    assert set(read.table(folder, "positions")["step"]) == {2, 4}
    for name in ("top16_fraction", "outside_top16_fraction", "total_variation_mean_fraction"):
        assert set(read.metrics(folder, f"overlap/{name}")["step"]) == {2, 4}
    assert set(read.metrics(folder, "kl/jsd_mean_nats")["step"]) == {2, 4}


def test_the_objective_equals_the_exact_kl_for_plain_opd(tmp_path):
    metrics = read.metrics(run(tmp_path).folder).pivot(index="step", columns="name", values="value")
    trained = metrics[metrics["loss/opd_value"].notna()]
    assert len(trained) == 4
    assert (trained["loss/opd_value"] - trained["kl/reverse_mean_nats"]).abs().max() < 1e-6


def test_micro_batches_and_chunks_do_not_change_a_run(tmp_path):
    whole = read.metrics(run(tmp_path / "a").folder)
    split = read.metrics(run(tmp_path / "b", "optim.micro_batch=3", "optim.chunk_tokens=7").folder)
    both = whole.merge(split, on=["step", "name"])
    loss = both[both["name"] == "loss/opd_value"]
    assert (loss["value_x"] - loss["value_y"]).abs().max() < 1e-5


def test_a_learning_rate_of_zero_teaches_nothing(tmp_path):
    folder = run(tmp_path, "optim.lr=0.0").folder
    found = read.metrics(folder)
    accuracy = found[found["name"] == "eval/test/avg_at_2"]["value"]
    assert accuracy.nunique() == 1


def test_two_processes_do_not_share_a_run_folder(tmp_path):
    from opd_lab.run import alone

    with alone(run_folder(settings(tmp_path), "opd")), pytest.raises(ValueError, match="in use by another process"):
        run(tmp_path)


def test_several_updates_on_the_same_rollouts(tmp_path):
    one = read.metrics(run(tmp_path / "a", "method=scope", name="scope").folder)
    two = read.metrics(run(tmp_path / "b", "method=scope", "optim.updates_per_rollout=2", name="scope").folder)

    def first(metrics) -> float:
        return float(metrics[(metrics["name"] == "loss/total_value") & (metrics["step"] == 1)]["value"].iloc[0])

    assert first(one) == first(two)
    last = [m[(m["name"] == "kl/reverse_mean_nats") & (m["step"] == 4)]["value"].iloc[0] for m in (one, two)]
    assert last[0] != last[1]
