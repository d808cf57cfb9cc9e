"""What may share an axis. Two losses with unlike conventions are different quantities that happen to have one name.

A KL in nats and a squared distance of hidden states have no common unit. JSDs of two betas, the two directions of a
KL, a top-k sum with and without its tail, sums over other denominators or at other temperatures have one unit, and yet
are not one quantity. What means the same for every method are the `YARDSTICKS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from opd_lab.tracking import read

# The tags that say what every loss is. A run names those that its method adds in the tag `conventions`.
CONVENTIONS = (
    *("divergence", "estimator", "beta", "topk_support", "topk_tail", "topk_k"),
    *("denominator", "loss_temperature", "sampling_temperature"),
)
YARDSTICKS = {
    "probe/reverse_kl_mean_nats": "exact reverse KL on one set of probe rollouts",
    "eval/test/reverse_kl_mean_nats": "exact reverse KL on held-out rollouts",
    "eval/*/avg_at_*": "accuracy",
}
_KINDS = {  # what a divergence tag holds -> what kind of number it is
    "hidden": "a mean squared distance between hidden states",
    "reward": "a policy-gradient surrogate of a reward",
    "likelihood": "a negative log-likelihood, nats",
    "kl": "a KL divergence, nats",
    "jsd": "a Jensen-Shannon divergence, nats",
}
NOT_SAID = "not said"
SAID = 3  # conventions, and values of each, that a refusal spells out


# The areas of metrics that mean the same for every method; any other is a method's own.
COMMON = ("eval", "probe", "kl", "entropy", "gap", "overlap", "rollout", "cost", "time", "memory")
# What a metric's last word says of which way is better.
BETTER = {"maximize": ("avg_at", "pass_at", "per_second"), "minimize": ("nats", "tokens", "seconds", "bytes", "calls")}


def direction(metric: str) -> str:
    """Which way is better.

    Raises:
        ValueError: its name does not say.
    """
    for way, words in BETTER.items():
        if any(metric.rstrip("0123456789_").endswith(word) for word in words):
            return way
    raise ValueError(
        f"sweep.objective must say which way {metric} is better: sweep.objective={{{metric}: maximize}} or minimize"
    )


def comparable(metric: str, keys: Sequence[str]) -> None:
    """Refuse to rank by a number that is another quantity for another trial.

    Raises:
        ValueError: a loss in a space that changes the method; a method's own metric in a space of methods.
    """
    changed = [key for key in keys if key.partition(".")[0] == "method"]
    area = metric.partition("/")[0]
    if (changed and area == "loss") or ("method" in changed and area not in COMMON):
        raise ValueError(
            f"sweep.objective must mean the same for every trial, got {metric} in a space over {', '.join(changed)}; "
            "rank by eval/validation/avg_at_*, eval/validation/reverse_kl_mean_nats or kl/reverse_mean_nats"
        )


def conventions(folder: Path) -> dict[str, str]:
    """What a run says of its loss: convention -> its value, in the order of `CONVENTIONS`, then the method's own."""
    tags = read.status(folder)["tags"]
    own = [name for name in tags.get("conventions", "").split() if name not in CONVENTIONS]
    return {name: str(tags[name]) for name in (*CONVENTIONS, *own) if name in tags}


def unlike(runs: read.Runs) -> dict[str, dict[str, str]]:
    """The conventions in which the losses of some runs differ: convention -> its value -> the first run with it."""
    said = {folder: conventions(folder) for folder in read.folders(runs)}
    names = dict.fromkeys(name for convention in said.values() for name in convention)
    out: dict[str, dict[str, str]] = {}
    for name in names:
        values: dict[str, str] = {}
        for folder, convention in said.items():
            values.setdefault(convention.get(name, NOT_SAID), folder.name)
        if len(values) > 1:
            out[name] = values
    return out


def same_axis(runs: read.Runs, metric: str) -> None:
    """Refuse to draw one metric of several runs on one axis if it is not one quantity.

    Raises:
        ValueError: a loss (`loss/*`) whose conventions differ; names each of them, and the common yardsticks.
    """
    if not metric.startswith("loss/") or not (differ := unlike(runs)):
        return
    got = "; ".join(f"{name}: {_some(values)}" for name, values in list(differ.items())[:SAID])
    if rest := list(differ)[SAID:]:
        got += f"; they differ in {', '.join(rest)} too"
    kinds = dict.fromkeys(filter(None, map(_kind, differ.get("divergence", {}))))
    because = f" {' and '.join(kinds)} have no common unit;" if len(kinds) > 1 else ""
    instead = ", ".join(f"{name} ({about})" for name, about in YARDSTICKS.items())
    raise ValueError(
        f"{metric} can share an axis only where the loss is one quantity, got {got};{because} draw what means the same "
        f"for every method: {instead}"
    )


def _some(values: Mapping[str, str]) -> str:
    """`reverse_kl (run), jsd (other run) and 3 more`"""
    said = ", ".join(f"{value} ({run})" for value, run in list(values.items())[:SAID])
    return said + (f" and {len(values) - SAID} more" if len(values) > SAID else "")


def _kind(divergence: str) -> str | None:
    """The first kind that a divergence tag names; a sum of several is of the first."""
    return next((kind for word, kind in _KINDS.items() if word in divergence), None)
