"""Sampled-token OPD: exact expectations over the golden pair's vocabulary, what is refused, its metrics."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.chunk import Chunk
from opd_lab.methods.opd_sampled import OPDSampled, variance
from opd_lab.methods.sampled import Sampled
from opd_lab.types import LOGP_STUDENT, LOGP_TEACHER, Batch, Behavior, Facts, Rollouts, Source, Tokens
from tests.methods.by_hand import tokens_of
from tests.pair import LOGP, LOGQ, P, near, with_gradient

MU = torch.tensor([0.3, 0.3, 0.2, 0.1, 0.1], dtype=torch.float64)  # another sampler
REVERSE = (0.481811, -0.267793, -0.096872, 0.004733, -0.121879)
FACTS = Facts(
    steps=10, behavior=Behavior(), max_tokens=8, per_prompt=1, updates_per_rollout=1, vocabulary=5, graded=False,
    data="pair", teacher="local", engine="torch", tokenizer="pair",
)  # fmt: skip
ESTIMATORS = {"k1": "score", "k2": "direct", "k3": "direct"}


def loss(method: OPDSampled, logp_NV: Tensor, sampler_V: Tensor) -> Tensor:
    """Of each of the five tokens at the pair's prefix."""
    count = torch.arange(5)
    tokens = Tokens(
        ids_N=count, row_N=count, position_N=count, source_N=count, behavior_logp_N=sampler_V.log(),
        signals=Chunk(count, logp_NV.expand(5, 5), LOGQ.expand(5, 5)),
    )  # fmt: skip
    return method.losses(tokens)["opd"]


def expected_gradient(method: OPDSampled, sampler_V: Tensor = P) -> Tensor:
    return with_gradient(lambda logp_NV: sampler_V * loss(method, logp_NV, sampler_V))[1]


@pytest.mark.parametrize("estimator", ["k1", "k2"])
@pytest.mark.parametrize("importance", ["none", "token"])
def test_expected_gradient_is_that_of_plain_opd(estimator: str, importance: str) -> None:
    method = OPDSampled(estimator=estimator, form=ESTIMATORS[estimator], importance=importance)
    _, exact_V = with_gradient(lambda logp_NV: d.reverse_kl(logp_NV, LOGQ[None]))
    torch.testing.assert_close(expected_gradient(method), exact_V)
    near(exact_V, *REVERSE)


def test_k3_direct_descends_forward_kl_and_says_so() -> None:
    method = OPDSampled(estimator="k3", form="direct")
    near(expected_gradient(method), 0.4, -0.2, 0.0, 0.05, -0.25)
    assert method.conventions() == {
        "divergence": "forward_sampled", "estimator": "k3_direct", "denominator": "tokens", "importance": "none",
    }  # fmt: skip
    assert OPDSampled().conventions()["divergence"] == "reverse_kl"


@pytest.mark.parametrize(
    ("estimator", "expected_V"), [("k1", REVERSE), ("k2", REVERSE), ("k3", (0.4, -0.2, 0.0, 0.05, -0.25))]
)
def test_importance_corrects_for_another_sampler(estimator: str, expected_V: tuple[float, ...]) -> None:
    method = OPDSampled(estimator=estimator, form=ESTIMATORS[estimator], importance="token")
    near(expected_gradient(method, MU), *expected_V)


def test_without_importance_another_sampler_misleads() -> None:
    near(expected_gradient(OPDSampled(), MU), 0.400318, -0.240949, -0.024754, 0.052812, -0.187427)


def test_losses_worked_by_hand() -> None:
    """At token 0 the gap is ln 5, the ratio .5 / .3 = 5/3, cut at 1.2; at token 1 it is .2 / .3."""
    ln5, ln2 = math.log(5), math.log(2)
    near(loss(OPDSampled(), LOGP[None], MU)[:2], ln5 * math.log(0.5), -ln2 * math.log(0.2))
    cut = OPDSampled(importance="token", importance_max=1.2)
    near(loss(cut, LOGP[None], MU)[:2], 1.2 * ln5 * math.log(0.5), -2 / 3 * ln2 * math.log(0.2))
    near(loss(OPDSampled(estimator="k2", form="direct"), LOGP[None], MU)[:2], ln5**2 / 2, ln2**2 / 2)
    near(loss(OPDSampled(estimator="k3", form="direct"), LOGP[None], MU)[:2], ln5 - 0.8, 1 - ln2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"form": "direct"}, r"k1 with form direct cannot teach: its expected gradient is zero; use form score"),
        ({"estimator": "k3"}, r"k3 as a reward is biased; use estimator k1, or form direct"),
        ({"estimator": "k2"}, r"k2 as a reward is biased"),
        ({"estimator": "k4"}, r"method.estimator must be one of k1, k2, k3, got k4"),
        ({"form": "both"}, r"method.form must be one of score, direct, got both"),
        ({"importance": "rollout"}, r"method.importance must be one of none, token, got rollout"),
        ({"importance_max": 0.5}, r"method.importance_max must be at least 1, got 0.5"),
    ],
)
def test_what_cannot_work_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPDSampled(**fields)


