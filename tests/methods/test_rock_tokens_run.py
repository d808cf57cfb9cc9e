"""Rock tokens chosen during a run cost no pass of their own."""

from __future__ import annotations

import pytest
import torch
from lab_run import settings

from opd_lab.chunk import Declared, UndeclaredSignalError
from opd_lab.models import LM
from opd_lab.run import identity, load_parts
from opd_lab.tracking.tracker import FanOut
from opd_lab.train import Trainer
from opd_lab.types import ENTROPY_TEACHER, REVERSE_KL, Batch

ONLINE = ("method=rock_tokens_online", "method.online_warmup=1", "method.online_refresh=1")


def test_the_update_reads_what_the_gradients_pass_saw(tmp_path, monkeypatch):
    """Two steps, whose micro-batches are a forward of either model each; every generated token is counted, also those
    that the first set froze; nothing else may be read."""
    asked = settings(tmp_path, *ONLINE, "optim.micro_batch=4")
    parts = load_parts(asked, lambda note: None)
    forwards, seen = [], []
    states = LM.states
    monkeypatch.setattr(LM, "states", lambda lm, *args: (forwards.append(lm.name), states(lm, *args))[1])
    update = type(parts.method).update
    monkeypatch.setattr(type(parts.method), "update", lambda m, s, b: (seen.append(b), update(m, s, b))[1])
    trainer = Trainer(asked, parts, FanOut([]), tmp_path)
    for _ in range(2):
        trainer.advance()
    assert forwards == ["teacher", "teacher", "student", "student"] * 2
    tokens = sum(int(batch.rollouts.mask_BT.sum()) for batch in seen)
    assert float(trainer.state["count_V"].sum()) == tokens
    nats = sum(float(batch[REVERSE_KL][batch.rollouts.mask_BT].double().sum()) for batch in seen)
    assert float(trainer.state["kl_sum_V"].sum()) == pytest.approx(nats)
    assert len(trainer.state["ids"]) == 8
    with pytest.raises(
        UndeclaredSignalError, match=r"entropy_teacher is not in needs\(\).batch or .update of RockTokens"
    ):
        seen[0][ENTROPY_TEACHER]
    assert isinstance(seen[0], Batch) and isinstance(seen[0].signals, Declared)
    assert not torch.isnan(trainer.state["kl_sum_V"]).any()


@pytest.mark.parametrize(("method", "k", "said"), [("topk16_student", 16, "16"), ("topk16_student", 500, "121")])
def test_the_tag_says_how_many_tokens_a_support_has(tmp_path, method: str, k: int, said: str):
    """The lab has 121 ids: more than that is all of them."""
    asked = settings(tmp_path, f"method={method}", f"method.k={k}")
    parts = load_parts(asked, lambda note: None)
    assert identity(asked, parts, method, tmp_path, "", step=0).tags["topk_k"] == said
