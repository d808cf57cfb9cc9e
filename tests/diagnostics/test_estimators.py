"""Estimators against the exact KL: by hand, in expectation over every token, and on the lab."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from opd_lab.diagnostics.estimators import of_tokens, table
from opd_lab.tracking import read
from tests.lab_run import run
from tests.pair import LOGP, LOGQ, P

KL = 0.645816  # of the pair


def of_the_pair(k: int = 2) -> dict[str, torch.Tensor]:
    """Every token of the pair, sampled once."""
    return of_tokens(torch.arange(5), LOGP.expand(5, 5), LOGQ.expand(5, 5), k)


def test_each_estimate_by_hand() -> None:
    found = of_the_pair()
    gap = [math.log(p / q) for p, q in zip((0.5, 0.2, 0.15, 0.1, 0.05), (0.1, 0.4, 0.15, 0.05, 0.3))]
    assert found["exact"].tolist() == pytest.approx([KL] * 5, abs=1e-6)
    assert found["k1"].tolist() == pytest.approx(gap)
    assert found["k2"].tolist() == pytest.approx([g * g / 2 for g in gap])
    assert found["k3"].tolist() == pytest.approx([math.exp(-g) - 1 + g for g in gap])
    truncated = 0.5 * math.log(5) + 0.2 * math.log(0.5)  # on the student's two likeliest
    assert found["top2_truncate"].tolist() == pytest.approx([truncated] * 5)
    assert found["top2_bucket"].tolist() == pytest.approx([truncated + 0.3 * math.log(0.3 / 0.5)] * 5)
    renormalised = 5 / 7 * math.log(5 / 7 / 0.2) + 2 / 7 * math.log(2 / 7 / 0.8)
    assert found["top2_renormalise"].tolist() == pytest.approx([renormalised] * 5)


def test_k1_and_k3_have_no_bias_under_the_student_and_k2_has() -> None:
    found = of_the_pair()
    expected = {name: float((P * value_N).sum()) for name, value_N in found.items()}
    assert expected["k1"] == pytest.approx(KL, abs=1e-6)
    assert expected["k3"] == pytest.approx(KL, abs=1e-6)
    assert abs(expected["k2"] - KL) > 0.05


def test_the_whole_vocabulary_as_support_is_exact_whatever_the_tail() -> None:
    found = of_the_pair(k=5)
    for tail in ("truncate", "renormalise", "bucket"):
        torch.testing.assert_close(found[f"top5_{tail}"], found["exact"])


def test_the_table_by_hand_over_tokens_that_all_can_estimate() -> None:
    exact_N = torch.tensor([1.0, 2.0, 3.0, 5.0]).double()
    value_N = torch.tensor([2.0, -1.0, 3.0, math.inf]).double()  # errors 1, -3, 0
    exact, k1 = table(4, {"exact": exact_N, "k1": value_N})
    assert exact == {
        "step": 4,
        "estimator": "exact",
        "tokens": 3,
        "mean_nats": 2.0,
        "bias_nats": 0.0,
        "std_nats": 0.0,
        "rmse_nats": 0.0,
        "sign_error_fraction": 0.0,
    }
    assert (k1["tokens"], k1["mean_nats"], k1["bias_nats"]) == (3, pytest.approx(4 / 3), pytest.approx(-2 / 3))
    assert k1["rmse_nats"] ** 2 == pytest.approx(10 / 3)
    assert k1["rmse_nats"] ** 2 == pytest.approx(k1["bias_nats"] ** 2 + k1["std_nats"] ** 2)
    assert k1["sign_error_fraction"] == pytest.approx(1 / 3)


def test_on_the_lab_the_promises_hold(tmp_path: Path) -> None:
    folder = run(tmp_path, "steps=1", "diagnostics.estimator_rollouts=64").folder
    rows = read.table(folder, "estimators")
    assert sorted(rows["step"].unique()) == [0, 1]
    for _, at_step in rows.groupby("step"):
        by_name = {row["estimator"]: row for row in at_step.to_dict("records")}
        exact, n = by_name["exact"]["mean_nats"], by_name["exact"]["tokens"]
        assert len(by_name) == 7 and n > 1000
        for name in ("k1", "k3"):  # unbiased: within four standard errors
            assert abs(by_name[name]["bias_nats"]) < 4 * by_name[name]["std_nats"] / n**0.5
        assert by_name["k2"]["bias_nats"] > 4 * by_name["k2"]["std_nats"] / n**0.5
        assert by_name["k1"]["sign_error_fraction"] > 0.1
        assert all(by_name[name]["sign_error_fraction"] == 0 for name in ("exact", "k2", "k3", "top16_bucket"))
        assert by_name["top16_bucket"]["bias_nats"] < 0 and exact > 0
        assert by_name["top16_bucket"]["rmse_nats"] < by_name["k3"]["rmse_nats"] < by_name["k1"]["rmse_nats"]