OTHERS = [Behavior(temperature=0.7), Behavior(top_p=0.9), Behavior(top_k=20), Behavior(suppressed=(3,))]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "facts", [*(replace(FACTS, behavior=b) for b in OTHERS), replace(FACTS, updates_per_rollout=2)]
)
def test_tokens_of_another_sampler_are_refused_with_the_remedy(estimator: str, facts: Facts) -> None:
    method = OPDSampled(estimator=estimator, form=ESTIMATORS[estimator])
    method.check(FACTS)
    with pytest.raises(ValueError, match="use importance: token, or"):
        method.check(facts)
    replace(method, importance="token").check(facts)


def step(logp: list[list[float]], logq: list[list[float]]) -> Batch:
    """A step without prompts; NaN marks what was not generated."""
    logp_BT, logq_BT = torch.tensor(logp, dtype=torch.float64), torch.tensor(logq, dtype=torch.float64)
    mask_BT, count_B = ~logp_BT.isnan(), torch.arange(len(logp))
    rollouts = Rollouts(
        ids_BL=mask_BT.long(), attention_BL=mask_BT, source_BT=mask_BT.to(torch.int8) * Source.STUDENT,
        behavior_logp_BT=logp_BT, logp_BT=logp_BT, entropy_BT=logp_BT, stopped_B=count_B > -1, uid_B=count_B,
        group_B=count_B, reward_B=count_B * math.nan,
    )  # fmt: skip
    return Batch(rollouts, {LOGP_STUDENT: logp_BT, LOGP_TEACHER: logq_BT})


def test_metrics_of_the_advantage() -> None:
    """Advantages 0, 1, 2 and 5: mean 2, variance (4 + 1 + 0 + 9) / 4; the 1 % quantile lies .03 of the way to 1."""
    batch = step([[-1.0, -2, math.nan], [-3, -5, math.nan]], [[-1.0, -1, 0], [-1, 0, math.nan]])
    metrics = OPDSampled().metrics(batch, OPDSampled().weights(batch))
    assert math.isnan(metrics.pop("sampled/gradient_variance")), "nothing was tallied"
    assert metrics == pytest.approx({
        "sampled/advantage_mean_nats": 2.0,
        "sampled/advantage_std_nats": math.sqrt(14 / 4),
        "sampled/advantage_p01_nats": 0.03,
        "sampled/advantage_p99_nats": 2 + 3 * 0.97,
    })  # fmt: skip


IN_PROPORTION = [0] * 10 + [1] * 4 + [2] * 3 + [3] * 2 + [4]  # twenty draws from p exactly
BASELINE = Sampled(baseline="exact_kl")


@pytest.mark.parametrize(
    ("method", "trace"),
    [(OPDSampled(), 0.432378), (OPDSampled(estimator="k3", form="direct"), 1.583375), (BASELINE, 0.582760)],
)
def test_the_variance_of_the_gradient(method: OPDSampled, trace: float) -> None:
    """The trace of the covariance of a draw's gradient in the logits."""
    tokens = tokens_of(method, LOGP[None], LOGQ[None], IN_PROPORTION)
    assert variance(method.tally(tokens)) == pytest.approx(trace, abs=1e-6)
    halves = [
        method.tally(tokens_of(method, LOGP[None], LOGQ[None], part)) for part in (IN_PROPORTION[:7], IN_PROPORTION[7:])
    ]
    assert variance({k: halves[0][k] + halves[1][k] for k in halves[0]}) == pytest.approx(trace, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_slope_is_the_derivative_of_the_loss(estimator: str) -> None:
    method = OPDSampled(estimator=estimator, form=ESTIMATORS[estimator], importance="token")
    logp_N = LOGP.clone().requires_grad_()
    none_N, mu_N = torch.arange(5), MU.log()
    tokens = Tokens(none_N, none_N, none_N, none_N, mu_N, {LOGP_STUDENT: logp_N, LOGP_TEACHER: LOGQ})
    (slope_N,) = torch.autograd.grad(method.losses(tokens)["opd"].sum(), logp_N)
    torch.testing.assert_close(method.slope(tokens).detach(), slope_N)


def test_no_metrics_where_the_teacher_was_not_recorded() -> None:
    batch = step([[-1.0]], [[-1.0]])
    assert OPDSampled().metrics(replace(batch, signals={}), {}) == {}
