"""How long until 100 runs of 1,000 steps are seen: the report, and the app's first picture in a real browser.

    python benchmarks/dashboard.py [runs] [steps]

The runs are made up, and written through the tracker that real ones use: 60 scalars at every step, histograms, token
types and rollouts at every 50th, validation problems at every 100th. Five seeds per method. Needs Chromium and the
extra `dashboards`.
"""

from __future__ import annotations

import math
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import Browser, sync_playwright

from dashboards.report import write_report
from opd_lab.diagnostics.histograms import count
from opd_lab.tracking.run_folder import RunFolder
from opd_lab.tracking.tracker import RunInfo
from opd_lab.types import Report

PICTURE = ".js-plotly-plot .main-svg .scatterlayer .trace"
SEEDS, EVERY, EVALUATE, PROBLEMS, VALIDATION = 5, 50, 100, 200, 64
SHARED = [
    *("kl/reverse_mean_nats", "kl/forward_mean_nats", "kl/reverse_p50_nats", "kl/reverse_p90_nats"),
    *("kl/reverse_p99_nats", "entropy/student_mean_nats", "entropy/teacher_mean_nats", "overlap/top16_fraction"),
    *("overlap/total_variation_mean_fraction", "loss/total_value", "optim/gradient_norm", "rollout/length_mean_tokens"),
    *("time/rollout_seconds", "time/teacher_seconds", "time/update_seconds", "time/diagnostics_seconds"),
    *("time/step_seconds", "teacher/logp_mean_nats", "rollout/support_reward_auroc_fraction"),
    *("rollout/reward_mean_fraction",),
]


def write_runs(home: Path, runs: int, steps: int) -> None:
    for place in range(runs):
        _write(home / "bench" / f"run{place:03d}", place // SEEDS, place % SEEDS, steps)


def _write(folder: Path, method: int, seed: int, steps: int) -> None:
    tracker, draw = RunFolder(), random.Random(1000 * method + seed)
    params = {"seed": seed, "steps": steps, "optim.lr": 3e-4, "optim.updates_per_rollout": 1, "method.k": method}
    params |= {"objective": "eval/validation/avg_at_4", "rollout.prompts": 16, "rollout.per_prompt": 4}
    tags = {"method": f"method{method:02d}", "divergence": "reverse_kl", "seed": str(seed)}
    tags |= {"student_parameters": "110000", "teacher_parameters": "360000"}
    info = RunInfo(name=folder.name, experiment="bench", folder=folder, params=params, tags=tags, config_yaml="")
    tracker.start(info)
    others = [f"method/number{i:02d}_fraction" for i in range(60 - len(SHARED) - 2)]
    for step in range(steps + 1):
        report = Report(step)
        if step:
            report.scalars = {name: draw.random() / math.sqrt(step) for name in (*SHARED, *others)}
            report.scalars |= {"cost/generated_tokens": 1300.0 * step, "cost/teacher_scored_tokens": 1300.0 * step}
        if step % EVALUATE == 0:
            _evaluate(report, "validation", VALIDATION, 0.2 + 0.6 * step / steps, draw)
        if step in (0, steps):
            _evaluate(report, "test", PROBLEMS, 0.2 + 0.6 * step / steps, draw)
        if step and step % EVERY == 0:
            _add_tables(report, draw)
        tracker.log(report)
    tracker.finish("FINISHED")


def _evaluate(report: Report, split: str, problems: int, accuracy: float, draw: random.Random) -> None:
    """Four rollouts of each problem, as an evaluation counts them."""
    correct = [sum(draw.random() < accuracy for _ in range(4)) for _ in range(problems)]
    rows = [{"set": split, "problem": str(p), "n": 4, "correct": c} for p, c in enumerate(correct)]
    report.tables.setdefault("evaluations", []).extend(rows)
    report.scalars |= {f"eval/{split}/{name}": sum(correct) / problems / 4 for name in ("avg_at_4", "pass_at_1")}


def _add_tables(report: Report, draw: random.Random) -> None:
    step = report.step
    values_N = torch.tensor([draw.lognormvariate(-3, 2) for _ in range(500)])
    report.histograms = {name: count(values_N, "kl_nats") for name in ("kl/reverse_nats", "kl/forward_nats")}
    report.tables["positions"] = [
        {"step": step, "decile": d, "tokens": 130, "kl_reverse_mean_nats": draw.random()} for d in range(10)
    ]
    numbers = ("kl_mean_nats", "kl_std_nats", "kl_max_nats", "kl_share_fraction", "token_share_fraction")
    numbers += ("enrichment_ratio", "p_student_mean", "p_teacher_mean", "entropy_teacher_mean_nats")
    report.tables["high_loss_tokens"] = [
        {"step": step, "id": i, "token": f"t{i}", "count": 9, "persistence_windows": 1, "windows": 16, "example": "x"}
        | {name: draw.random() for name in numbers}
        for i in range(50)
    ]
    tokens = {"tokens": ["a"] * 20, "source": ["student"] * 20, "reverse_kl": [draw.random() for _ in range(20)]}
    tokens |= {"logp_student": [-1.0] * 20, "logp_teacher": [-1.0] * 20}
    report.tables["rollouts"] = [
        {"step": step, "uid": u, "prompt": "?", "text": "a", "reward": 1.0, "stopped": True, **tokens} for u in range(4)
    ]


@contextmanager
def served(home: Path) -> Iterator[str]:
    """The address of the app over the runs of a folder, by the command that a user gives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "opd_lab.cli", "dashboard", str(home), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"http://127.0.0.1:{port}/_stcore/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def first_pictures(home: Path) -> list[float]:
    """Seconds from the address to a drawn figure: the first reader of a new server, and a second one."""
    with served(home) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(**chromium())
        return [_first_picture(browser, address) for _ in range(2)]


def _first_picture(browser: Browser, address: str) -> float:
    page = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
    begin = time.perf_counter()
    page.goto(address)
    page.wait_for_selector(PICTURE, timeout=120_000)
    return time.perf_counter() - begin


def _wait_for(address: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(address, timeout=1)
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def chromium() -> dict[str, Any]:
    """How Chromium is started: the machine's own, else Playwright's."""
    own = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    words = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    return {"args": words} | ({"executable_path": own} if own else {})


def main(runs: int, steps: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        begin = time.perf_counter()
        write_runs(home, runs, steps)
        size = sum(path.stat().st_size for path in home.rglob("*") if path.is_file()) / 1e6
        print(f"{runs} runs x {steps} steps x 60 scalars written in {time.perf_counter() - begin:.1f} s, {size:.0f} MB")
        cold, warm = first_pictures(home)
        print(f"app: first picture {cold:.2f} s (a new server), {warm:.2f} s (a second reader)")
        begin = time.perf_counter()
        path = write_report(home, home / "bench")
        print(f"report: {time.perf_counter() - begin:.1f} s, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(*[int(word) for word in sys.argv[1:3]] or [100, 1000])
