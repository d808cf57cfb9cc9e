"""What may share an axis. Two losses with unlike conventions are different quantities that happen to have one name."""

from __future__ import annotations

from pathlib import Path

from opd_lab.tracking import read

# The tags that say what a loss is. Everything else that is logged means the same for every method.
CONVENTIONS = ("divergence", "estimator", "direction", "beta", "tail", "denominator", "loss_temperature")


def conventions(folder: Path) -> dict[str, str]:
    """What a run says of its loss."""
    tags = read.status(folder)["tags"]
    return {name: str(tags.get(name, "not said")) for name in CONVENTIONS if name in tags}


def same_axis(runs: read.Runs, metric: str) -> None:
    """Refuse to draw one metric of several runs on one axis if it is not one quantity.

    Raises:
        ValueError: a loss (`loss/*`) whose conventions differ; names the first difference.
    """
    if not metric.startswith("loss/"):
        return
    said = {folder: conventions(folder) for folder in read.folders(runs)}
    for name in CONVENTIONS:
        values: dict[str, str] = {}
        for folder, convention in said.items():
            values.setdefault(convention.get(name, "not said"), folder.name)
        if len(values) > 1:
            got = ", ".join(f"{value} ({run})" for value, run in values.items())
            raise ValueError(
                f"{metric} can share an axis only where {name} is the same, got {got}; "
                "compare kl/reverse_mean_nats or eval/*, which mean the same for every method"
            )
