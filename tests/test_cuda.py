"""What a CUDA device changes: nothing but rounding. `pytest -m gpu`, on a machine that has one.

Uniforms are drawn on the CPU, so both devices decode the same tokens, and a step on one can be held against a step on
the other, number by number.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import lab_run
import pytest
import tiny
import torch

from opd_lab import models, preparation
from opd_lab.chunk import Head, States, measure
from opd_lab.config import CONF
from opd_lab.diagnostics import RECORD_DUE
from opd_lab.rollout.torch_engine import TorchEngine
from opd_lab.run import load_parts
from opd_lab.tracking import read
from opd_lab.tracking.system import System
from opd_lab.tracking.tracker import FanOut
from opd_lab.train import Trainer
from opd_lab.types import Behavior, Report

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:method.:UserWarning"),  # a warm-up is longer than two steps
]

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
METHODS.remove("matched_cut")  # replays the cuts of another run, by number
SMALL = ["method.window=8", "method.exempt_tokens=4", "method.warmup_steps=1"]
FITTING = {  # what lets a method that was made for long responses begin on the lab
    "exopd_teacher_base": ["model.reference={path: lab:student, dtype: float32, trust_remote_code: false}"],
    "kat_blocks": [*SMALL, "method.window_stride=8"],
    "kat_lab": ["method.warmup_steps=1"],
    "omniopd_lab": [],
    "oprd_bridge": ["method.fit_max_new_tokens=16"],
    "oprd_bridge_official_code": ["method.fit_max_new_tokens=16"],
}
FAMILIES = {"kat": SMALL, "omniopd": ["method.chunk_tokens=8"], "oprd_bridge": [], "oprd": ["model=lab_same_shape"]}
MEASURED = ("time/", "system/")


def fitting(method: str) -> list[str]:
    family = next((own for name, own in FAMILIES.items() if method.startswith(name)), [])
    return FITTING.get(method, family)


def trainer(folder: Path, method: str, device: str, *more: str) -> Trainer:
    words = [f"method={method}", *fitting(method), f"model.device={device}", "diagnostics.every=1", *more]
    settings = lab_run.settings(folder / device, *words)
    parts = load_parts(settings, lambda note: None)
    made = Trainer(settings, parts, FanOut([]), folder / device, say=lambda line: None)
    made.begin_with(preparation.prepare(settings, parts, lambda note: None))
    return made


def close(one: Report, other: Report, tolerance: float) -> None:
    """Every number of two reports that no clock measured."""
    scalars = [{k: v for k, v in r.scalars.items() if not k.startswith(MEASURED)} for r in (one, other)]
    assert scalars[0].keys() == scalars[1].keys()
    far = {
        name: (value, scalars[1][name])
        for name, value in scalars[0].items()
        if not math.isclose(value, scalars[1][name], rel_tol=tolerance, abs_tol=1e-4)
        and not (math.isnan(value) and math.isnan(scalars[1][name]))
    }
    assert not far
    assert one.tables.keys() == other.tables.keys()
    assert {n: len(rows) for n, rows in one.tables.items()} == {n: len(rows) for n, rows in other.tables.items()}
    assert one.histograms.keys() == other.histograms.keys()
    for name, histogram in one.histograms.items():
        moved = int((histogram.counts_K - other.histograms[name].counts_K).abs().sum()) / 2
        assert moved <= tolerance * int(histogram.counts_K.sum()) + 3, name  # across the border of a bin


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_same_on_both_devices(tmp_path: Path, method: str):
    cpu, cuda = (trainer(tmp_path, method, device) for device in ("cpu", "cuda"))
    assert cuda.parts.student.device.type == "cuda"
    close(cpu.advance(), cuda.advance(), 2e-3)
    close(cpu.advance(), cuda.advance(), 2e-2)  # after an update, whose first step of Adam is the sign of the gradient


def test_a_run_goes_on_where_it_was_killed(tmp_path: Path):
    whole = lab_run.run(tmp_path / "whole", "model.device=cuda")
    with lab_run.killed_after(2):
        lab_run.run(tmp_path / "killed", "model.device=cuda")
    again = lab_run.run(tmp_path / "killed", "model.device=cuda")
    one, other = (read.metrics(result.folder).set_index(["name", "step"])["value"] for result in (whole, again))
    assert one.index.sort_values().equals(other.index.sort_values())
    names = [name for name in one.index if not name[0].startswith(MEASURED)]
    assert other[names].tolist() == pytest.approx(one[names].tolist(), rel=2e-2, abs=1e-3, nan_ok=True)


def test_a_run_with_mlflow_finishes(tmp_path: Path):
    done = lab_run.run(tmp_path, "model.device=cuda", mlflow=True)
    metrics = read.metrics(done.folder)
    assert math.isfinite(done.objective)
    assert {"system/gpu_0_memory_usage_megabytes", "system/gpu_0_utilization_percentage"} <= set(metrics["name"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_work(tmp_path: Path, dtype: str):
    words = [f"model.teacher.dtype={dtype}", *(["model.student.dtype=bfloat16"] if dtype == "bfloat16" else [])]
    half, full = (trainer(tmp_path / name, "opd", "cuda", *more) for name, more in (("half", words), ("full", [])))
    one, other = half.advance(), full.advance()
    for name in ("loss/total_value", "kl/reverse_mean_nats", "entropy/student_mean_nats"):
        assert one.scalars[name] == pytest.approx(other.scalars[name], rel=0.1)
    assert math.isfinite(half.advance().scalars["loss/total_value"])


@pytest.mark.parametrize("kind", tiny.HEADS)
def test_every_architecture_decodes_and_scores_alike(kind: str):
    found = []
    for device in ("cpu", "cuda"):
        lm = tiny.make(kind)
        lm = replace(lm, module=lm.module.to(device))
        prompts = [[3, 4, 5], [3, 4, 5], [6, 7], [8]]
        rollouts = TorchEngine(12, 3).sample(
            lm,
            prompts,
            behavior=Behavior(1.0, 0.9),
            group_B=torch.arange(4),
            uid_B=torch.arange(4),
            generator=torch.Generator().manual_seed(5),
        )
        with torch.no_grad():
            states = lm.states(rollouts)
        logp_N = states.log_probs().gather(-1, rollouts.response_BT[rollouts.mask_BT][:, None])[:, 0]
        torch.testing.assert_close(logp_N, rollouts.logp_BT[rollouts.mask_BT], atol=1e-4, rtol=1e-4)
        found.append((rollouts.ids_BL.cpu(), logp_N.cpu()))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-4)


def test_every_recorded_signal_is_that_of_float64():
    """At a real vocabulary, where sums are long."""
    generator = torch.Generator().manual_seed(0)
    hidden_NH, other_NH = torch.randn(2, 64, 256, generator=generator, dtype=torch.float64)
    weight_VH = torch.randn(151_936, 256, generator=generator, dtype=torch.float64) / 8
    ids_N = torch.randint(0, 151_936, (64,), generator=generator)
    found = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        head = Head(weight_VH.to(device, dtype))
        states = [States(value_NH.to(device, dtype), head) for value_NH in (hidden_NH, hidden_NH + other_NH / 2)]
        found.append(measure(RECORD_DUE, ids_N.to(device), *states, chunk=24))
    for signal in RECORD_DUE:
        exact_N, got_N = found[0][signal], found[1][signal].double().cpu()
        torch.testing.assert_close(got_N, exact_N, atol=2e-3 * float(exact_N.abs().max()), rtol=1e-3, msg=str(signal))


def test_a_phase_s_seconds_are_those_of_its_work(tmp_path: Path):
    """Kernels are launched and not waited for; what a phase launched must not count as the next one's."""
    made = trainer(tmp_path, "opd", "cuda")
    size = 8192
    work = torch.randn(size, size, device="cuda")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(10):
        work @ work
    torch.cuda.synchronize()
    alone = time.perf_counter() - begin
    made.clock = {}
    with made.timed("first"):
        for _ in range(10):
            work @ work
    with made.timed("second"):
        pass
    assert made.clock["first"] > 0.5 * alone
    assert made.clock["second"] < 0.1 * alone


def test_system_names_the_device():
    torch.zeros(1, device="cuda")
    sample = System().sample()
    assert 0 <= sample["system/gpu_0_utilization_percentage"] <= 100
    assert sample["system/gpu_0_memory_usage_megabytes"] > 0
    assert sample["system/gpu_0_power_usage_watts"] > 0


def test_auto_is_the_device():
    assert models.resolve("auto").type == "cuda"
