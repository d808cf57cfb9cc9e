"""The pictures of rock tokens, each drawn from a stored table alone; `opd-lab analyze rock figures RUN` draws them all
again. The names of the paper's figures stand beside theirs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.stats import pearsonr

from opd_lab.analyze.figures import panels
from opd_lab.analyze.outcome import FOLDER, Frame, Outcome, frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"rock": "tab:red", "high_kl": "tab:orange", "random": "tab:blue", "control": "tab:green", "": "lightgrey"}
BANDS = 40  # bins of a mean over frequency
NAMED = 30  # types that are written beside their points
LEAST = 1e-6  # nats, added where an axis is logarithmic


def scores(types: Frame) -> Figure:
    """1a: mean KL of every type against its frequency, with the mean and the 10-90 % band over bins of frequency."""
    figure, (panel,) = panels(1, "Which types are hard, which are frequent?")
    bins = pd.cut(np.log10(types["count"]), min(BANDS, types["count"].nunique()))
    band = types.groupby(bins, observed=True).agg(
        count=("count", "mean"),
        mean=("kl_mean_nats", "mean"),
        low=("kl_mean_nats", lambda kl: kl.quantile(0.1)),
        high=("kl_mean_nats", lambda kl: kl.quantile(0.9)),
    )
    panel.fill_between(band["count"], band["low"], band["high"], color="lightgrey", alpha=0.5, label="10-90 % of a bin")
    panel.plot(band["count"], band["mean"], color="grey", label="mean of a bin")
    for group, rows in types.groupby("group"):
        panel.scatter(rows["count"], rows["kl_mean_nats"], s=14, color=COLOURS[group], label=group or "other")
    for row in types[types["group"] == "rock"].nlargest(NAMED, "kl_sum_nats").itertuples():
        name(panel, row.text, row.count, row.kl_mean_nats)
    panel.set(xscale="log", xlabel="occurrences", ylabel="mean KL(student || teacher), nats")
    panel.set_yscale("symlog", linthresh=1e-2)
    panel.set_ylim(0, 2 * types["kl_mean_nats"].max())
    panel.legend(fontsize=7)
    return figure


def quadrant_map(rows: Frame, before: str, after: str) -> Figure:
    """Every occurrence by its KL before and after, coloured by quadrant."""
    figure, (panel,) = panels(1, "What became of every token?")
    colours = {"easy": "lightgrey", "learned": "tab:blue", "regressed": "tab:orange", "rock": "tab:red"}
    for quadrant, colour in colours.items():
        part = rows[rows["quadrant"] == quadrant]
        panel.scatter(part[before] + LEAST, part[after] + LEAST, s=3, color=colour, label=f"{quadrant}: {len(part)}")
    _diagonal(panel)
    panel.set(xlabel="KL before, nats", ylabel="KL after, nats")
    panel.legend(markerscale=4, fontsize=7)
    return figure


def name(panel: Axes, text: str, x: float, y: float) -> None:
    """A token's text beside its point."""
    panel.annotate(repr(text)[1:-1], (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")


def _diagonal(panel: Axes) -> None:
    """Both axes logarithmic, and the line on which nothing has changed."""
    panel.set(xscale="log", yscale="log")
    low, high = (f(f(panel.get_xlim()), f(panel.get_ylim())) for f in (min, max))
    panel.plot([low, high], [low, high], color="black", linewidth=0.8)


def gradients(types: Frame) -> Figure:
    """2a, 2b: the norm of a type's mean gradient and its cosine with the balanced sum, by group."""
    figure, (left, right) = panels(2, "How strongly do types push, and along with the others?")
    groups = [name for name in COLOURS if name and (types["group"] == name).any()]
    for panel, name in ((left, "norm"), (right, "cosine")):
        values = np.log10(types["norm"].clip(lower=LEAST)) if name == "norm" else types["cosine"]
        edges = np.linspace(values.min(), values.max(), BANDS // 2).tolist()
        for group in groups:
            panel.hist(values[types["group"] == group], bins=edges, alpha=0.6, color=COLOURS[group], label=group)
        panel.legend(fontsize=7)
    left.set(xlabel="log10 of the norm of a type's mean gradient", ylabel="types")
    right.set(xlabel="cosine with the sum over types", ylabel="types")
    return figure


def persistence(types: Frame) -> Figure:
    """2c, 2d: KL before and after, per type, and the histogram of the difference."""
    figure, (left, right) = panels(2, "Held-out prompts: do types stay hard?")
    change = types["kl_after"] - types["kl_before"]
    edges = np.linspace(change.min(), change.max(), BANDS).tolist()
    for group, rows in types.groupby("group"):
        style = {"color": COLOURS[group], "label": group or "other"}
        left.scatter(rows["kl_before"] + LEAST, rows["kl_after"] + LEAST, s=14, **style)
        right.hist(change[rows.index], bins=edges, alpha=0.6, **style)
    _diagonal(left)
    left.set(xlabel="mean KL before, nats", ylabel="mean KL after, nats")
    right.set(xlabel="KL after - before, nats", ylabel="types")
    left.legend(fontsize=7)
    return figure


def stability(table: Frame, density: Frame) -> Figure:
    """1b, 1c, 1d: rock share per response; coverage and mean Jaccard index against K; the index per sample size."""
    figure, (left, middle, right) = panels(3, "How stable is the list?")
    left.hist(density["rock_share"], bins=BANDS, color=COLOURS["rock"])
    left.axvline(density["rock_share"].median(), color="black", linewidth=0.8)
    left.set(xlabel="rock share of a response (line: median)", ylabel="responses")
    mean = table.groupby("k")[["coverage", "jaccard"]].mean()
    middle.plot(mean.index, mean["coverage"], marker="o", label="coverage of the KL")
    middle.plot(mean.index, mean["jaccard"], marker="o", label="Jaccard index, mean over sample sizes")
    for k, rows in table.groupby("k"):
        right.plot(rows["problems"], rows["jaccard"], marker="o", label=f"K = {k}")
        right.fill_between(rows["problems"], rows["jaccard_low"], rows["jaccard_high"], alpha=0.15)
    middle.set(xscale="log", ylim=(0, 1.02), xlabel="K, types")
    right.set(ylim=(0, 1.02), xlabel="problems", ylabel="Jaccard index with all problems, 10-90 % of draws")
    for panel in (middle, right):
        panel.legend(fontsize=7)
    return figure


def knockout(tokens: Frame, types: Frame, eps: float) -> Figure:
    """The change of accuracy without each token, sorted, with the band of eps; and against what is known of a type."""
    known = {"count": "occurrences", "kl_mean_nats": "mean KL, nats", "kl_sum_nats": "rock score, nats"}
    known |= {"entropy_student": "student entropy, nats", "entropy_teacher": "teacher entropy, nats"}
    figure, (bars, *others) = panels(1 + len(known), "Accuracy without one token")
    ordered = tokens.sort_values("delta").reset_index(drop=True)
    bars.bar(ordered.index, ordered["delta"], color=[COLOURS[pool] for pool in ordered["pool"]])
    bars.axhspan(-eps, eps, color="lightgrey", alpha=0.5)
    bars.set(xlabel="tokens by change (red: rocks, green: control)", ylabel="change of accuracy")
    both = tokens.merge(types, on=["id", "text"])
    for panel, (name, label) in zip(others, known.items()):
        for pool, rows in both.groupby("pool"):
            panel.scatter(rows[name], rows["delta"], s=14, color=COLOURS[pool])
        varied = both[name].nunique() > 1 and both["delta"].nunique() > 1
        title = "r = {:.2f}, p = {:.2g}".format(*pearsonr(both[name], both["delta"])) if varied else "no correlation"
        panel.set(xlabel=label, title=title)
    return figure


def cumulative(table: Frame) -> Figure:
    """Accuracy without the k rocks that cost most, cost least, or any."""
    figure, (panel,) = panels(1, "Accuracy without k rocks at once")
    for order, rows in table.groupby("order"):
        by_k = rows.groupby("k")["accuracy"]
        panel.plot(by_k.mean().index, by_k.mean(), marker="o", label=order)
        panel.fill_between(by_k.min().index, by_k.min(), by_k.max(), alpha=0.2)
    panel.set(xlabel="k, tokens", ylabel="accuracy", ylim=(-0.02, 1.02))
    panel.legend(title="order of Delta")
    return figure


def answer(run: Path) -> Outcome:
    """Draw what can be drawn from the tables there are."""
    folder = run / FOLDER / "rock"
    tables = {path.stem: pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))}
    drawn: dict[str, Figure] = {}
    if "token_table" in tables:
        drawn["select"] = scores(tables["token_table"])
    if "gradients" in tables:
        drawn["gradients"] = gradients(tables["gradients"])
    if "persistence" in tables:
        drawn["persistence"] = persistence(tables["persistence"])
    if "stability" in tables:
        drawn["stability"] = stability(tables["stability"], tables["density"])
    if "cumulative" in tables:
        drawn["cumulative"] = cumulative(tables["cumulative"])
    if {"knockout", "token_table"} <= tables.keys():
        drawn["knockout"] = knockout(tables["knockout"], tables["token_table"], eps=0.01)
    if not drawn:
        raise ValueError(f"{folder} has no tables; run `opd-lab analyze rock corpus {run}` and `rock select` first")
    shown = frame({"picture": [f"{name}.png" for name in drawn]})
    return Outcome(
        f"What do the tables of {run.name} look like?", f"{len(drawn)} pictures drawn.", shown, figures=drawn
    )
