"""A lab run whose seed is its fate: 1 is killed, 2 raises, 3 never ends, 4 is not a number, 5 never ends and does not
stop when asked; any other goes well.
"""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opd_lab.sweep import worker
from opd_lab.sweep.contract import Order
from opd_lab.sweep.worker import Report
from opd_lab.train import Evaluated, Progress


@dataclass
class Fate:
    report: Report
    seed: int

    def step(self, progress: Progress) -> None:
        self.report.step(progress)

    def evaluated(self, seen: Evaluated) -> None:
        if self.seed == 5:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.report.evaluated(seen)
        if self.seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.seed == 2:
            raise RuntimeError("no such luck")
        if self.seed in (3, 5):
            time.sleep(120)


def train(order: Order, metrics: Sequence[str], report: Report) -> Mapping[str, float]:
    values = worker.train(order, metrics, Fate(report, order.seed))
    return dict.fromkeys(values, float("nan")) if order.seed == 4 else values
