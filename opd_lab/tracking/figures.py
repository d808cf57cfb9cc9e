"""A histogram over training as a picture: steps to the right, bins upwards, colour = share of the step's values.

Drawn with Pillow, a few milliseconds each: a plotting library needs a hundred times that, at every report, beside the
training. Axes and colours are the same for every run, so pictures can be laid side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from opd_lab.bins import edges

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

LEAST_SHARE = 1e-4  # colour is logarithmic from here to 1; below it a bin is left white
LEFT, TOP, RIGHT, BOTTOM = 56, 26, 12, 34  # margins, pixels


def heat_map(
    name: str, bins: str, steps: Sequence[int], counts_SK: Sequence[Sequence[int]], width: int = 480, height: int = 340
) -> Image:
    """One column per step, drawn until the next step begins; labels are the edges between bins."""
    from PIL import Image, ImageDraw

    across, upwards = width - LEFT - RIGHT, height - TOP - BOTTOM
    picture = Image.new("RGB", (width, height), "white")
    picture.paste(Image.fromarray(_pixels(steps, counts_SK, across, upwards)), (LEFT, TOP))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((LEFT - 1, TOP - 1, LEFT + across, TOP + upwards), outline="black")
    draw.text((LEFT, 6), f"{name}: share of values per step", fill="black")
    inner = edges(bins)
    for i in range(0, len(inner), max(len(inner) // 10, 1)):
        y = TOP + upwards - (i + 1) * upwards / (len(inner) + 1)
        draw.text((LEFT - 6, y), f"{inner[i]:.1e}", fill="black", anchor="rm")
        draw.line((LEFT - 4, y, LEFT - 1, y), fill="black")
    draw.text((LEFT, height - 22), str(steps[0]), fill="black", anchor="ma")
    draw.text((LEFT + across / 2, height - 14), "step", fill="black", anchor="ma")
    last = LEFT + across * (steps[-1] - steps[0]) / (_end(steps) - steps[0])
    if last > LEFT + 40:
        draw.text((last, height - 22), str(steps[-1]), fill="black", anchor="ma")
    return picture


def _end(steps: Sequence[int]) -> int:
    """Where the last column ends: it is as wide as the one before."""
    return 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1


def _pixels(steps: Sequence[int], counts_SK: Sequence[Sequence[int]], across: int, upwards: int) -> np.ndarray:
    import matplotlib
    import numpy as np

    share_SK = np.asarray(counts_SK, dtype=float)
    share_SK = share_SK / share_SK.sum(1, keepdims=True).clip(min=1)
    depth_SK = 1 - np.log(share_SK.clip(min=LEAST_SHARE)) / np.log(LEAST_SHARE)  # 0 at the least share, 1 at all
    colour_SK3 = (matplotlib.colormaps["viridis_r"](depth_SK)[..., :3] * 255).astype(np.uint8)
    colour_SK3[share_SK < LEAST_SHARE] = 255
    at_X = np.searchsorted(steps, np.linspace(steps[0], _end(steps), across, endpoint=False), side="right") - 1
    bin_Y = np.arange(upwards)[::-1] * share_SK.shape[1] // upwards
    return colour_SK3[at_X[None, :], bin_Y[:, None]]
