"""A histogram over training as a picture: steps to the right, bins upwards, colour = share of the step's tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opd_lab.diagnostics.histograms import edges

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_SHARE = 1e-4  # colour is logarithmic from here to 1


def new_figure(width: float, height: float) -> Figure:
    """A figure that belongs to no window system and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def heat_map(axes: Axes, bins: str, steps: list[int], counts_SK: list[list[int]]) -> Any:
    """Draw onto `axes`; the axes are the same for every run, so pictures can be laid side by side."""
    import numpy as np
    from matplotlib.colors import LogNorm

    share_SK = np.asarray(counts_SK, dtype=float)
    share_SK /= share_SK.sum(1, keepdims=True).clip(min=1)
    right = steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)
    mesh = axes.pcolormesh(
        [*steps, right],
        np.arange(share_SK.shape[1] + 1),
        np.ma.masked_less(share_SK.T, LEAST_SHARE),
        norm=LogNorm(LEAST_SHARE, 1),
        cmap="viridis",
    )
    inner = edges(bins)
    shown = range(0, len(inner), max(len(inner) // 8, 1))
    axes.set_yticks([i + 1 for i in shown], [f"{inner[i]:.2g}" for i in shown])
    axes.set_xlabel("step")
    return mesh


def heat_map_image(name: str, bins: str, steps: list[int], counts_SK: list[list[int]]) -> Any:
    """The picture as an array of RGB bytes."""
    import numpy as np

    figure = new_figure(4.6, 3.4)
    axes = figure.subplots()
    figure.colorbar(heat_map(axes, bins, steps, counts_SK), ax=axes, label="share of the step")
    axes.set_title(name)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # pyright: ignore[reportAttributeAccessIssue]
