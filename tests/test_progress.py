"""The live line holds everything a person wants to know, in a terminal of ordinary width."""

import io

import pytest
from rich.console import Console

from opd_lab.progress import bars, describe
from opd_lab.train import Progress

STEP = Progress(
    step=20, steps=100, loss=-15.261, kl=0.231, accuracy=0.777, tokens_per_second=10245.0, seconds_left=123.0
)


@pytest.mark.parametrize("name", ["opd s0", "rock_tokens_random_positions s12"])
def test_eighty_columns_are_enough(name):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)
    with bars(console) as live:
        row = live.add_task(name, total=100, said="")
        live.update(row, completed=20, said=describe(STEP))
    shown = out.getvalue()
    assert "20/100" in shown
    for words in ("loss -15.261", "KL 0.231", "acc 0.777", "10,245 tok/s", "123 s left"):
        assert words in shown


def test_what_is_not_known_is_not_said():
    nan = float("nan")
    assert describe(Progress(0, 50, nan, nan, nan, nan, nan)) == "starting"
