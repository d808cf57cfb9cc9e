"""KAT on a step made by hand: rollouts given by their divergences, cut post hoc at a fixed threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opd_lab import divergence as d
from opd_lab.methods.base import TRAINED
from opd_lab.methods.kat import KAT
from opd_lab.methods.kat_scan import Trap
from opd_lab.types import Batch, State
from tests.methods.by_hand import Silent, batch_of, padded

A, B = [2.0, 1, 0.5, 0.05, 0.04, 0.03, 0.02, 0.01], [0.8, 0.6, 0.7, 0.9, 0.5]  # G6
TWO_RUNS = [1.0] * 4 + [0.01] * 5 + [2.0] + [0.01] * 7 + [1.0]  # G3, reset
SMALL: dict[str, Any] = {
    **{"window": 4, "consecutive": 3, "exempt_tokens": 0, "warmup_steps": 0},
    **{"threshold": "fixed", "threshold_nats": 0.3, "stop": "posthoc", "support": "full"},
}


def kat(**keys: Any) -> KAT:
    return KAT(**SMALL | keys)


def g6(**keys: Any) -> KAT:
    return kat(**{"window": 2, "consecutive": 2, "exempt_tokens": 1, "threshold_nats": 0.1} | keys)


def trap(d_T: Sequence[float], method: KAT, threshold: float = 0.3) -> Trap:
    return method.trap(padded([d_T]), threshold)


def place(d_T: Sequence[float], threshold: float = 0.3, **keys: Any) -> tuple[int, int | None]:
    """(kept, trigger) of one rollout, as the specification prints them."""
    onset, trigger, _ = (int(tokens_B) for tokens_B in trap(d_T, kat(**keys), threshold))
    return (len(d_T), None) if trigger < 0 else (onset, trigger)


def step_of(method: KAT, rows: Sequence[Sequence[float]], state: State | None = None, step: int = 0) -> Batch:
    """A step whose rollouts have these divergences."""
    batch = replace(batch_of(method, {method.divergence: rows}), state=state or method.init_state(), step=step)
    return replace(batch, consulted=method.consult(Silent(), batch))


def kept(batch: Batch) -> list[int]:
    return batch.consulted["kept"].tolist()


def objective(method: KAT, batch: Batch) -> float:
    """As the platform reduces it."""
    mask_BT, weight_BT = batch.rollouts.mask_BT, method.weights(batch)[TRAINED]
    counted = int((weight_BT != 0).sum())
    return d.weighted_mean(batch[method.divergence][mask_BT], weight_BT[mask_BT], counted).item()


def stored(*values: float) -> State:
    return {"lowest": torch.tensor(values, dtype=torch.float64)}


def near(got: Tensor, *wanted: float, atol: float = 6e-10) -> None:
    torch.testing.assert_close(got.double().flatten(), torch.tensor(wanted, dtype=torch.float64), atol=atol, rtol=0)
