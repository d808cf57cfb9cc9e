"""A step against its definition: what the numbers are divided by, and whose token is whose."""

import torch
from contract_bench import LENGTHS, small_bench

from opd_lab.chunk import measure
from opd_lab.methods.opd import OPD
from opd_lab.step import tokens_of
from opd_lab.types import REVERSE_KL, Batch


def test_the_objective_is_the_mean_over_all_tokens_of_the_step():
    bench = small_bench(OPD())
    _, views = bench.batch()
    ids_N = bench.rollouts.response_BT[bench.rollouts.mask_BT]
    kl_N = measure(frozenset({REVERSE_KL}), ids_N, bench.student(bench.rollouts), views[0].teacher, chunk=4)[REVERSE_KL]
    assert len(kl_N) == sum(LENGTHS)
    for micro_batch in (1, 3, 100):
        found, _ = bench.run(micro_batch)
        assert abs(found.objective - float(kl_N.sum()) / sum(LENGTHS)) < 1e-12


def test_tokens_of_a_micro_batch_know_their_rollout_and_position():
    rollouts = small_bench(OPD()).rollouts
    consulted = {"per_rollout": torch.arange(8.0), "per_token": torch.arange(8.0)[:, None] + torch.zeros(8, 5)}
    tokens = tokens_of(Batch(rollouts, {}, consulted), slice(2, 5))
    assert tokens.row_N.tolist() == [2] * 4 + [3] * 5 + [4] * 2
    assert tokens.position_N.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1]
    assert tokens.ids_N.tolist() == rollouts.response_BT[2:5][rollouts.mask_BT[2:5]].tolist()
    for value_N in tokens.consulted.values():
        assert value_N.tolist() == tokens.row_N.tolist()
