"""TRB: the golden vectors of the blend and the loss, the laws of both, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.base import TRAINED
from opd_lab.methods.blends import blend_metrics, nearest_in_ball, tilted
from opd_lab.methods.trb import TRB
from opd_lab.types import Batch, Behavior
from tests.methods.by_hand import FACTS, token_losses
from tests.pair import near, with_gradient
from tests.tiny import rollouts

Z_P = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5], dtype=torch.float64)
Z_Q = torch.tensor([0.0, 2.5, 0.0, 1.0, -2.0], dtype=torch.float64)
LOGP, LOGQ = Z_P.log_softmax(-1)[None], Z_Q.log_softmax(-1)[None]
HALVINGS = 60
BALLS = {  # eps: beta, KL(mu || p), KL(mu || q)
    0.001: (0.028115776, 0.001, 1.264590946),
    0.01: (0.086714981, 0.01, 1.117773191),
    0.02: (0.121081987, 0.02, 1.031613966),
    0.05: (0.187600028, 0.05, 0.867566420),
    0.5: (0.598218737, 0.5, 0.147617675),
    5.0: (1.0, 0.993612356, 0.0),
}


def dist(*p: float) -> Tensor:
    return torch.tensor([p], dtype=torch.float64).log()


def blend(logp_RV: Tensor, logq_RV: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """mu, beta, KL(mu || p)."""
    logmu_RV, columns = nearest_in_ball(logp_RV, logq_RV, eps, HALVINGS)
    return logmu_RV, columns["beta"], columns["deviation"]


def many_pairs(rows: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple((2 * torch.randn(rows, 9, generator=generator, dtype=torch.float64)).log_softmax(-1) for _ in "pq")  # type: ignore[return-value]


def test_the_pair() -> None:
    near(LOGP.exp()[0], 0.56302123, 0.20712394, 0.07619664, 0.02803118, 0.12562702)
    near(LOGQ.exp()[0], 0.05869884, 0.71509829, 0.05869884, 0.15956000, 0.00794402)
    near(d.reverse_kl(LOGP, LOGQ), 1.334259083)
    near(d.reverse_kl(LOGQ, LOGP), 0.993612356)
    r_V = (LOGQ - LOGP)[0]
    p_V = LOGP.exp()[0]
    near((p_V * r_V**2).sum() - (p_V * r_V).sum() ** 2, 2.463301903)


@pytest.mark.parametrize("eps", BALLS)
def test_g1_the_largest_step_inside_the_ball(eps: float) -> None:
    logmu_RV, beta_R, deviation_R = blend(LOGP, LOGQ, eps)
    near(beta_R, BALLS[eps][0])
    near(deviation_R, BALLS[eps][1])
    near(d.reverse_kl(logmu_RV, LOGQ), BALLS[eps][2])
    assert eps != 5.0 or beta_R == 1


def test_g1_the_blends_themselves() -> None:
    near(blend(LOGP, LOGQ, 0.02)[0].exp()[0], 0.49376102, 0.27750490, 0.08513307, 0.03990013, 0.10370088)
    half = tilted(LOGP, LOGQ, torch.tensor([[0.5]], dtype=torch.float64))
    near(half.exp()[0], 0.24835262, 0.52576251, 0.09136382, 0.09136382, 0.04315721)
    near(d.reverse_kl(half, LOGP), 0.364918835)


@pytest.mark.parametrize("eps", [0.0004, 0.001, 0.02, 0.5])
def test_g1_in_single_precision(eps: float) -> None:
    beta = float(blend(LOGP, LOGQ, eps)[1])
    assert eps != 0.0004 or beta == pytest.approx(0.017867, abs=1e-6)
    single = nearest_in_ball(LOGP.float(), LOGQ.float(), eps, 30)[1]["beta"]
    assert float(single) == pytest.approx(beta, rel=1e-4)


def test_g1_small_budgets_follow_the_square_root() -> None:
    for eps, root in ((0.001, 0.0284942), (0.01, 0.0901065), (0.02, 0.1274299), (0.05, 0.2014843), (0.5, 0.6371493)):
        assert math.sqrt(2 * eps / 2.463301903) == pytest.approx(root, abs=1e-6)
        assert float(blend(LOGP, LOGQ, eps)[1]) == pytest.approx(root, abs=eps)  # beta = root + O(eps)


def test_g2_edges() -> None:
    logmu_RV, beta_R, _ = blend(LOGP, LOGQ, 0.0)
    assert torch.equal(logmu_RV, LOGP) and beta_R == 0
    logmu_RV, beta_R, _ = blend(LOGP, LOGP, 0.02)
    assert torch.equal(logmu_RV, LOGP) and beta_R == 1
    gone_R1 = torch.full((1, 1), -torch.inf, dtype=torch.float64)
    wide = [torch.cat([logp_RV, gone_R1], 1) for logp_RV in (LOGP, LOGQ)]
    for eps in (0.0, 0.02, 5.0):
        logmu_RV, beta_R, _ = blend(wide[0], wide[1], eps)
        near(beta_R, float(blend(LOGP, LOGQ, eps)[1]))
        assert logmu_RV[0, 5] == -torch.inf and not logmu_RV.isnan().any()


def test_g3_every_row_has_its_own_beta() -> None:
    logp_RV = torch.cat([dist(0.5, 0.3, 0.2), torch.tensor([[3.0, 0, -1]], dtype=torch.float64).log_softmax(-1)])
    logq_RV = torch.cat([dist(0.2, 0.5, 0.3), torch.tensor([[3.5, 0, -1.5]], dtype=torch.float64).log_softmax(-1)])
    logmu_RV, beta_R, deviation_R = blend(logp_RV, logq_RV, 0.05)
    near(beta_R, 0.467443476, 1.0)
    near(logmu_RV.exp(), 0.34351112, 0.40161346, 0.25487542, 0.96438030, 0.02912176, 0.00649794)
    near(deviation_R, 0.05, 0.008555515)
    assert torch.equal(logmu_RV[1], logq_RV[1])


G4 = {  # form, tail: value, gradient
    ("detached_weights", "bucket"): (1.319602357, (0.90988425, -0.60656727, -0.10054926, -0.03699001, -0.16577771)),
    ("direct", "truncate"): (1.016285379, (0.83015611, -0.41953641, -0.13612000, -0.05007575, -0.22442394)),
    ("direct", "renormalise"): (1.324333072, (0.68814177, -0.68814177, 0.0, 0.0, 0.0)),
    ("direct", "bucket"): (1.019966670, (0.69867031, -0.46790733, -0.07649769, -0.02814193, -0.12612336)),
}
EXACT = (1.334259083, (0.52171701, -0.53300481, -0.08178656, -0.08614995, 0.17922431))


def loss(z_V: Tensor, logq_RV: Tensor, **keys: Any) -> tuple[Tensor, Tensor]:
    method = TRB(**keys)
    return with_gradient(lambda logp_NV: token_losses(method, logp_NV, logq_RV)[TRAINED], z_V)


@pytest.mark.parametrize(("form", "tail"), G4)
def test_g4_loss_and_gradient(form: str, tail: str) -> None:
    value, gradient_V = loss(Z_P, LOGQ, k=2, form=form, tail=tail)
    near(value, G4[form, tail][0])
    near(gradient_V, *G4[form, tail][1])
    # the whole vocabulary, as k or as support
    value, gradient_V = loss(Z_P, LOGQ, k=5, form=form, tail=tail)
    near(value, EXACT[0])
    near(gradient_V, *EXACT[1])
    value, gradient_V = loss(Z_P, LOGQ, support="full", form=form, tail=tail)
    near(value, EXACT[0])
    near(gradient_V, *EXACT[1])


@pytest.mark.parametrize(("form", "tail"), G4)
def test_g4_between_equals(form: str, tail: str) -> None:
    equal = dist(0.3, 0.3, 0.2, 0.2)
    expected = (0.12, 0.12, -0.12, -0.12) if tail == "truncate" else (0.0,) * 4
    near(loss(equal[0], equal, k=2, form=form, tail=tail)[1], *expected)
    assert (TRB(k=2, form=form, tail=tail).not_zero_at_teacher is not None) == (tail == "truncate")


def test_g5_the_divergence_of_whole_rollouts_is_what_was_spent() -> None:
    first = blend(dist(0.5, 0.3, 0.2), dist(0.2, 0.5, 0.3), 0.05)
    third = 1 / 3
    p = torch.cat([dist(0.6, 0.3, 0.1), dist(0.2, 0.5, 0.3), dist(third, third, third)])
    q = torch.cat([dist(0.1, 0.8, 0.1), dist(0.25, 0.5, 0.25), dist(0.05, 0.05, 0.9)])
    logmu_RV, beta_R, deviation_R = blend(p, q, 0.05)
    near(beta_R, 0.242061933, 1.0, 0.221344869)
    near(deviation_R, 0.05, 0.010205499, 0.05)
    spent = first[2] + (first[0].exp()[0] * deviation_R).sum()
    near(spent, 0.084017993)
    logmu_AB = first[0][0, :, None] + logmu_RV  # the nine rollouts
    logp_AB = dist(0.5, 0.3, 0.2)[0, :, None] + p
    near(d.reverse_kl(logmu_AB.flatten(), logp_AB.flatten()), 0.084017993)


def test_g6_one_event_for_unlike_stop_ids() -> None:
    z_p, z_q = (torch.tensor([z], dtype=torch.float64) for z in ((1.0, 0, 0.5, -2), (0.5, 0.5, -3, 1)))
    near(d.reverse_kl(z_p.log_softmax(-1), z_q.log_softmax(-1)), 1.228539263)
    near(blend(z_p.log_softmax(-1), z_q.log_softmax(-1), 0.02)[1], 0.122666861)

    def merged(z_1V: Tensor) -> Tensor:
        return torch.cat([z_1V[:, :2], z_1V[:, 2:].logsumexp(-1, keepdim=True)], -1).log_softmax(-1)

    near(merged(z_p).exp(), 0.49402302, 0.18174091, 0.32423607)
    near(merged(z_q).exp(), 0.27181900, 0.27181900, 0.45636199)
    near(d.reverse_kl(merged(z_p), merged(z_q)), 0.111162759)
    logmu_RV, beta_R, _ = blend(merged(z_p), merged(z_q), 0.02)
    near(beta_R, 0.420578692)
    near(logmu_RV.exp(), 0.39455792, 0.22104021, 0.38440186)


def test_g7_the_budget_falls_to_zero() -> None:
    trb = TRB(initial_budget_nats=0.02, warmup_steps=50)
    for step, eps in ((0, 0.02), (1, 0.0196), (25, 0.01), (49, 0.0004), (50, 0.0), (51, 0.0)):
        assert trb.budget(step) == pytest.approx(eps, abs=1e-12)
        assert (trb.behavior(Behavior(), step, {}).mix is None) == (eps == 0)
    assert trb.behavior(Behavior(), 50, {}) == Behavior()
    short = TRB(initial_budget_nats=0.01, warmup_steps=4)
    assert [short.budget(step) for step in range(5)] == pytest.approx([0.01, 0.0075, 0.005, 0.0025, 0.0])
    assert TRB(schedule="constant").budget(10**6) == 0.02


def test_the_budget_is_kept_and_used() -> None:
    logp_RV, logq_RV = many_pairs()
    before_R = torch.zeros(len(logp_RV), dtype=torch.float64)
    for eps in (1e-3, 0.02, 0.3, 2.0):
        _, beta_R, deviation_R = blend(logp_RV, logq_RV, eps)
        assert (deviation_R <= eps).all()
        inner_R = (beta_R > 0) & (beta_R < 1)
        torch.testing.assert_close(deviation_R[inner_R], torch.full_like(deviation_R[inner_R], eps), atol=1e-6, rtol=0)
        assert (beta_R >= before_R).all()  # more budget, more teacher
        before_R = beta_R


def test_the_vocabulary_may_be_permuted_and_logits_shifted() -> None:
    logp_RV, logq_RV = many_pairs()
    order_V = torch.tensor([3, 8, 0, 5, 1, 7, 2, 6, 4])
    logmu_RV, beta_R, _ = blend(logp_RV, logq_RV, 0.05)
    moved_RV, moved_R, _ = blend(logp_RV[:, order_V], logq_RV[:, order_V], 0.05)
    torch.testing.assert_close(moved_RV, logmu_RV[:, order_V], atol=1e-9, rtol=0)
    torch.testing.assert_close(moved_R, beta_R, atol=1e-9, rtol=0)
    logits_RV = 0.7 * (logp_RV + 4.0) + 0.3 * (logq_RV - 2.0)
    tilt = tilted(logp_RV, logq_RV, torch.full((1, 1), 0.3, dtype=torch.float64))
    torch.testing.assert_close(logits_RV.log_softmax(-1), tilt)


def test_one_sample_estimates_are_biased_under_the_blend() -> None:
    logmu_RV, _, deviation_R = blend(LOGP, LOGQ, 0.02)
    mu_V, gap_V = logmu_RV.exp()[0], (LOGP - LOGQ)[0]
    near((mu_V * gap_V).sum(), 1.011613966)
    near((mu_V * gap_V).sum(), float(d.reverse_kl(logmu_RV, LOGQ) - deviation_R))
    near((mu_V * (LOGP[0].exp() / mu_V) * gap_V).sum(), 1.334259083)
    near((mu_V * (logmu_RV - LOGP)[0]).sum(), 0.02)  # E_mu[log mu - log p] = KL(mu || p)


def test_nothing_feasible_is_nearer_to_the_teacher() -> None:
    generator = torch.Generator().manual_seed(1)
    logmu_RV, _, _ = blend(LOGP, LOGQ, 0.02)
    noise = torch.randn(1000, 5, generator=generator, dtype=torch.float64)
    tried_RV = torch.cat([blend(LOGP, (LOGQ + s * noise).log_softmax(-1), 0.02)[0] for s in (0.05, 0.3, 1.0, 3.0)])
    assert (d.reverse_kl(tried_RV, LOGP) <= 0.02).all()
    assert (d.reverse_kl(tried_RV, LOGQ) >= d.reverse_kl(logmu_RV, LOGQ) - 1e-9).all()


def test_traps_of_the_blend() -> None:
    """Other readings of the ball, at the budget 0.02: each is another number."""
    beta = float(blend(LOGP, LOGQ, 0.02)[1])
    exchanged = tilted(LOGQ, LOGP, torch.tensor([[beta]], dtype=torch.float64))
    near(d.reverse_kl(exchanged, LOGP), 0.866397)
    w = 0.133743  # arithmetic mixture at the same budget
    mixture = torch.logaddexp(LOGP + math.log(1 - w), LOGQ + math.log(w))
    near(d.reverse_kl(mixture, LOGP), 0.02)
    near(d.reverse_kl(mixture, LOGQ), 1.042923)
    swapped = tilted(LOGP, LOGQ, torch.tensor([[0.123939]], dtype=torch.float64))
    near(d.reverse_kl(LOGP, swapped), 0.02)  # KL(p || mu) where KL(mu || p) is meant


def test_the_sampled_token_does_not_matter() -> None:
    for ids in ([0], [4]):
        got = with_gradient(lambda logp_NV, ids=ids: token_losses(TRB(k=2), logp_NV, LOGQ, ids)[TRAINED], Z_P)
        near(got[1], *G4["detached_weights", "bucket"][1])
    one = token_losses(TRB(k=2), LOGP, LOGQ, [0], behavior_logp_N=torch.tensor([-9.0]))[TRAINED]
    assert torch.equal(one, token_losses(TRB(k=2), LOGP, LOGQ, [0])[TRAINED])


def test_metrics_speak_of_generated_tokens_alone() -> None:
    some = rollouts([[3], [3]], [[4, 5, 1], [6]])
    nan = math.nan
    extra = {
        "beta": torch.tensor([[0.0, 0.5, 1.0], [1.0, nan, nan]]),
        "deviation": torch.tensor([[0.0, 0.02, 0.01], [0.03, nan, nan]]),
        "gain": torch.tensor([[0.0, 0.1, 0.3], [0.4, nan, nan]]),
    }
    logp_BT = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, nan, nan]])
    mu_BT = torch.tensor([[-1.0, -1.5, -3.1], [-0.8, nan, nan]])
    batch = Batch(replace(some, extra=extra, logp_BT=logp_BT, behavior_logp_BT=mu_BT), {}, step=3)
    found = TRB(initial_budget_nats=0.02, warmup_steps=4).metrics(batch, {})
    expected = {
        "blend/budget_nats": 0.01,  # step 2, whose report is the third
        "blend/beta_mean_fraction": 0.625,
        "blend/beta_p10_fraction": 0.15,
        "blend/beta_p50_fraction": 0.75,
        "blend/beta_p90_fraction": 1.0,
        "blend/teacher_feasible_fraction": 0.5,
        "blend/budget_active_fraction": 0.25,
        "blend/deviation_mean_nats": 0.015,
        "blend/deviation_sequence_mean_nats": 0.03,
        "blend/log_ratio_sequence_mean_nats": 0.3,
        "blend/teacher_gain_mean_nats": 0.2,
    }
    assert {name: value for name, value in found.items() if not isinstance(value, Tensor)} == pytest.approx(
        expected, abs=1e-6
    )
    assert found["blend/beta_fraction"].tolist() == [0.0, 0.5, 1.0, 1.0]  # type: ignore[union-attr]
    assert blend_metrics(Batch(some, {}, step=3)) == {}
    assert TRB().metrics(Batch(some, {}, step=99), {}) == {"blend/budget_nats": 0.0}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"initial_budget_nats": -0.01}, r"initial_budget_nats must be >= 0, got -0.01; 0 is plain OPD"),
        ({"warmup_steps": 0}, "warmup_steps must be >= 1, got 0; for no warm-up set method.initial_budget_nats=0"),
        ({"schedule": "cosine"}, "method.schedule must be one of linear, constant, got cosine"),
        ({"bisection_steps": 3}, r"method.bisection_steps must be in \[10, 60\], got 3"),
        ({"support": "sampled"}, "support must be student or full, got sampled.*one-sample estimates.*biased"),
        ({"k": 0}, "method.k must be >= 1, got 0"),
        ({"form": "score"}, "method.form must be one of direct, detached_weights, got score"),
        ({"tail": "none"}, "method.tail must be one of bucket"),
    ],
)
def test_values_that_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TRB(**keys)


def test_what_cannot_be_blended_is_refused() -> None:
    for tempered in (Behavior(temperature=0.7), Behavior(top_p=0.9), Behavior(top_k=5), Behavior(suppressed=(3,))):
        facts = replace(FACTS, behavior=tempered, steps=100)
        with pytest.raises(ValueError, match=r"TRB blends the untempered distributions; set rollout\.temperature=1"):
            TRB().check(facts)
        TRB(initial_budget_nats=0).check(facts)
    with pytest.warns(UserWarning, match="warmup_steps=50 is more than the 20 steps .* never becomes on-policy"):
        TRB().check(replace(FACTS, steps=20))
