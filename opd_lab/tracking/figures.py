"""What happens over training as a picture: steps to the right, and upwards either bins, coloured by their share of the
step's values, or stretches of the response, coloured by their KL.

Drawn with Pillow, a few milliseconds each: a plotting library needs a hundred times that, at every report, beside the
training. Axes and colours are the same for every run, so pictures can be laid side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from opd_lab.bins import edges

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

LEAST_SHARE = 1e-4  # colour is logarithmic from here to 1; below it a bin is left white
KL_RANGE = (1e-3, 10.0)  # nats; likewise, and the ends stand for what lies beyond
LEFT, TOP, RIGHT, BOTTOM = 56, 26, 12, 34  # margins, pixels
SHADES, GREYS, WHITE = 239, 16, 255  # the palette: shades, then greys from black on, the last of them white
# matplotlib's viridis from its pale end, at seventeen places: its import takes longer than all the pictures of a run
VIRIDIS = "fde725 d5e21a aadc32 81d34d 5cc863 3dbc74 27ad81 1f9f88 21908d 26818e 2c718e 33628d 3b518b 423f85 472c7a"
VIRIDIS += " 481769 440154"
WIDTH, HEIGHT = 512, 512  # square, as the frames of MLflow's charts are, and twice as large as those


def heat_map(name: str, bins: str, steps: Sequence[int], counts_SK: Sequence[Sequence[int]]) -> Image:
    """One column per step, drawn until the next step begins; labels are the edges between bins."""
    import numpy as np

    share_SK = np.asarray(counts_SK, dtype=float)
    share_SK = share_SK / share_SK.sum(1, keepdims=True).clip(min=1)
    depth_SK = 1 - np.log(share_SK.clip(min=LEAST_SHARE)) / np.log(LEAST_SHARE)  # 0 at the least share, 1 at all
    inner = edges(bins)
    ticks = {(i + 1) / (len(inner) + 1): f"{inner[i]:.1e}" for i in range(0, len(inner), max(len(inner) // 10, 1))}
    return _drawn(f"{name}: share of values per step", steps, _coloured(depth_SK, share_SK >= LEAST_SHARE), ticks)


def position_map(name: str, steps: Sequence[int], kl_SK: Sequence[Sequence[float]]) -> Image:
    """One column per step, K equal stretches of the response from its beginning upwards; NaN is left white."""
    import numpy as np

    (low, high), stretches = KL_RANGE, len(kl_SK[0])
    depth_SK = np.log(np.clip(kl_SK, low, high) / low) / np.log(high / low)
    ticks = {k / stretches: f"{k / stretches:.0%}" for k in range(0, stretches, 2)}
    title = f"{name}: mean by place in the response, {low:g} (pale) to {high:g} (dark)"
    return _drawn(title, steps, _coloured(depth_SK, ~np.isnan(depth_SK)), ticks)


@cache
def _palette() -> list[int]:
    """The colours as Pillow keeps them: pale to dark, then black to white."""
    import numpy as np

    known_PC = np.array([list(bytes.fromhex(colour)) for colour in VIRIDIS.split()])
    place_P = np.linspace(0, 1, len(known_PC))
    shades = np.stack([np.interp(np.linspace(0, 1, SHADES), place_P, of_P) for of_P in known_PC.T], 1).astype(int)
    greys = np.linspace(0, 255, GREYS + 1).astype(int)
    return [*shades.flatten().tolist(), *greys.repeat(3).tolist()]


def _coloured(depth_SK: np.ndarray, there_SK: np.ndarray) -> np.ndarray:
    """Depths in [0, 1] as places in the palette, shape SK."""
    import numpy as np

    shade_SK = (np.nan_to_num(depth_SK) * SHADES).clip(0, SHADES - 1).astype(np.uint8)
    shade_SK[~there_SK] = WHITE
    return shade_SK


@lru_cache(maxsize=64)
def _axes(title: str, ticks: tuple[tuple[float, str], ...]) -> Image:
    """What is the same at every step, in grey; ticks are at fractions of the height."""
    from PIL import Image, ImageDraw

    across, upwards = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    picture = Image.new("L", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((LEFT - 1, TOP - 1, LEFT + across, TOP + upwards), outline="black")
    draw.text((LEFT, 6), title, fill="black")
    for height, text in ticks:
        y = TOP + upwards * (1 - height)
        draw.text((LEFT - 6, y), text, fill="black", anchor="rm")
        draw.line((LEFT - 4, y, LEFT - 1, y), fill="black")
    draw.text((LEFT + across / 2, HEIGHT - 14), "step", fill="black", anchor="ma")
    return picture


def _drawn(title: str, steps: Sequence[int], shade_SK: np.ndarray, ticks: Mapping[float, str]) -> Image:
    """The picture with its axes."""
    import numpy as np
    from PIL import Image, ImageDraw

    across, upwards = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    end = 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1  # the last column is as wide as the one before
    at_X = np.searchsorted(steps, np.linspace(steps[0], end, across, endpoint=False), side="right") - 1
    bin_Y = np.arange(upwards)[::-1] * shade_SK.shape[1] // upwards
    axes = _axes(title, tuple(ticks.items())).copy()
    draw = ImageDraw.Draw(axes)
    draw.text((LEFT, HEIGHT - 22), str(steps[0]), fill="black", anchor="ma")
    last = LEFT + across * (steps[-1] - steps[0]) / (end - steps[0])
    if last > LEFT + 40:
        draw.text((last, HEIGHT - 22), str(steps[-1]), fill="black", anchor="ma")
    picture = axes.point([SHADES + grey * GREYS // 255 for grey in range(256)])
    picture.paste(Image.fromarray(shade_SK.T.take(bin_Y, 0).take(at_X, 1)), (LEFT, TOP))
    picture.putpalette(_palette())
    return picture
