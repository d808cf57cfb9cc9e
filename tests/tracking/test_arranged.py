"""The page of an experiment, arranged: what the tag says, and what MLflow's page makes of it."""

from __future__ import annotations

import base64
import json
import logging
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
from bench import launcher
from lab_sweep import asked

from opd_lab.sweep import run as sweep
from opd_lab.tracking import arranged, read
from opd_lab.tracking.mlflow import MLflow, open_store
from tests.tracking.browser import CARD, watched
from tests.tracking.runs import info
from tests.tracking.services import free_port, mlflow_server, wait_for

FACETS = {"searchFilter", "orderByKey", "orderByAsc"}  # of MLflow 3.17's page, as are the names of its state
STATE = {"selectedColumns", "columnOrder", "columnWidths", "runsHiddenMode", "groupBy", "isAccordionReordered"}
STATE |= {"compareRunSections", "compareRunCharts"}


def said(home: Path, key: str = arranged.RUNS) -> dict[str, Any]:
    """What the page reads: a name for its menu, a time, and its state as JSON, deflated, in base 64."""
    store = open_store(None, home, "tests")
    text = store.client.get_experiment(store.experiment_id).tags[f"mlflow.sharedViewState.{key}"]
    assert len(text) < 5000  # all that older servers take
    view = json.loads(text)
    assert isinstance(view["name"], str) and view["createdAt"] == view["updatedAt"] > 1e12
    return json.loads(zlib.decompress(base64.b64decode(view["state"].removeprefix("deflate;"))))


def test_the_first_run_of_an_experiment_arranges_its_page(tmp_path: Path) -> None:
    MLflow(None, tmp_path).start(info(tmp_path / "tests" / "a", params={"steps": 7}))
    MLflow(None, tmp_path).start(info(tmp_path / "tests" / "b", params={"steps": 9}))
    runs, methods = said(tmp_path), said(tmp_path, arranged.METHODS)
    assert set(runs) == FACETS | STATE
    assert runs["groupBy"] is None and methods["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "method"}]
    sections = [section["uuid"] for section in runs["compareRunSections"]]
    assert {chart["metricSectionId"] for chart in runs["compareRunCharts"]} == set(sections)
    assert [chart["step"] for chart in runs["compareRunCharts"] if chart["type"] == "IMAGE"] == [7]  # the first's


def test_a_sweep_says_what_differs_and_is_not_overruled_by_runs(tmp_path: Path) -> None:
    store = open_store(None, tmp_path, "tests")
    arranged.arrange(store.client, store.experiment_id, steps=3, params=["optim.lr"])
    MLflow(None, tmp_path).start(info(tmp_path / "tests" / "a"))
    assert said(tmp_path)["selectedColumns"][:2] == ["attributes.`Duration`", "params.`optim.lr`"]


def test_a_store_that_does_not_take_it_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Closed:
        def get_experiment(self, experiment_id: str) -> Any:
            raise PermissionError("not yours")

    client: Any = Closed()
    with caplog.at_level(logging.WARNING, "opd_lab.tracking"):
        arranged.arrange(client, "1", steps=3)
    (line,) = caplog.messages
    assert line.startswith("MLflow's page stays as it is") and "not yours" in line


@pytest.mark.slow
def test_the_printed_address_opens_the_runs_of_a_sweep_and_their_charts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ["method=opd,scope", "seed=0,1", "sweep.name=shown", "optim.lr=1e-3"]
    assert sweep.run(asked(tmp_path, *words, mlflow=True), launcher(slots=2)) == 0
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    lines = capsys.readouterr().out.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("mlflow   "))
    assert lines[at].endswith(f"mlflow ui --backend-store-uri {store} --host 127.0.0.1 --port 5000")
    address = lines[at + 1].split()[-1]
    recorded = set(read.metrics(tmp_path / "opd_lab")["name"])
    charts = [name for shown in arranged.SECTIONS.values() for kind, name in shown if kind != "IMAGE"]
    assert recorded.issuperset([*arranged.COLUMNS, *charts])
    runs = sorted(path.parent.name for path in (tmp_path / "opd_lab").glob("*/mlflow.json"))
    assert len(runs) == 4
    port = free_port()
    here = f"http://127.0.0.1:{port}"
    with mlflow_server(tmp_path, port), watched(here) as page:
        page.goto(address.replace("http://127.0.0.1:5000", here))
        for name in (arranged.VALIDATION, arranged.PROBE_KL):
            chart = page.locator(CARD).filter(has=page.get_by_title(name, exact=True))
            chart.locator(".js-plotly-plot .scatterlayer .trace").nth(3).wait_for()
            for run in runs:
                chart.get_by_text(f"{run} ({name})").first.wait_for(state="attached")  # the legend
        bars = page.locator(CARD).filter(has=page.get_by_title(arranged.TEST, exact=True))
        wait_for(lambda: bars.locator(".js-plotly-plot .barlayer .point").count() == 4, 60)
        page.screenshot(path=tmp_path / "charts.png")
        listed = page.get_by_role("link", name=re.compile(r"-s\d-")).all_inner_texts()
        assert sorted(listed) == runs  # neither sweep nor trials
        page.locator("[data-testid=experiment-view-compare-runs-chart-area]").hover()
        pictures = page.locator(CARD).locator("img[src*='kl~reverse_nats%2Bstep%2B4%2B']")

        def drawn() -> bool:
            page.mouse.wheel(0, 300)
            page.wait_for_timeout(200)
            return pictures.count() == 4 and all(p.evaluate("image => image.naturalWidth") > 0 for p in pictures.all())

        wait_for(drawn, 60)  # at the last step
        page.goto(page.url.replace("compareRunsMode=CHART", "compareRunsMode=TABLE"))
        for name in ("seed", arranged.TEST, arranged.TEST_KL):
            page.get_by_role("columnheader", name=name, exact=True).first.wait_for()
        page.screenshot(path=tmp_path / "table.png")
        page.get_by_text(arranged.TITLES[arranged.RUNS]).click()
        page.get_by_text(arranged.TITLES[arranged.METHODS]).click()
        for method in ("opd", "scope"):
            page.get_by_text(f"Group: {method}", exact=True).wait_for()
        page.screenshot(path=tmp_path / "methods.png")
