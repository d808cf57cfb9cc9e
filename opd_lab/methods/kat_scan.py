"""Where a low divergence that persists begins: KAT's detector, without any model, and what is reported of it.

Per-token divergences d have shape BT, nats, NaN where a rollout has no token. A window is named by its first token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from opd_lab.types import Batch


class Trap(NamedTuple):
    """A streak of low windows, in tokens; -1 where a rollout has none."""

    onset_B: Tensor  # the first token of its first window: so many tokens are kept
    trigger_B: Tensor  # the last token of the window that confirmed it
    end_B: Tensor  # the first token behind the unbroken run of low windows


def smoothed(d_BT: Tensor, window: int) -> Tensor:
    """Mean over the window that begins at each token, float64. Added up anew each time, for the difference of running
    sums drowns small values behind large ones."""
    if d_BT.shape[1] < window:
        return d_BT.new_empty((len(d_BT), 0), dtype=torch.float64)
    return d_BT.double().unfold(1, window, 1).mean(-1)


def lowest(d_BT: Tensor, window: int, trigger_B: Tensor) -> Tensor:
    """The smallest window mean of each rollout, of windows up to the trigger; NaN where it has no whole window."""
    z_BZ = smoothed(d_BT, window)
    after_BZ = torch.arange(z_BZ.shape[1], device=d_BT.device) > (trigger_B - window + 1)[:, None]
    out_BZ = z_BZ.isnan() | (after_BZ & (trigger_B >= 0)[:, None])
    least_B = pad(z_BZ.masked_fill(out_BZ, torch.inf), (0, 1), value=torch.inf).amin(1)
    return least_B.masked_fill(least_B.isinf(), torch.nan)


def scan(
    d_BT: Tensor, threshold: float, *, window: int, consecutive: int, stride: int, exempt: int, exempt_rule: str
) -> Trap:
    """The first streak of `consecutive` windows, `stride` apart, whose means are below the threshold, in each rollout.

    exempt_rule kept       only windows that lie behind the first `exempt` tokens count
                decision   all count, but the trigger is a token behind them
    """
    first = exempt if exempt_rule == "kept" else 0
    low_BG = pad(smoothed(d_BT, window)[:, first::stride] < threshold, (0, 1))  # every run of low windows ends
    g_G = torch.arange(low_BG.shape[1], device=d_BT.device)
    high_BG = torch.where(low_BG, -1, g_G).cummax(1).values  # the latest window that is not low
    last_G = first + g_G * stride + window - 1
    decided_BG = (g_G - high_BG >= consecutive) & (last_G >= (exempt if exempt_rule == "decision" else 0))
    none_B, at_B1 = ~decided_BG.any(1), decided_BG.int().argmax(1, keepdim=True)
    begin_B = high_BG.gather(1, at_B1)[:, 0] + 1
    end_B = (~low_BG & (g_G >= at_B1)).int().argmax(1) - 1  # the run's last window
    where = (first + begin_B * stride, last_G[at_B1[:, 0]], first + end_B * stride + window)
    return Trap(*(tokens_B.masked_fill(none_B, -1) for tokens_B in where))


class Phases(NamedTuple):
    """Generated tokens before the trap, in its unbroken run of low windows, and after it."""

    pre_BT: Tensor
    agreement_BT: Tensor
    post_BT: Tensor


def phases(batch: Batch) -> Phases:
    columns = batch.rollouts.source_BT.shape[1]
    return split(batch.consulted["kept"], batch.consulted["end"], batch.rollouts.generated_B, columns)


def split(kept_B: Tensor, end_B: Tensor, generated_B: Tensor, columns: int) -> Phases:
    """The phases of rollouts of which so many tokens are kept, and whose low windows end before token `end_B`."""
    kept_B1, end_B1 = kept_B[:, None], end_B[:, None]
    t_T = torch.arange(columns, device=kept_B1.device)
    there_BT = t_T < generated_B[:, None]
    return Phases(there_BT & (t_T < kept_B1), there_BT & (t_T >= kept_B1) & (t_T < end_B1), there_BT & (t_T >= end_B1))


def report(batch: Batch, d_BT: Tensor, again: Trap, anywhere: Trap) -> dict[str, float | Tensor]:
    """A step in numbers. `again` is the trap by the update's own d, `anywhere` the one if no token were exempt."""
    kept_B, generated_B = batch.consulted["kept"], batch.rollouts.generated_B
    cut_B = kept_B < generated_B
    found_B, slip_B = anywhere.trigger_B >= 0, batch.rollouts.extra.get("first_slip")
    values: dict[str, float | Tensor] = {
        "cut_fraction": mean(cut_B),
        "generated_mean_tokens": mean(generated_B),
        "kept_mean_tokens": mean(kept_B),
        "kept_fraction": mean(kept_B) / mean(generated_B),
        "cut_mismatch_fraction": mean(torch.where(cut_B, kept_B, -1) != again.onset_B),
        "segment_fraction": mean(found_B),
        "onset_median_tokens": anywhere.onset_B[found_B].double().quantile(0.5).item() if found_B.any() else math.nan,
        "cut_after_slip_fraction": mean(((slip_B >= 0) & (slip_B < kept_B))[cut_B]) if slip_B is not None else math.nan,
        "cut_position_tokens": kept_B[cut_B],
        "lowest_nats": batch.consulted["lowest"],
    }
    for name, part_BT in phases(batch)._asdict().items():
        phase = name.removesuffix("_BT")
        values[f"kl_{phase}_mean_nats"] = mean(d_BT[part_BT & cut_B[:, None]])
    return values


def mean(value: Tensor) -> float:
    return value.double().mean().item()
