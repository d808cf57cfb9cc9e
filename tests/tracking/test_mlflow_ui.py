"""MLflow's own pages, in a browser: charts of several runs, histograms by step, tables, and pages of rollouts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_run import run

from tests.tracking.browser import CARD, watched
from tests.tracking.services import free_port, mlflow_server, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two runs of different methods, and the server that shows them."""
    home, port = tmp_path_factory.mktemp("ui"), free_port()
    for method in ("opd", "scope"):
        run(home, f"method={method}", mlflow=True, name=method)
    with mlflow_server(home, port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    with watched(address) as page:
        yield page


def charts(page: Any, address: str, search: str) -> None:
    """The comparison of all runs, with the metric charts of a name; pictures are there whatever one looks for."""
    page.goto(f"{address}/#/experiments/1/runs?compareRunsMode=CHART")
    page.locator(CARD).first.wait_for()
    page.get_by_label("Close", exact=True).dispatch_event("click")  # the assistant
    page.get_by_placeholder("Search metric charts").fill(search)


def card(page: Any, title: str) -> Any:
    """A chart, which MLflow loads when it comes into view."""
    found = page.locator(CARD).filter(has=page.get_by_title(title, exact=True))

    def scrolled() -> bool:
        if found.count() == 0:
            page.mouse.move(900, 700)
            page.mouse.wheel(0, 300)
            page.wait_for_timeout(200)
        return found.count() > 0

    wait_for(scrolled, 30)
    found.first.scroll_into_view_if_needed()
    return found.first


def test_metrics_of_several_runs_are_drawn_in_one_chart(page: Any, address: str) -> None:
    charts(page, address, "kl/reverse_mean_nats")
    chart = card(page, "kl/reverse_mean_nats")
    chart.locator(".js-plotly-plot .scatterlayer .trace").first.wait_for()
    for run_name in ("opd-s0-", "scope-s0-"):
        chart.get_by_text(run_name).first.wait_for()  # the legend


def test_a_histogram_shows_its_picture_of_a_chosen_step_for_every_run(page: Any, address: str, tmp_path: Path) -> None:
    charts(page, address, "no chart of a metric")
    chart = card(page, "kl/reverse_nats")
    for step in (2, 4):
        chart.get_by_role("slider").focus()
        page.keyboard.press("ArrowRight")
        pictures = chart.locator(f"img[src*='kl~reverse_nats%2Bstep%2B{step}%2B']")
        pictures.nth(1).wait_for()
        assert pictures.count() == 2  # one per run
        for picture in pictures.all():
            wait_for(lambda picture=picture: picture.evaluate("image => image.naturalWidth") > 0, 20)
    pictures.first.scroll_into_view_if_needed()
    page.screenshot(path=tmp_path / "histogram.png")
    pictures.first.click()  # the whole picture, not its small copy
    whole = page.locator("img[src*='kl~reverse_nats'][src*='.png']")
    whole.wait_for()
    wait_for(lambda: whole.evaluate("image => image.naturalWidth") == 512, 20)
    page.screenshot(path=tmp_path / "whole.png")


def test_token_types_are_compared_in_the_table_view(page: Any, address: str, tmp_path: Path) -> None:
    page.goto(f"{address}/#/experiments/1/runs?compareRunsMode=ARTIFACT")
    page.get_by_text("high_loss_tokens.json").first.wait_for()
    page.get_by_placeholder("Filter by token").wait_for()  # a row per token type, a column per run, and their KL
    page.get_by_text("kl_mean_nats", exact=True).first.wait_for()
    page.screenshot(path=tmp_path / "table.png")


def test_a_page_of_rollouts_is_shown_among_the_artifacts(page: Any, address: str, tmp_path: Path) -> None:
    page.goto(f"{address}/#/experiments/1/runs?compareRunsMode=TABLE")
    page.get_by_role("link", name="opd-s0-").first.click()
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("rollouts", exact=True).first.click()
    page.get_by_text("step_000004.html").first.click()
    shown = page.frame_locator("iframe").locator(".rollout .token[class*=kl]")
    shown.first.wait_for()
    assert shown.first.get_attribute("title").startswith("token ")
    page.screenshot(path=tmp_path / "rollouts.png")
