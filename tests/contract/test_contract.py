"""What every method promises. Discovered from conf/method: a new method is tested the day it appears."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from contract_bench import FACTS, Bench, small_bench
from omegaconf import OmegaConf
from torch import Tensor

from opd_lab.chunk import measure, teacher_must
from opd_lab.methods.base import Method
from opd_lab.methods.opd import OPD
from opd_lab.types import REVERSE_KL, Rollouts


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def padded(rollouts: Rollouts, columns: int) -> Rollouts:
    """The same rollouts with more padding on the right of the responses and on the left of the prompts."""
    wide = {f.name: getattr(rollouts, f.name) for f in fields(rollouts)}
    for name in ("source_BT", "behavior_logp_BT", "logp_BT", "entropy_BT"):
        fill = torch.nan if wide[name].is_floating_point() else 0
        wide[name] = torch.nn.functional.pad(wide[name], (0, columns), value=fill)
    wide["ids_BL"] = torch.nn.functional.pad(wide["ids_BL"], (columns, columns))
    wide["attention_BL"] = torch.nn.functional.pad(wide["attention_BL"], (columns, columns))
    return Rollouts(**wide)


def test_yaml_lists_every_knob_and_no_other(path: Path, method: Method):
    assert set(OmegaConf.load(path)) - {"_target_"} == {f.name for f in fields(method)}


def test_every_knob_says_what_it_is(path: Path):
    for line in path.read_text().splitlines():
        if re.match(r"[a-z]\w*:", line):
            assert "#" in line, f"{path.name}: say what this key is, with its unit: {line}"


def test_names_its_paper(method: Method):
    assert method.paper.startswith("https://")
    assert type(method).__module__.startswith("opd_lab.methods.")


def test_weights_and_losses_name_the_same_terms(bench: Bench):
    batch, _ = bench.batch()
    found, _ = bench.run()
    assert bench.method.weights(batch).keys() == found.values.keys() == found.losses.keys()


def test_weights_are_constants_at_least_zero_inside_the_mask(bench: Bench):
    batch, _ = bench.batch()
    for weight_BT in bench.method.weights(batch).values():
        assert not weight_BT.requires_grad
        assert weight_BT.isfinite().all()
        assert (weight_BT >= 0).all()
        assert (weight_BT[~batch.rollouts.mask_BT] == 0).all()


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_change_nothing(bench: Bench, micro_batch: int):
    whole, grad_VH = bench.run()
    split, split_VH = bench.run(micro_batch, chunk=1)
    assert whole.objective == pytest.approx(split.objective, rel=1e-9, abs=1e-12)
    same(grad_VH, split_VH)


def test_padding_changes_nothing(bench: Bench):
    _, grad_VH = bench.run()
    _, wide_VH = bench.but(rollouts=padded(bench.rollouts, 3)).run()
    same(grad_VH, wide_VH)


def test_order_of_rollouts_changes_nothing(bench: Bench):
    _, grad_VH = bench.run()
    _, other_VH = bench.but(rollouts=bench.rollouts.rows(torch.tensor([3, 1, 7, 5, 0, 6, 4, 2]))).run()
    same(grad_VH, other_VH)


def test_gradient_is_finite_and_reaches_the_student(bench: Bench):
    found, grad_VH = bench.run()
    assert grad_VH.isfinite().all()
    assert torch.tensor(list(found.values.values())).isfinite().all()
    assert grad_VH.abs().sum() > 0


def test_no_gradient_reaches_the_teacher(bench: Bench):
    teacher_VH = bench.teacher.weight_VH.clone().requires_grad_()
    bench.but(teacher=replace(bench.teacher, weight_VH=teacher_VH)).run()
    assert teacher_VH.grad is None


def test_the_teacher_matters(bench: Bench):
    _, grad_VH = bench.run()
    shuffled = replace(bench.teacher, weight_VH=bench.teacher.weight_VH.roll(1, 0))
    _, other_VH = bench.but(teacher=shuffled).run()
    if teacher_must(bench.method.needs().tokens | bench.method.needs().batch):
        assert not torch.allclose(grad_VH, other_VH)


def test_teacher_equal_to_student_teaches_nothing(bench: Bench):
    if bench.method.not_zero_at_teacher:
        pytest.skip(bench.method.not_zero_at_teacher)
    twin = replace(bench.teacher, features=bench.features, weight_VH=bench.weight_VH.detach())
    found, grad_VH = bench.but(teacher=twin).run()
    assert found.objective == pytest.approx(0, abs=1e-9)
    assert grad_VH.abs().max() < 1e-9


def test_neutral_setting_is_plain_opd(bench: Bench):
    if bench.method.neutral is None:
        assert "Neutral: none" in (__import__(type(bench.method).__module__, fromlist=["x"]).__doc__ or "")
        pytest.skip("no setting equals plain OPD; the card says why")
    neutral, grad_VH = bench.with_fields(bench.method.neutral).run()
    plain, plain_VH = bench.but(method=OPD()).run()
    assert neutral.objective == pytest.approx(plain.objective, rel=1e-6)
    torch.testing.assert_close(grad_VH, plain_VH, rtol=1e-6, atol=1e-9)


def test_two_runs_are_bitwise_equal(bench: Bench):
    (one, grad_VH), (two, again_VH) = bench.run(2), small_bench(bench.method).run(2)
    assert one.values == two.values
    assert torch.equal(grad_VH, again_VH)


def test_a_small_step_moves_the_student_towards_the_teacher(bench: Bench):
    if bench.method.not_towards_teacher:
        pytest.skip(bench.method.not_towards_teacher)
    bench = bench.with_fields(bench.method.towards_teacher)

    def kl() -> float:
        _, views = bench.but(method=OPD()).batch()
        mask_BT = bench.rollouts.mask_BT
        ids_N = bench.rollouts.response_BT[mask_BT]
        student = bench.student(bench.rollouts)
        return float(measure(frozenset({REVERSE_KL}), ids_N, student, views[0].teacher, chunk=9)[REVERSE_KL].mean())

    before = kl()
    for _ in range(5):
        _, grad_VH = bench.run()
        with torch.no_grad():
            bench.weight_VH -= 0.02 * grad_VH / grad_VH.norm()
    assert kl() < before


def test_metrics_are_named_after_the_method(bench: Bench):
    batch, _ = bench.batch()
    weights = bench.method.weights(batch)
    for name, value in bench.method.metrics(batch, weights).items():
        assert re.fullmatch(r"[a-z0-9_]+/[a-z0-9_]+", name), name
        assert isinstance(value, (int, float)) or value.dim() <= 1


def test_conventions_are_complete(method: Method):
    assert {"divergence", "estimator", "denominator"} <= method.conventions().keys()


@pytest.mark.filterwarnings("ignore:method")  # a setting may have a warning for its user
def test_the_lab_can_run_it_or_it_says_what_is_missing(method: Method):
    """A paper's own lengths do not fit the lab's short rollouts, and some methods need a third model."""
    try:
        method.check(FACTS)
    except ValueError as error:
        assert re.search(r"(method|model|rollout|data)\.\w+", str(error)), error
        assert re.search(r"got|need|limit", str(error)), error
