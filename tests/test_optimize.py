"""The updates on one batch: schedules by hand, clipping, and what stops a run."""

import math
from dataclasses import replace

import pytest
import torch
from lab_run import killed_after, run, settings

from opd_lab import optimize
from opd_lab.chunk import Head, States
from opd_lab.methods.base import Method
from opd_lab.optimize import AdamW, DivergedError, gradient_norms, learning_rate
from opd_lab.step import View
from opd_lab.tracking import read
from opd_lab.types import LOGP_STUDENT, Batch, Needs
from tests.diagnostics.batches import rollouts_of


def rates(tmp_path, schedule: str, warmup: int, steps: int = 10) -> list[float]:
    optim = replace(settings(tmp_path).optim, lr=1.0, schedule=schedule, warmup_steps=warmup)
    return [learning_rate(optim, step, steps) for step in range(steps)]


def test_schedules_by_hand(tmp_path):
    assert rates(tmp_path, "constant", 0) == [1.0] * 10
    assert rates(tmp_path, "constant", 4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(tmp_path, "linear", 0) == pytest.approx([1 - step / 10 for step in range(10)])
    assert rates(tmp_path, "linear", 2) == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    cosine = rates(tmp_path, "cosine", 0)
    assert (cosine[0], cosine[5]) == pytest.approx((1.0, 0.5))
    assert cosine[2] == pytest.approx((1 + math.cos(0.2 * math.pi)) / 2)


def test_a_clipped_gradient_has_the_allowed_norm(tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    folder = run(tmp_path, "optim.clip_norm=0.01").folder
    logged = read.metrics(folder)
    before = logged[logged["name"] == "optim/gradient_norm"]["value"]
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)
    assert (before > 0.01).all()
    assert (logged[logged["name"] == "optim/clipped_fraction"]["value"] == 1).all()


def test_a_gradient_that_is_no_number_stops_the_run_and_names_the_rollout(tmp_path, monkeypatch):
    accumulate, calls = optimize.accumulate_gradient, []

    def broken(*args, **kwargs):
        found = accumulate(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2:  # the second step
            found.losses["opd"][1, 0] = math.inf
            found.values["opd"] = math.inf
        return found

    monkeypatch.setattr(optimize, "accumulate_gradient", broken)
    with pytest.raises(DivergedError, match=r"step 1: the objective is inf .*rollouts \[9\] have an infinite loss"):
        run(tmp_path)
    (folder,) = (tmp_path / "opd_lab").glob("opd-s0-????????")
    assert read.status(folder)["status"] == "FAILED"
    assert int(read.metrics(folder)["step"].max()) == 1, "what was done stays"


class Two(Method):
    """Pull token 0 up, push token 1 down."""

    paper = ""

    def needs(self):
        return Needs(tokens=frozenset({LOGP_STUDENT}))

    def weights(self, batch):
        ids_BT = batch.rollouts.response_BT
        return {"up": (batch.rollouts.mask_BT & (ids_BT == 0)).float(), "down": 3.0 * (ids_BT == 1)}

    def losses(self, tokens):
        return {"up": -tokens[LOGP_STUDENT], "down": tokens[LOGP_STUDENT]}


def test_the_gradient_norm_of_each_term_by_hand(tmp_path):
    """p(0) = s(theta) = 3/4. The slope of -log s is -(1 - s), of log(1 - s) it is -s; twice and once, over as many."""
    theta = torch.nn.Parameter(torch.tensor(3.0).log())
    head = Head(torch.tensor([[1.0], [0.0]]))

    def student(rollouts, signals):
        return States(theta.expand(int(rollouts.mask_BT.sum()), 1), head)

    batch = Batch(rollouts_of([[1], [1]], [[0, 1], [0]]), {})
    optimizer = AdamW([theta], lr=1.0)
    for micro_batch in (1, 2):
        optim = replace(settings(tmp_path).optim, micro_batch=micro_batch)
        norms = gradient_norms(Two(), batch, [View(None, None)] * (3 - micro_batch), student, optimizer, optim)
        assert norms == pytest.approx({"up": 0.25, "down": 3 * 0.75})
    assert theta.grad is None


def test_the_only_term_has_the_norm_of_the_step_and_looking_changes_nothing(tmp_path):
    seen, plain = (
        read.metrics(run(tmp_path / name, f"diagnostics.gradient_every={every}").folder)
        for name, every in (("a", 2), ("b", 0))
    )
    alone = seen[seen["name"] == "gradient/opd_norm"].set_index("step")["value"]
    step = seen[seen["name"] == "optim/gradient_norm"].set_index("step")["value"]
    assert list(alone.index) == [2, 4]
    assert alone.tolist() == pytest.approx(step[[2, 4]].tolist(), rel=1e-6)
    assert not plain["name"].str.startswith("gradient/").any()
    left = plain[plain["name"] == "optim/gradient_norm"].set_index("step")["value"]
    assert step.tolist() == left.tolist()


def test_terms_are_also_logged_under_the_names_of_their_paper(tmp_path):
    folder = run(tmp_path, "method=scope", "steps=1", "diagnostics.gradient_every=1", name="scope").folder
    logged = {row["name"]: row["value"] for row in read.metrics(folder).to_dict("records")}
    for term in ("correct", "wrong"):
        assert logged[f"scope/{term}_gradient_norm"] == logged[f"gradient/{term}_norm"] > 0


def test_small_updates_of_a_bfloat16_weight_are_not_lost():
    """Adam moves by lr whatever the gradient. Below 1 the nearest bf16 number is .99609: a step of 1e-4 is nothing to a
    weight of that type, a hundred of them are .01."""
    weights = [torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16)) for _ in range(2)]
    plain, ours = (
        kind(weights[i : i + 1], lr=1e-4, weight_decay=0.0) for i, kind in enumerate((torch.optim.AdamW, AdamW))
    )
    for _ in range(100):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        ours.collect()
        plain.step()
        ours.step()
        ours.zero_grad()
    assert [float(weight.detach()) for weight in weights] == [1.0, 0.98828125]  # 253/256 is next to .99 in bf16
    assert float(ours.param_groups[0]["params"][0].detach()) == pytest.approx(0.99, abs=1e-5)


def test_gradients_of_micro_batches_are_added_up_in_float32():
    """256 + 1 is 256 in bf16."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = AdamW([weight], lr=0.1)
    for size in (256.0, 1.0, 1.0):
        (weight * size).sum().backward()
        optimizer.collect()
        assert weight.grad is None
    assert float(optimizer.param_groups[0]["params"][0].grad) == 258.0


def test_a_float32_student_has_no_copies(tmp_path):
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = AdamW([weight], lr=0.1)
    assert optimizer.param_groups[0]["params"][0] is weight
    assert "copies" not in optimizer.state_dict()


def test_a_bfloat16_student_learns_and_resumes_bit_for_bit(tmp_path):
    words = ["model.student.dtype=bfloat16", "optim.lr=1e-5", "optim.micro_batch=3"]
    whole = run(tmp_path / "whole", *words).folder
    with killed_after(2):
        run(tmp_path / "killed", *words)
    again = run(tmp_path / "killed", *words).folder
    one, other = (read.metrics(folder).set_index(["name", "step"])["value"] for folder in (whole, again))
    names = [name for name in one.index if name[0].split("/")[0] not in ("time", "system")]
    assert other[names].equals(one[names])
    assert one["probe/reverse_kl_mean_nats", 4] < one["probe/reverse_kl_mean_nats", 0]


def test_a_float16_student_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model.student.dtype must be one of float32, bfloat16, got float16"):
        run(tmp_path, "model.student.dtype=float16")
