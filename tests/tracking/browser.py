"""Headless Chromium on a page of MLflow's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 60_000  # Playwright's patience, ms
CARD = "[data-testid=experiment-view-compare-runs-card]"
MLFLOWS_OWN = (
    "users/current",
    "ResizeObserver loop",
    "status of 404",
)  # it asks who is logged in, where nobody logs in
HARMLESS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking")


@contextmanager
def watched(address: str) -> Iterator[Any]:
    """A page that has asked nobody but this server and found nothing wrong."""
    from playwright.sync_api import sync_playwright

    asked, wrong = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=HARMLESS)
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(SECONDS)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("requestfailed", lambda request: wrong.append(f"{request.url} {request.failure}"))
        yield page
        browser.close()
    assert len(asked) > 20
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert [
        said for said in wrong if not any(known in said for known in MLFLOWS_OWN) and "ERR_ABORTED" not in said
    ] == []
