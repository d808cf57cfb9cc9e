"""What a few sampled tokens cannot show: with tokens that the student itself draws, and many of them, every method with
a teacher moves the student towards it. It catches a reward whose sign is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contract_bench import YAMLS, Bench, method_in, small_bench
from torch import Tensor

from opd_lab.methods.policy_gradient import ON_AVERAGE
from opd_lab.types import Rollouts

SAMPLED = [path for path in YAMLS if method_in(path).not_towards_teacher == ON_AVERAGE]
COPIES = 64


def drawn(bench: Bench, rollouts: Rollouts, generator: torch.Generator) -> Rollouts:
    """The same prefixes, the tokens drawn anew from the student."""
    mask_BT, columns = rollouts.mask_BT, rollouts.prompt_columns
    logp_NV = log_probs(bench, rollouts)
    ids_N1 = torch.multinomial(logp_NV.exp(), 1, generator=generator)
    ids_BL, logp_BT, entropy_BT = rollouts.ids_BL.clone(), rollouts.logp_BT.clone(), rollouts.entropy_BT.clone()
    ids_BL[:, columns:][mask_BT] = ids_N1[:, 0]
    logp_BT[mask_BT] = logp_NV.gather(1, ids_N1)[:, 0]
    entropy_BT[mask_BT] = -(logp_NV.exp() * logp_NV).sum(-1)
    return replace(rollouts, ids_BL=ids_BL, logp_BT=logp_BT, behavior_logp_BT=logp_BT, entropy_BT=entropy_BT)


def log_probs(bench: Bench, rollouts: Rollouts) -> Tensor:
    return (bench.features(rollouts) @ bench.weight_VH.detach().T).log_softmax(-1)


@pytest.mark.parametrize("path", SAMPLED, ids=lambda path: path.stem)
def test_the_student_moves_towards_the_teacher(path: Path) -> None:
    method = method_in(path)
    bench = small_bench(method).with_fields(method.towards_teacher)
    groups = int(bench.rollouts.group_B.max()) + 1
    many = bench.rollouts.rows(torch.arange(len(bench.rollouts)).repeat(COPIES))
    copy_B = torch.arange(COPIES).repeat_interleave(len(bench.rollouts))
    many = replace(many, group_B=many.group_B + groups * copy_B)
    logq_NV = (bench.teacher.features(bench.rollouts) @ bench.teacher.weight_VH.T).log_softmax(-1)
    generator = torch.Generator().manual_seed(11)

    def kl() -> float:
        logp_NV = log_probs(bench, bench.rollouts)
        return float((logp_NV.exp() * (logp_NV - logq_NV)).sum(-1).mean())

    before = kl()
    for _ in range(3):
        _, grad_VH = bench.but(rollouts=drawn(bench, many, generator)).run(micro_batch=1000, chunk=4096)
        with torch.no_grad():
            bench.weight_VH -= 0.05 * grad_VH / grad_VH.norm()
    assert kl() < before
