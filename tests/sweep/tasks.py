"""Trials that cost nothing: what they do is in their config, a line of JSON."""

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence

from opd_lab.sweep.contract import Order
from opd_lab.sweep.worker import Report
from opd_lab.train import Evaluated


def never(folder: str, environment: Mapping[str, str]) -> None:
    """A trial's process that does not get as far as its task."""
    time.sleep(60)


def curve(order: Order, metrics: Sequence[str], report: Report) -> Mapping[str, float]:
    """Rises to `top` in equal steps, or goes along one of the `curves`; `fate` says how else it may end."""
    said = json.loads(order.config)
    fate, top = said.get("fate", "well"), said["top"]
    drawn = [top * step / order.steps for step in range(1, order.steps + 1)]
    if "curves" in said:
        drawn = said["curves"][said["curve"]]
    if fate == "falls":
        drawn.reverse()
    value = 0.0
    for step in range(1, order.steps + 1):
        time.sleep(said.get("seconds", 0.0))
        value = drawn[step - 1]
        problems = {str(n): value + n / 100 for n in range(6)}
        report.evaluated(
            Evaluated(step, {metrics[0]: value, "cost/generated_tokens": 10.0 * step}, problems, step * 1.0)
        )
        if fate == "raises" and step == 2:
            raise RuntimeError("no such luck")
        if fate == "killed" and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "large" and step == 1:
            said["block"] = b"x" * (1 << 30)
            time.sleep(30)
        if fate == "slow":
            time.sleep(30)
    return dict.fromkeys(metrics, float("nan") if fate == "diverges" else value)
