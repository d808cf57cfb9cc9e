"""Where chunks open: G2 by hand, and padding."""

import pytest
import torch

from opd_lab.methods.peaks import peaks

H = [0.1, 2.0, 1.9, 0.3, 0.2, 1.5, 0.9, 0.4, 1.8, 2.5]


@pytest.mark.parametrize(
    ("score", "size", "most", "placement", "expected"),
    [
        (H, 3, 1, "start", [1]),
        (H, 3, 2, "start", [1, 5]),  # 2 overlaps; to take the two highest first would leave one
        (H, 3, 10, "start", [1, 5]),  # 8 and 9 do not fit
        (H, 3, 2, "centre", [0, 7]),
        (H, 3, 10, "centre", [0, 4, 7]),
        ([1.0] * 6, 2, 2, "start", [2, 4]),
        ([1.0, 2.0], 3, 5, "start", []),
        ([1.0, 2.0], 3, 5, "centre", []),
        ([0.5, 0.1, 0.2], 3, 5, "start", [0]),
    ],
)
def test_g2(score: list[float], size: int, most: int, placement: str, expected: list[int]) -> None:
    score_BT = torch.tensor([score + [torch.nan] * 4])
    opens_BT = peaks(score_BT, torch.tensor([len(score)]), size=size, most=most, placement=placement)
    assert opens_BT[0].nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("placement", ["start", "centre"])
def test_rollouts_do_not_see_each_other(placement: str) -> None:
    score_BT, length_B = torch.rand(20, 15, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 16
    many = peaks(score_BT, length_B, size=3, most=3, placement=placement)
    for b in range(20):
        alone = peaks(score_BT[b : b + 1], length_B[b : b + 1], size=3, most=3, placement=placement)
        assert torch.equal(many[b], alone[0])
    assert not peaks(torch.zeros(2, 0), torch.zeros(2), size=1, most=1, placement=placement).any()
