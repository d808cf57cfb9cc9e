"""The generated tokens of a step in one list: by hand, against the mask, and what is missing."""

from __future__ import annotations

import numpy as np
import torch

from opd_lab.diagnostics import RECORD_DUE
from opd_lab.diagnostics.flat import flatten, gap_N
from opd_lab.types import ENTROPY_STUDENT, LOGP_STUDENT, LOGP_TEACHER, REVERSE_KL, Source
from tests.diagnostics.batches import NAN, listed, random_batch, rollouts_of, with_signals


def test_by_hand() -> None:
    rollouts = rollouts_of([[7], [7, 8], [9]], [[1, 2, 3], [4, 5], [6]])
    rollouts.source_BT[1, 0] = Source.GIVEN  # not generated: its rollout's first token is the second
    kl_BT = torch.tensor([[1.0, NAN, 3.0], [9.0, 4.0, 9.0], [NAN, 9.0, 9.0]])
    tokens = listed(with_signals(rollouts, {REVERSE_KL: kl_BT}, step=5))
    assert tokens.step == 5
    assert tokens.ids_N.tolist() == [1, 2, 3, 5, 6]
    assert tokens.row_N.tolist() == [0, 0, 0, 1, 2]
    assert tokens.rank_N.tolist() == [0, 1, 2, 0, 0]
    assert tokens.length_B.tolist() == [3, 1, 1]
    np.testing.assert_array_equal(tokens[REVERSE_KL], [1.0, NAN, 3.0, 4.0, NAN])
    total_B, count_B = tokens.per_rollout(tokens[REVERSE_KL])
    assert (total_B.tolist(), count_B.tolist()) == ([4.0, 4.0, 0.0], [2, 1, 0])


def test_it_has_the_order_of_the_mask() -> None:
    batch = random_batch(0)
    tokens, mask_BT = listed(batch), batch.rollouts.mask_BT
    for signal in RECORD_DUE:
        assert torch.equal(torch.from_numpy(tokens[signal]), batch[signal][mask_BT].double())
    assert torch.equal(torch.from_numpy(tokens.pick(batch[REVERSE_KL])), batch[REVERSE_KL][mask_BT])


def test_what_nobody_recorded_is_nan_but_for_what_the_rollouts_know() -> None:
    rollouts = rollouts_of([[7]], [[1, 2]])
    rollouts.logp_BT[:] = torch.tensor([[-1.0, -2.0]])
    batch = with_signals(rollouts, {LOGP_TEACHER: torch.tensor([[-3.0, -1.0]]), ENTROPY_STUDENT: torch.ones(1, 2)})
    tokens = flatten(batch, frozenset({LOGP_TEACHER}))
    assert LOGP_STUDENT in tokens and ENTROPY_STUDENT not in tokens  # recorded, and not wanted
    assert np.isnan(tokens[ENTROPY_STUDENT]).all()
    assert gap_N(tokens).tolist() == [2.0, -1.0]


def test_a_step_without_tokens() -> None:
    tokens = listed(with_signals(rollouts_of([[7]], [[]]), {}))
    assert len(tokens.ids_N) == 0 and tokens.length_B.tolist() == [0]
    assert tokens.per_rollout(tokens[REVERSE_KL])[1].tolist() == [0]
