"""App and report in a real browser, on a real finished sweep: two methods, two seeds, four steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import pytest
from lab_run import command
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from benchmarks.dashboard import PICTURE, chromium, served
from dashboards.report import write_report
from opd_lab.tracking.run_folder import RunFolder
from opd_lab.tracking.tracker import RunInfo
from opd_lab.types import Report

pytestmark = pytest.mark.slow
PATIENCE = 60_000  # milliseconds: a busy machine
# By how much the columns of a table of the app are wider than what is seen of them.
WIDER = "frame => (s => s.scrollWidth - s.clientWidth)(frame.querySelector('.dvn-scroller'))"
LEGEND = ".js-plotly-plot .legendtext"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("runs")
    stored = (f"tracking.folder={home}", "tracking.mlflow=false")
    done = command("sweep", "smoke", "seed=0,1", "threads=1", *stored, cwd=home)
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(**chromium())
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    with served(runs) as at:
        yield at


class Watched:
    """A page whose console and requests are remembered."""

    def __init__(self, context: BrowserContext) -> None:
        self.page: Page = context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(urlparse(request.url).netloc))


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    yield Watched(context)
    context.close()


def legend(page: Page) -> set[str]:
    """The methods of the page's first figure."""
    return set(page.locator(".js-plotly-plot").first.locator(".legendtext").all_text_contents())


def choose(page: Page, name: str, value: str) -> None:
    page.get_by_role("combobox", name=name).click()
    page.get_by_role("option", name=value, exact=True).click()


def test_a_choice_changes_the_figures_and_its_link_restores_it(
    watched: Watched, address: str, browser: Browser
) -> None:
    page = watched.page
    page.goto(address)
    page.wait_for_selector(PICTURE)
    assert legend(page) == {"opd", "scope"}
    choose(page, "Methods", "scope")
    expect(page.locator(LEGEND).filter(has_text="opd")).to_have_count(0, timeout=PATIENCE)
    assert "method=scope" in page.url
    page.get_by_text("Divergence", exact=True).click()
    page.get_by_text("How far is the student from the teacher on its own rollouts?").wait_for()
    assert "view=Divergence" in page.url

    elsewhere = Watched(browser.new_context())
    elsewhere.page.goto(page.url)
    elsewhere.page.get_by_text("How far is the student from the teacher on its own rollouts?").wait_for()
    elsewhere.page.wait_for_selector(PICTURE)
    assert legend(elsewhere.page) in (set(), {"scope"})  # one line needs no legend
    assert watched.errors == elsewhere.errors == []
    assert watched.hosts | elsewhere.hosts == {urlparse(address).netloc}


def test_every_page_draws_without_an_error(watched: Watched, address: str) -> None:
    page = watched.page
    page.goto(address)
    for view in ("Divergence", "Tokens", "Rollouts", "Cost", "Loss", "Alarms", "Search", "Papers", "Runs", "Accuracy"):
        page.get_by_text(view, exact=True).first.click()
        page.wait_for_url(f"**view={view}*" if view != "Accuracy" else "**")
        page.locator("h3, [data-testid=stAlert]").first.wait_for()
        expect(page.get_by_test_id("stStatusWidget")).to_have_count(0, timeout=PATIENCE)
        assert page.get_by_test_id("stException").count() == 0, view
    assert watched.errors == []
    assert watched.hosts == {urlparse(address).netloc}


def test_runs_are_filtered_by_their_params(watched: Watched, address: str) -> None:
    watched.page.goto(f"{address}/?view=Runs&by=seed&where0=1")
    watched.page.get_by_text("2 runs of 2 methods").wait_for()
    watched.page.goto(f"{address}/?view=Runs")
    watched.page.get_by_text("4 runs of 2 methods").wait_for()


