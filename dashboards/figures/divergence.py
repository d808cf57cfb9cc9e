"""Where and how much do student and teacher disagree during training?"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import plotly.graph_objects as go

from dashboards.figures import lines
from dashboards.runs import Frame, Selected
from dashboards.style import PANELS, SCALE, dress, empty, name_steps, panels, panels_height
from opd_lab.bins import edges

LEAST_SHARE = 1e-4  # colours are logarithmic from here to 1
MOST_COLUMNS = 60  # of a heat map: of longer runs neighbouring reports are added up, which the fixed bins allow
DIAGNOSTICS = "run with diagnostics.every > 0 and a teacher that gives its distribution"
KL = "KL(student || teacher) of the student's own rollouts"


def kl(selected: Selected, x: str = "steps") -> go.Figure:
    """Mean exact reverse KL of the tokens each method wrote itself."""
    return lines.draw(
        selected,
        "How far is the student from the teacher on its own rollouts?",
        {"kl/reverse_mean_nats": ""},
        unit="nats per token",
        missing=f"No KL was logged: {DIAGNOSTICS}.",
        x=x,
        log=True,
        note="Each method on its own tokens: shorter or easier rollouts lower it as well as learning does.",
    )


def quantiles(selected: Selected, x: str = "steps") -> go.Figure:
    """Median, 90 % and 99 % quantile of the KL over tokens."""
    return lines.draw(
        selected,
        "Does the KL fall everywhere, or only on the easy tokens?",
        {f"kl/reverse_p{q}_nats": f"{q} % of tokens lie below" for q in (50, 90, 99)},
        unit="nats",
        missing=f"No quantiles were logged: {DIAGNOSTICS}.",
        x=x,
        log=True,
        note=f"Quantiles over the tokens of a step; {KL}.",
    )


def probes(selected: Selected, x: str = "steps") -> go.Figure:
    """Exact KL on the fixed probe rollouts, the same tokens for every method at every time."""
    return lines.draw(
        selected,
        "How far is the student from the teacher on the same fixed tokens?",
        {
            "probe/reverse_kl_mean_nats": "reverse KL, mean",
            "probe/reverse_kl_p99_nats": "reverse KL, 99 % lie below",
            "probe/forward_kl_mean_nats": "forward KL, mean",
        },
        unit="nats",
        missing="No probe was scored: run with diagnostics.probe_rollouts > 0, evaluate.every > 0 and a teacher that "
        "gives its distribution.",
        x=x,
        log=True,
        note="Stored rollouts of the initial student, scored again at every evaluation: the same tokens for all.",
    )


def entropy(selected: Selected, x: str = "steps") -> go.Figure:
    """Both models' entropy at the tokens the student writes."""
    return lines.draw(
        selected,
        "How sure of themselves are student and teacher?",
        {"entropy/student_mean_nats": "student", "entropy/teacher_mean_nats": "teacher"},
        unit="nats per token",
        missing="No entropies were logged: run with diagnostics, and a teacher that gives its distribution.",
        x=x,
    )


def overlap(selected: Selected, x: str = "steps") -> go.Figure:
    """How much the two distributions share."""
    return lines.draw(
        selected,
        "Do student and teacher prefer the same tokens?",
        {
            "overlap/top16_fraction": "shared among the 16 likeliest",
            "overlap/total_variation_mean_fraction": "total variation",
        },
        unit="fraction",
        missing="No overlap was logged: it needs a teacher that gives its distribution.",
        x=x,
    )


def loss(selected: Selected, x: str = "steps") -> go.Figure:
    """What is minimised: one axis only where it is one quantity."""
    return lines.draw(
        selected,
        "How does the loss fall?",
        {"loss/total_value": ""},
        unit="loss",
        missing="No loss was logged yet: it comes with the first step.",
        x=x,
    )


