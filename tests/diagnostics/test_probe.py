"""The probe: the same tokens in every run, scored exactly, and a run that resumes knows them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opd_lab import checkpoint
from opd_lab.diagnostics import probe
from opd_lab.diagnostics.histograms import count
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.teacher.local import LocalTeacher
from opd_lab.tracking import read
from opd_lab.types import Report, Rollouts
from tests.lab_run import run
from tests.test_text_only_teacher import TextOnly
from tests.tiny import make

NAMES = {
    "probe/reverse_kl_mean_nats",
    "probe/forward_kl_mean_nats",
    "probe/reverse_kl_p99_nats",
    "probe/top16_overlap_fraction",
    "probe/entropy_student_mean_nats",
}
PROMPTS = [[3, 4], [5], [6, 7, 8]]


def decode(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def examined(student, teacher, rollouts: Rollouts, micro_batch: int = 2) -> Report:
    report = Report(7)
    probe.examine(
        report, rollouts, student, teacher, chunk=5, micro_batch=micro_batch, shown=2, decode=decode
    )  # fmt: skip
    return report


def test_every_number_equals_a_pass_over_whole_logits_written_out() -> None:
    first, student, teacher = make(seed=0), make(seed=1), make(seed=2)
    rollouts = probe.sample(TorchEngine(6, 64), first, PROMPTS, seed=3)
    report = examined(student, LocalTeacher(teacher), rollouts)
    reverse, forward, entropy, overlap = [], [], [], []
    for ids_L, real_L, on_T in zip(rollouts.ids_BL, rollouts.attention_BL, rollouts.mask_BT):
        with torch.no_grad():
            logp_LV, logq_LV = (
                lm.module(ids_L[real_L][None]).logits[0].double().log_softmax(-1) for lm in (student, teacher)
            )
        n = int(on_T.sum())
        reverse.append([])
        for logp_V, logq_V in zip(logp_LV[-n - 1 : -1], logq_LV[-n - 1 : -1]):
            reverse[-1].append(float((logp_V.exp() * (logp_V - logq_V)).sum()))
            forward.append(float((logq_V.exp() * (logq_V - logp_V)).sum()))
            entropy.append(-float((logp_V.exp() * logp_V).sum()))
            best = {int(v) for v in logp_V.topk(16).indices}
            overlap.append(len(best & {int(v) for v in logq_V.topk(16).indices}) / 16)
    every = sorted(value for row in reverse for value in row)
    near = lambda value: pytest.approx(value, rel=1e-4)  # noqa: E731
    assert report.scalars == {
        "probe/reverse_kl_mean_nats": near(sum(every) / len(every)),
        "probe/forward_kl_mean_nats": near(sum(forward) / len(forward)),
        "probe/reverse_kl_p99_nats": near(every[-1]),
        "probe/top16_overlap_fraction": near(sum(overlap) / len(overlap)),
        "probe/entropy_student_mean_nats": near(sum(entropy) / len(entropy)),
    }
    assert torch.equal(report.histograms["probe/reverse_nats"].counts_K, count(torch.tensor(every), "kl_nats").counts_K)
    assert [row["uid"] for row in report.tables["probe"]] == [0, 1]
    for row, kl in zip(report.tables["probe"], reverse):
        assert row["reverse_kl"] == pytest.approx(kl, rel=1e-4, abs=1e-6)
        assert row["step"] == 7 and len(row["tokens"]) == len(row["ids"]) == len(kl)


def test_batches_change_nothing_and_teacher_equal_to_student_is_0() -> None:
    first, student = make(seed=0), make(seed=1)
    rollouts = probe.sample(TorchEngine(6, 64), first, PROMPTS, seed=3)
    one, other = (examined(student, LocalTeacher(make(seed=2)), rollouts, size).scalars for size in (1, 3))
    assert one == pytest.approx(other, rel=1e-5)
    same = examined(student, LocalTeacher(student), rollouts).scalars
    assert same["probe/reverse_kl_p99_nats"] == 0.0 and same["probe/top16_overlap_fraction"] == 1.0


def test_without_distributions_there_is_no_kl() -> None:
    report = examined(make(seed=1), None, probe.sample(TorchEngine(6, 64), make(seed=0), PROMPTS, seed=3))
    assert set(report.scalars) == {"probe/entropy_student_mean_nats"} and not report.histograms
    assert not any("kl" in name or "teacher" in name for name in report.tables["probe"][0])


def probe_of(folder: Path) -> dict[int, list[list[int]]]:
    """Step -> ids of the rollouts shown."""
    table = read.table(folder, "probe")
    return {step: [list(ids) for ids in table[table["step"] == step]["ids"]] for step in set(table["step"])}


def test_the_tokens_are_the_same_at_every_evaluation_for_every_method_seed_and_after_a_kill(tmp_path: Path) -> None:
    whole = run(tmp_path / "a", "seed=0").folder
    other = run(tmp_path / "b", "seed=1", "method=opd_sampled", name="opd_sampled").folder
    tokens = probe_of(whole)
    assert sorted(tokens) == [0, 2, 4] and tokens[0] == tokens[2] == tokens[4]
    assert probe_of(other) == tokens
    metrics = read.metrics(whole)
    assert set(metrics["name"]) >= NAMES
    start = metrics[metrics["step"] == 0].set_index("name")["value"]
    elsewhere = read.metrics(other)
    assert dict(start[sorted(NAMES)]) == dict(
        elsewhere[elsewhere["step"] == 0].set_index("name")["value"][sorted(NAMES)]
    )

    def killed(progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "c", "seed=0", on_step=killed)
    again = run(tmp_path / "c", "seed=0").folder
    for name in ("metrics", "probe", "estimators", "histograms"):
        assert (again / f"{name}.parquet").read_bytes() == (whole / f"{name}.parquet").read_bytes(), name


def test_off_means_absent(tmp_path: Path) -> None:
    folder = run(tmp_path, "steps=1", "diagnostics.probe_rollouts=0", "diagnostics.estimator_rollouts=0").folder
    assert not any(name.startswith("probe/") for name in read.metrics(folder)["name"])
    assert not (folder / "probe.parquet").exists() and not (folder / "estimators.parquet").exists()
    saved = checkpoint.latest(folder / "checkpoints")
    assert saved is not None and checkpoint.extra(saved)["watch"]["probe"] is None


def test_a_teacher_that_only_writes_is_joined_by_one_that_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd_lab.run.LocalTeacher", lambda lm: (TextOnly if lm.name == "teacher" else LocalTeacher)(lm))
    writes = ["method=omniopd_lab", "steps=1"]
    alone = set(read.metrics(run(tmp_path / "a", *writes, name="omniopd_lab").folder)["name"])
    assert "probe/entropy_student_mean_nats" in alone and not any("reverse_kl" in name for name in alone)
    measure = "model.measure={path: 'lab:teacher', dtype: float32, trust_remote_code: false}"
    folder = run(tmp_path / "b", *writes, measure, name="omniopd_lab").folder
    names = set(read.metrics(folder)["name"])
    assert NAMES | {"eval/validation/reverse_kl_mean_nats"} <= names
    assert not any(name.startswith("kl/") for name in names)  # training tokens are not measured
    assert len(read.table(folder, "estimators"))
