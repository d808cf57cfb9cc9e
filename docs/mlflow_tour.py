"""Take the pictures mlflow_*.png: MLflow's own pages, over the store of a finished sweep.

    opd-lab sweep compare method=opd,scope,kat_lab,fire_opd seed=0,1
    python docs/mlflow_tour.py opd_runs compare

Needs Chromium and Playwright.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import mlflow
from PIL import Image
from playwright.sync_api import FloatRect, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.dashboard import chromium
from opd_lab.tracking.arranged import METHODS, RUNS, TEST
from opd_lab.tracking.arranged import address as address_of

HERE = Path(__file__).parent
PATIENCE = 60_000  # milliseconds
CARD = "[data-testid=experiment-view-compare-runs-card]"
AREA = "[data-testid=experiment-view-compare-runs-chart-area]"
MENU = 200  # pixels, at the left
COLOURS = 256
BELOW_PATH = 205  # pixels above which a page names the folder of the store
SETTLED = 4_000  # milliseconds until charts have been drawn


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """MLflow's address over the store of a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = f"sqlite:///{(folder / 'mlflow.db').resolve()}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--backend-store-uri",
        store,
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait()


def take(page: Page, name: str, below: int = 0) -> None:
    """The page without MLflow's menu, in few colours."""
    page.mouse.move(0, 0)  # no tooltip
    assistant = page.get_by_label("Close", exact=True)
    if assistant.count():
        assistant.first.dispatch_event("click")
    page.wait_for_timeout(SETTLED)
    size = page.viewport_size
    assert size is not None
    clip: FloatRect = {"x": MENU, "y": below, "width": size["width"] - MENU, "height": size["height"] - below}
    Image.open(BytesIO(page.screenshot(clip=clip))).quantize(COLOURS).save(HERE / f"mlflow_{name}.png", optimize=True)


def arranged(page: Page, address: str, runs: int) -> None:
    """What a sweep prints the address of: its charts, its pictures, its table, and the methods averaged."""
    page.goto(address)
    page.locator(f"{CARD} .barlayer .point").nth(2 * runs - 1).wait_for()
    take(page, "charts")
    page.locator(AREA).hover()
    pictures = page.locator(f"{CARD} img[src*='kl~reverse_nats']")
    while pictures.count() < runs:
        page.mouse.wheel(0, 200)
        page.wait_for_timeout(300)
    pictures.nth(3).scroll_into_view_if_needed()
    take(page, "comparison")
    page.goto(page.url.replace("compareRunsMode=CHART", "compareRunsMode=TABLE"))
    page.get_by_role("columnheader", name=TEST, exact=True).first.wait_for()
    take(page, "table")
    page.goto("about:blank")
    page.goto(address.replace(f"={RUNS}&", f"={METHODS}&"))
    page.get_by_text("Group: opd", exact=True).wait_for()
    page.locator(f"{CARD} .barlayer .point").first.wait_for()
    take(page, "methods")


def main(folder: Path, experiment: str) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
    store = mlflow.MlflowClient()
    found = store.get_experiment_by_name(experiment)
    assert found is not None, experiment
    runs = store.search_runs([found.experiment_id])
    parent = next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    child = next(run for run in runs if str(run.info.run_name).startswith("opd-"))
    with served(folder) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(**chromium())
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(PATIENCE)
        arranged(page, address_of(address, found.experiment_id), sum("method" in run.data.tags for run in runs))
        at = f"{address}/#/experiments/{found.experiment_id}/runs"
        page.goto(f"{at}/{parent.info.run_id}")
        page.wait_for_timeout(SETTLED)  # what comes late would move the page under the click
        page.get_by_text("Show more").first.dispatch_event("click")
        page.get_by_text("Description").first.scroll_into_view_if_needed()
        take(page, "sweep")
        page.goto(f"{at}/{child.info.run_id}/artifacts/rollouts")
        page.get_by_text(re.compile(r"^step_.*html$")).last.click()
        page.frame_locator("iframe").locator(".rollout").first.wait_for()
        take(page, "rollouts", below=BELOW_PATH)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