def histogram(selected: Selected, name: str = "kl/reverse_nats") -> go.Figure:
    """A histogram over training per method: the same bins and the same colours for all."""
    question = f"How are the values of {name} spread over the tokens, and how does that change?"
    found = selected.table("histograms")
    found = found[found["name"] == name] if len(found) else found
    if not len(found):
        return empty(question, f"No histogram {name} was logged: run with diagnostics.every > 0.")
    labels = selected.present(found)
    drawn = labels[:PANELS]
    figure, places = panels(drawn)
    bins = found["bins"].iloc[0]
    drawn_counts = [_counts(found[found["label"] == label]) for label in drawn]
    hit_K = np.any([counts_SK.any(0) for _, counts_SK in drawn_counts], axis=0).nonzero()[0]
    shown = slice(hit_K[0], hit_K[-1] + 1) if len(hit_K) else slice(None)  # bins that nobody ever hit are not drawn
    names = _bin_names(bins)[shown]
    for (row, column), label, (steps, counts_SK) in zip(places, drawn, drawn_counts):
        share_SK = counts_SK / counts_SK.sum(1, keepdims=True).clip(1)
        depth_KS = np.log10(np.where(share_SK >= LEAST_SHARE, share_SK, np.nan)).T
        figure.add_trace(
            go.Heatmap(
                x=steps,
                y=names,
                z=depth_KS[shown].astype(np.float32),
                customdata=counts_SK.T[shown].astype(np.int32),
                coloraxis="coloraxis",
                hovertemplate=f"{label}<br>step %{{x}}, %{{y}}<br>%{{customdata:,}} tokens<extra></extra>",
            ),
            row,
            column,
        )
    name_steps(figure, places)
    every = max(len(names) // 6, 1)
    figure.update_yaxes(tickvals=names[::every], ticktext=[name.split(" ")[0] for name in names[::every]])
    figure.update_yaxes(title_text=f"{_unit(name)}, at least", col=1)
    _share_axis(figure)
    left = f" The first {PANELS} of {len(labels)} methods are drawn: select fewer." if len(labels) > PANELS else ""
    return dress(
        figure,
        question,
        alt=f"Heat maps of {name} over training for {', '.join(drawn)}; bins upwards, steps to the right.",
        note="Colour: share of the step's tokens, all seeds together, that fall into a bin; bins and colours are the "
        "same for all." + left,
        height=panels_height(drawn),
    )


def positions(selected: Selected, value: str = "kl_reverse_mean_nats") -> go.Figure:
    """Mean KL by relative position in the rollout and step."""
    question = "Where in a rollout do student and teacher disagree?"
    found = selected.table("positions")
    if not len(found) or value not in found:
        return empty(question, f"No profile over positions was logged: {DIAGNOSTICS}.")
    labels = selected.present(found)[:PANELS]
    figure, places = panels(labels)
    found = found.dropna(subset=value)
    low = float(np.log10(max(found[value][found[value] > 0].min(), 1e-4)))
    for (row, column), label in zip(places, labels):
        mine = found[found["label"] == label].assign(total=lambda rows: rows[value] * rows["tokens"])
        sums = mine.groupby(["decile", "step"])[["total", "tokens"]].sum()
        mean = (sums["total"] / sums["tokens"]).unstack("step")
        mean = mean[mean.columns[:: -(-mean.shape[1] // MOST_COLUMNS)]]
        with np.errstate(divide="ignore", invalid="ignore"):
            depth = np.log10(mean.to_numpy().clip(10**low))
        figure.add_trace(
            go.Heatmap(
                x=[int(step) for step in mean.columns],
                y=[10 * int(decile) + 5 for decile in mean.index],
                z=depth.astype(np.float32),
                customdata=mean.to_numpy(),
                coloraxis="coloraxis",
                hovertemplate=f"{label}<br>step %{{x}}, around %{{y}} % of the rollout<br>"
                "%{customdata:.6g} nats<extra></extra>",
            ),
            row,
            column,
        )
    name_steps(figure, places)
    figure.update_yaxes(title_text="position, %", range=[0, 100], col=1)
    ticks = list(range(int(np.ceil(low)), 2))
    figure.update_layout(
        coloraxis={
            "colorscale": SCALE,
            "colorbar": {"title": "nats", "tickvals": ticks, "ticktext": [f"{10.0**t:g}" for t in ticks], "len": 0.9},
        }
    )
    return dress(
        figure,
        question,
        alt=f"Heat maps of mean KL by position in the rollout and step for {', '.join(labels)}.",
        note=f"{KL}, mean over the tokens of all seeds; position in tenths of a rollout, 0 % its first token; the "
        "colours are the same for all.",
        height=panels_height(labels),
    )


def _counts(rows: Frame) -> tuple[list[int], np.ndarray]:
    """Counts added over seeds, and over neighbouring reports where there are too many columns."""
    by_step = {int(step): np.sum([list(c) for c in same["counts"]], axis=0) for step, same in rows.groupby("step")}
    steps, counts = list(by_step), list(by_step.values())
    merged = -(-len(steps) // MOST_COLUMNS)
    starts = range(0, len(steps), merged)
    return [steps[i] for i in starts], np.array([np.sum(counts[i : i + merged], axis=0) for i in starts])


def _bin_names(bins: str) -> list[str]:
    inner = edges(bins)
    inside = [f"{low:.2g} to {high:.2g}" for low, high in pairwise(inner)]
    return [f"≤{inner[0]:.2g} ", *inside, f">{inner[-1]:.2g} "]


def _unit(name: str) -> str:
    return name.rsplit("_", 1)[-1]


def _share_axis(figure: go.Figure) -> None:
    ticks = range(round(np.log10(LEAST_SHARE)), 1)
    figure.update_layout(
        coloraxis={
            "colorscale": SCALE,
            "cmin": np.log10(LEAST_SHARE),
            "cmax": 0,
            "colorbar": {
                "title": "share of<br>tokens",
                "tickvals": list(ticks),
                "ticktext": [f"{100 * 10.0**t:g} %" for t in ticks],
                "len": 0.9,
            },
        }
    )
