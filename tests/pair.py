"""One pair of distributions over 5 tokens for every hand-worked number: p the student, q the teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

P = torch.tensor([0.50, 0.20, 0.15, 0.10, 0.05], dtype=torch.float64)
Q = torch.tensor([0.10, 0.40, 0.15, 0.05, 0.30], dtype=torch.float64)
LOGP, LOGQ = P.log(), Q.log()
TOLERANCE = 1e-6  # the hand-worked numbers have six decimals


def with_gradient(loss: Callable[[Tensor], Tensor], logits_V: Tensor = LOGP) -> tuple[Tensor, Tensor]:
    """The loss of one prefix, given the student's log-probs [1, V], and its gradient with respect to the logits."""
    logits_V = logits_V.clone().requires_grad_()
    value = loss(logits_V.log_softmax(-1)[None]).sum()
    (gradient_V,) = torch.autograd.grad(value, logits_V)
    return value.detach(), gradient_V


def near(got: Tensor, *expected: float, tolerance: float = TOLERANCE) -> None:
    """Equal to hand-worked numbers, absolutely."""
    wanted = torch.tensor(expected, dtype=got.dtype).reshape(got.shape)
    torch.testing.assert_close(got.detach(), wanted, atol=tolerance, rtol=0)
