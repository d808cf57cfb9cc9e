"""What may share an axis, asked of the methods' own conventions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from opd_lab import config
from opd_lab.compare.curves import curves
from opd_lab.compare.guard import comparable, same_axis, unlike
from tests.compare.made_up import a_run


def run_of(home: Path, method: str, **tags: str) -> Path:
    """A run whose tags are those that the method of conf/method/ states."""
    values = yaml.safe_load((config.CONF / "method" / f"{method}.yaml").read_text())
    said: dict[str, Any] = config.method_of(values, []).conventions()
    said |= {"conventions": " ".join(said), **tags}
    return a_run(home, method, 0, [1], **said)


def refusal(*runs: Path) -> str:
    with pytest.raises(ValueError, match="loss/total_value can share an axis only where the loss is one quantity") as e:
        same_axis(runs, "loss/total_value")
    return str(e.value)


def test_a_kl_loss_and_a_squared_distance_are_refused_and_the_yardsticks_offered(tmp_path: Path) -> None:
    said = refusal(run_of(tmp_path, "opd"), run_of(tmp_path, "oprd"))
    assert "divergence: reverse_kl (opd-0.1-0), hidden_raw (oprd-0.1-0)" in said
    assert "denominator: tokens (opd-0.1-0), rollouts (oprd-0.1-0)" in said
    assert "a KL divergence, nats and a mean squared distance between hidden states have no common unit" in said
    assert "probe/reverse_kl_mean_nats (exact reverse KL on one set of probe rollouts)" in said
    assert "eval/test/reverse_kl_mean_nats (exact reverse KL on held-out rollouts)" in said
    assert "eval/*/avg_at_* (accuracy)" in said


def test_two_conventions_of_the_jsd_are_refused(tmp_path: Path) -> None:
    said = refusal(run_of(tmp_path, "jsd"), run_of(tmp_path, "jsd_unit"))
    assert "got divergence: jsd_0.5 (jsd-0.1-0), jsd_0.5_unit (jsd_unit-0.1-0); draw what means" in said
    said = refusal(run_of(tmp_path, "jsd_b10"), tmp_path / "jsd-0.1-0")
    assert "got divergence: jsd_0.5 (jsd-0.1-0), jsd_0.1 (jsd_b10-0.1-0); draw what means" in said


@pytest.mark.parametrize(
    ("one", "two", "words"),
    [
        ("opd", "forward_kl", "divergence: forward_kl (forward_kl-0.1-0), reverse_kl"),
        ("topk16_renormalise", "topk16_truncate", "topk_tail: renormalise (topk16_renormalise-0.1-0), truncate"),
        ("topk16_union", "topk16_intersection", "topk_support: intersection (topk16_intersection-0.1-0), union"),
        ("opd", "opd_sampled", "estimator: full_vocabulary (opd-0.1-0), k1_score"),
        ("rock_tokens", "rock_tokens_official_code", "align: label"),  # a convention that the method names itself
    ],
)
def test_the_convention_that_differs_is_named(tmp_path: Path, one: str, two: str, words: str) -> None:
    assert words in refusal(run_of(tmp_path, one), run_of(tmp_path, two))


def test_temperatures_are_conventions(tmp_path: Path) -> None:
    hot = a_run(tmp_path, "opd", 0, [1], lr=0.2, sampling_temperature="1.5")
    assert "sampling_temperature: 1 (opd-0.1-0), 1.5" in refusal(run_of(tmp_path, "opd", sampling_temperature="1"), hot)


def test_a_convention_that_only_one_run_states_is_a_difference(tmp_path: Path) -> None:
    runs = [a_run(tmp_path, "opd", 0, [1]), a_run(tmp_path, "kat", 0, [1], beta="0.5")]
    assert unlike(runs) == {"beta": {"0.5": "kat-0.1-0", "not said": "opd-0.1-0"}}


def test_what_is_one_quantity_may_be_drawn(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, "opd"), run_of(tmp_path, "oprd")]
    same_axis(runs, "kl/reverse_mean_nats")
    same_axis(runs[:1], "loss/total_value")
    end = config.method_of({"_target_": "opd_lab.methods.divergences.JSD", "beta": 1.0, "scale": "paper"}, [])
    said: dict[str, Any] = end.conventions()
    kl = a_run(tmp_path, "jsd_end", 0, [1], conventions=" ".join(said), **said)
    same_axis([runs[0], kl], "loss/total_value")
    with pytest.raises(ValueError, match="hidden_raw"):
        curves(runs, "loss/total_value")


def test_methods_are_ranked_by_what_means_the_same_for_each() -> None:
    for metric in ("probe/reverse_kl_mean_nats", "probe/forward_kl_mean_nats", "eval/test/avg_at_4"):
        comparable(metric, ["method", "optim.lr"])
    for metric in ("loss/total_value", "kat/cut_fraction", "weight/zero_fraction"):
        with pytest.raises(ValueError, match=f"the same for every trial, got {metric} in a space over method"):
            comparable(metric, ["method", "optim.lr"])
    comparable("kat/cut_fraction", ["method.eta"])  # one method's own, over its own settings
