"""AOPD: golden losses by sampled token, and what it is at the ends of tau."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opd_lab.methods.aopd import AOPD
from opd_lab.methods.base import TRAINED
from opd_lab.types import LOGP_STUDENT, LOGP_TEACHER
from tests.methods.by_hand import FACTS, batch_of, token_losses
from tests.pair import LOGP, LOGQ, P, near, with_gradient


def gradient(method: AOPD) -> Tensor:
    """Of the expected loss over the vocabulary."""
    return with_gradient(lambda logp: P * token_losses(method, logp, LOGQ[None], range(5))[TRAINED])[1]


def test_by_sampled_token() -> None:
    """q - p = -.4 .2 0 -.05 .25: tokens 0, 2 and 3 are not wanted more."""
    method = AOPD(k=2)
    assert method.gated(LOGP, LOGQ).tolist() == [True, False, True, True, False]
    loss_N = token_losses(method, LOGP[None], LOGQ[None], range(5))[TRAINED]
    near(loss_N, 0.814787, 1.115577, 0.814787, 0.814787, 5.367632)
    near(gradient(method), 0.376609, -0.287986, 0.112983, 0.075322, -0.276927)


def test_at_its_ends() -> None:
    near(gradient(AOPD(k=2, tau=-1.0)), 0.481811, -0.267793, -0.096872, 0.004733, -0.121879)
    near(gradient(AOPD(k=5, tau=1.0)), 0.4, -0.2, 0.0, 0.05, -0.25)
    near(gradient(AOPD(k=2, tau=1.0)), 0.35, -0.26, 0.105, 0.07, -0.265)


def test_averages_over_rollouts() -> None:
    method = AOPD()
    batch = batch_of(method, {LOGP_STUDENT: [[-1.0] * 4, [-1.0], [-1.0] * 2]})
    weight_BT = method.weights(batch)[TRAINED]
    near(weight_BT.sum(1) / 7, 1 / 3, 1 / 3, 1 / 3)
    near(weight_BT[0], *[7 / 12] * 4)


def test_gate_fraction_and_ranges() -> None:
    batch = batch_of(AOPD(), {LOGP_STUDENT: [[-1.0, -1.0]]})
    assert AOPD().metrics(batch, {}) == {}
    signals = {LOGP_STUDENT: torch.tensor([[-1.0, -1.0]]), LOGP_TEACHER: torch.tensor([[-2.0, -0.5]])}
    assert AOPD().metrics(replace(batch, signals=signals), {}) == {"aopd/gate_fraction": 0.5}
    with pytest.raises(ValueError, match=r"method.tau must be in \[-1, 1\], a difference of probabilities, got 2"):
        AOPD(tau=2.0)
    with pytest.raises(ValueError, match=r"method.k must be between 1 and the vocabulary size 151936, got 0"):
        AOPD(k=0).check(FACTS)
    assert AOPD.status == "experimental"