def test_tokens_of_two_methods_stand_side_by_side_in_the_colours_of_their_kl(watched: Watched, address: str) -> None:
    watched.page.goto(f"{address}/?view=Rollouts")
    pair = watched.page.locator(".pair").first
    pair.wait_for()
    assert pair.locator("h4").all_inner_texts() == ["opd", "scope"]
    prompts = pair.locator(".rollout p:nth-of-type(2)").all_inner_texts()
    assert len(prompts) == 2
    assert prompts[0] == prompts[1]
    assert pair.locator(".token[class*=kl]").count() > 0


def test_a_run_that_goes_on_is_followed(watched: Watched, tmp_path: Path) -> None:
    tracker = RunFolder()
    info = RunInfo(
        name="a", experiment="x", folder=tmp_path / "x" / "a", params={}, tags={"method": "opd"}, config_yaml=""
    )
    tracker.start(info)
    for step in range(3):
        tracker.log(Report(step, {"kl/reverse_mean_nats": 1.0 / (1 + step)}))
    with served(tmp_path) as address:
        page = watched.page
        page.goto(f"{address}/?view=Divergence")
        page.wait_for_selector(PICTURE)
        last = "() => Math.max(...document.querySelector('.js-plotly-plot')._fullData.flatMap(t => Array.from(t.x)))"
        assert page.evaluate(last) == 2
        tracker.log(Report(3, {"kl/reverse_mean_nats": 0.1}))
        page.wait_for_function(f"({last})() === 3")
    assert watched.errors == []


def test_an_empty_folder_says_what_to_do(watched: Watched, tmp_path: Path) -> None:
    with served(tmp_path) as address:
        watched.page.goto(address)
        watched.page.get_by_text("opd-lab sweep smoke").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_draws_from_disk_without_a_network(
    browser: Browser, runs: Path, tmp_path: Path, scheme: str
) -> None:
    path = write_report(tmp_path, runs)
    context = browser.new_context(offline=True, color_scheme=scheme)  # pyright: ignore[reportArgumentType]
    context.route("**/*", lambda route: route.continue_() if route.request.url.startswith("file:") else route.abort())
    watched = Watched(context)
    page = watched.page
    page.goto(path.as_uri())
    plots = page.locator(".plot")
    for place in range(plots.count()):
        plots.nth(place).scroll_into_view_if_needed()
        plots.nth(place).locator(".main-svg").first.wait_for()
    assert plots.count() > 12
    ink = page.evaluate("getComputedStyle(document.querySelector('.plot .xtick text')).fill")
    assert ink == {"light": "rgb(31, 35, 40)", "dark": "rgb(230, 232, 235)"}[scheme]
    assert watched.errors == []
    assert watched.hosts == {""}
    context.close()


def test_a_table_of_the_report_sorts_by_the_heading_that_is_pressed(
    browser: Browser, runs: Path, tmp_path: Path
) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(write_report(tmp_path, runs).as_uri())
    table = page.locator(".wide table")
    assert (
        page.evaluate("[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length")
        == 0
    )
    heading = table.locator("th", has_text="count")
    place = heading.evaluate("heading => heading.cellIndex")
    for _, order in (("first", "descending"), ("again", "ascending")):
        heading.locator("button").press("Enter")  # by the keyboard
        cells = table.locator(f"tbody tr td:nth-child({place + 1})").all_inner_texts()
        numbers = [int(cell.replace(",", "")) for cell in cells]
        assert numbers == sorted(numbers, reverse=order == "descending")
        assert heading.get_attribute("aria-sort") == order
    page.close()


def test_a_table_of_the_app_sorts_by_the_heading_that_is_pressed(watched: Watched, address: str) -> None:
    page = watched.page
    page.goto(f"{address}/?view=Tokens")
    frame = page.get_by_test_id("stDataFrame")
    frame.locator("canvas").first.wait_for()
    frame.scroll_into_view_if_needed()
    assert frame.evaluate(WIDER) == 0
    first = frame.locator("td[aria-colindex='1']").first  # the canvas keeps a table for screen readers
    for order in ("opd", "scope"):  # up, then down
        box = frame.locator("canvas").first.bounding_box()
        assert box is not None
        page.mouse.click(box["x"] + 20, box["y"] + 15)
        expect(first).to_have_text(order, timeout=PATIENCE)
