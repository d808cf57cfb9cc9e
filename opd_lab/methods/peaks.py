"""Where a rollout is looked at: stretches of equal length at its highest scores that do not overlap."""

from __future__ import annotations

import torch
from torch import Tensor


def peaks(score_BT: Tensor, length_B: Tensor, *, size: int, most: int, placement: str) -> Tensor:
    """Up to `most` positions of each rollout that open a stretch of `size` tokens; bool, BT.

    Positions are visited by falling score, equal ones from the end. A stretch starts at the position, or lies around it
    (`placement: centre`) as far as the response allows. One that passes the response's end, or starts less than `size`
    tokens from an earlier one, is skipped. A response shorter than `size` has none.
    """
    t_T = torch.arange(score_BT.shape[1], device=score_BT.device)
    last_B1 = length_B[:, None] - size
    start_BT = t_T.expand(score_BT.shape)
    if placement == "centre":
        start_BT = torch.minimum(start_BT - size // 2, last_B1).clamp(min=0)
    free_BT = (t_T < length_B[:, None]) & (start_BT <= last_B1)
    opens_BT = torch.zeros_like(free_BT)
    for _ in range(most):
        more_B1 = free_BT.any(1, keepdim=True)
        if not bool(more_B1.any()):
            break
        from_end_B1 = score_BT.masked_fill(~free_BT, -torch.inf).flip(1).argmax(1, keepdim=True)  # first of equal ones
        chosen_B1 = start_BT.gather(1, len(t_T) - 1 - from_end_B1)
        opens_BT |= more_B1 & (t_T == chosen_B1)
        free_BT &= (start_BT - chosen_B1).abs() >= size
    return opens_BT
