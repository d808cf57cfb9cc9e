"""The picture of a histogram over training."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from opd_lab.bins import BINS
from opd_lab.tracking import figures
from opd_lab.tracking.figures import LEFT, TOP, heat_map


def test_a_step_owns_its_columns_and_a_bin_its_rows() -> None:
    bins = len(BINS["kl_nats"]) + 1
    low, high = [0] * bins, [0] * bins
    low[0], high[-1] = 5, 7
    pixels_YX3 = np.asarray(heat_map("x", "kl_nats", [0, 10], [low, high]).convert("RGB"))
    height, width = pixels_YX3.shape[:2]
    first_Y, last_Y = pixels_YX3[:, LEFT + 5], pixels_YX3[:, width - 13]
    coloured = [np.flatnonzero((column != 255).any(1)) for column in (first_Y, last_Y)]
    inside = [rows[(rows > TOP) & (rows < height - 36)] for rows in coloured]
    assert inside[0].min() > height / 2  # the lowest bin is at the bottom
    assert inside[1].max() < height / 2
    assert (first_Y[inside[0][0]] == last_Y[inside[1][0]]).all()  # all of a step has one colour, whatever its count


def test_the_colours_are_viridis() -> None:
    import matplotlib

    ours = np.array(figures._palette()[: 3 * figures.SHADES]).reshape(-1, 3)
    theirs = matplotlib.colormaps["viridis_r"](np.linspace(0, 1, figures.SHADES))[:, :3] * 255
    assert np.abs(ours - theirs).max() < 8


def test_a_picture_needs_no_plotting_library() -> None:
    code = "import sys; from opd_lab.tracking.figures import heat_map; heat_map('x', 'kl_nats', [0], [[1]]);"
    code += "assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
