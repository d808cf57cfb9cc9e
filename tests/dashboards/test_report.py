"""The report is one file that asks the network for nothing, and shows what the figures show."""

from __future__ import annotations

import json
import re
from pathlib import Path

from dashboard_runs import a_run
from plotly.offline import get_plotlyjs

from dashboards.report import write_report


def test_one_file_with_one_plotly_and_no_address(tmp_path: Path) -> None:
    a_run(tmp_path, "opd", 0)
    a_run(tmp_path, "opd", 1)
    a_run(tmp_path, "kat", denominator="rollouts")
    path = write_report(tmp_path, tmp_path)
    text = path.read_text()
    ours = text.replace(get_plotlyjs(), "", 1)
    assert len(text) - len(ours) > 4e6
    assert not re.findall(r'(?:src|href)="(?!data:|#)|url\(|https?://(?!arxiv)', ours)
    assert path.stat().st_size < 10e6
    assert "Not drawn: loss/total_value can share an axis only where the loss is one quantity" in text
    assert text.index('href="#s0"') < text.index('id="s0"')
    assert path.read_text() == write_report(tmp_path, tmp_path).read_text()
    figures = re.findall(r'<script type="application/json">(.*?)</script>', ours, re.DOTALL)
    assert len(figures) > 10
    assert all(json.loads(figure)["data"] for figure in figures)
    assert len(re.findall(r'class="plot" role="img" aria-label="[^"]{40,}"', ours)) == len(figures)


def test_what_models_write_is_text_and_never_markup(tmp_path: Path) -> None:
    a_run(tmp_path, "opd")
    text = write_report(tmp_path, tmp_path).read_text()
    body = text[text.index("<main>") :]
    assert "&lt;b&gt;" in body
    assert "<b>" not in re.sub(r'<script type="application/json">.*?</script>', "", body, flags=re.DOTALL)


def test_a_sweep_in_which_nothing_finished_still_has_a_report(tmp_path: Path) -> None:
    a_run(tmp_path, "opd", status="FAILED")
    text = write_report(tmp_path, tmp_path).read_text()
    assert "No run has finished: opd-0.1-s0 FAILED" in text
    assert "How fast does accuracy rise with steps?" in text
