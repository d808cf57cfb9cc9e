"""Pictures that answer one question about finished runs. `opd-lab analyze NAME FOLDER` draws them.

kl-map    one run: the KL of every token of a hundred rollouts, early and late in training. Do rollouts end in long
          stretches on which student and teacher agree? (KAT, arXiv 2606.09471, its heat map.)
support   runs that differ in who wrote the rollouts: does what the teacher supports still tell right from wrong
          rollouts? (TRB, arXiv 2605.31159, figure 7: the first 25 steps pooled, a point per run.)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_lab.tracking import read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROLLOUTS = 100  # rows of a map
FIRST_STEPS = 25
SHARE = 0.1  # of a run's steps that count as early, and as late
AXES = ("teacher/logp_mean_nats", "rollout/support_reward_auroc_fraction", "rollout/reward_mean_fraction")


def stretches(folder: Path) -> dict[str, list[list[float]]]:
    """The token KLs of up to a hundred sampled rollouts from the first and from the last tenth of a run's steps.

    Raises:
        ValueError: the run kept no sampled rollouts with a KL.
    """
    found = read.rollouts(folder)
    if not len(found) or "reverse_kl" not in found:
        raise ValueError(f"{folder} has no sampled rollouts with a KL; run with diagnostics.sample_rollouts=100")
    steps = [int(step) for step in found["step"]]
    rows = [list(row) for row in found["reverse_kl"]]
    first, last = max(SHARE * max(steps), min(steps)), (1 - SHARE) * max(steps)
    return {
        "early": [row for row, step in zip(rows, steps) if step <= first][:ROLLOUTS],
        "late": [row for row, step in zip(rows, steps) if step > last][:ROLLOUTS],
    }


def kl_map(folder: Path) -> Figure:
    """Two maps, rollout x position, on one logarithmic scale of colours."""
    import numpy as np
    from matplotlib.colors import LogNorm

    found = stretches(folder)
    figure, axes = panels(len(found), f"KL(student || teacher) of each token, nats: {folder.name}")
    widest = max(len(row) for rows in found.values() for row in rows)
    image: Any = None
    for panel, (name, rows) in zip(axes, found.items()):
        kl_RT = np.full((len(rows), widest), np.nan)
        for r, row in enumerate(sorted(rows, key=len)):
            kl_RT[r, : len(row)] = row
        scale = LogNorm(1e-4, 10, clip=True)
        image = panel.imshow(kl_RT, aspect="auto", norm=scale, cmap="viridis", interpolation="nearest")
        panel.set(
            title=f"{name}: {len(rows)} rollouts", xlabel="response position, tokens", ylabel="rollouts by length"
        )
    figure.colorbar(image, ax=axes, label="nats")
    return figure


def support_points(folder: Path) -> dict[str, tuple[float, float, float]]:
    """Per run: mean teacher log-prob, AUROC of a rollout's support against its correctness, and reward, each the mean
    over the first 25 steps.

    Raises:
        ValueError: no run logged all three.
    """
    metrics = read.metrics(folder)
    early = metrics[(metrics["step"] <= FIRST_STEPS) & metrics["name"].isin(AXES)]
    table = early.pivot_table(index="run", columns="name", values="value", aggfunc="mean").dropna()
    if not len(table) or set(AXES) - set(table.columns):
        raise ValueError(f"no run in {folder} logged {', '.join(AXES)}: it needs graded data and a teacher with scores")
    logp, auroc, reward = (table[name].to_list() for name in AXES)
    return {str(run): point for run, point in zip(table.index, zip(logp, auroc, reward))}


def support(folder: Path) -> Figure:
    """A point per run, named by the settings of its method in which the runs differ."""
    points, names = support_points(folder), labels(folder)
    figure, (panel,) = panels(1, "Does the teacher's support still tell right from wrong rollouts?")
    x, y, reward = zip(*points.values())
    dots = panel.scatter(x, y, c=reward, cmap="viridis")
    for run, (at, height, _) in points.items():
        panel.annotate(names[run], (at, height), fontsize=7, xytext=(4, 3), textcoords="offset points")
    panel.set(xlabel="mean teacher log-prob of the tokens, nats", ylabel="AUROC of support against correctness")
    figure.colorbar(dots, ax=panel, label="share of correct rollouts")
    return figure


def labels(folder: Path) -> dict[str, str]:
    """What tells the runs of a folder apart: method settings that differ between them, else their names."""
    found = read.runs(folder)
    rows = [{str(name): value for name, value in row.items()} for row in found.to_dict("records")]
    own = [name for name in rows[0] if name.startswith("method.") and name != "method._target_"]
    apart = [name for name in own if len({str(row[name]) for row in rows}) > 1]
    shown = [", ".join(f"{name.removeprefix('method.')}={row[name]}" for name in apart) for row in rows]
    return {str(row["run"]): text or str(row["run"]) for row, text in zip(rows, shown)}


def panels(number: int, title: str) -> tuple[Figure, list[Any]]:
    """A figure of so many panels side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * number + 1, 5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure, list(figure.subplots(1, number, squeeze=False)[0])


FIGURES = {"kl-map": kl_map, "support": support}


def draw(name: str, folder: Path) -> Path:
    """Draw a figure into the folder it is about."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    path = folder / f"{name}.png"
    FIGURES[name](folder).savefig(path, dpi=150)
    return path
