"""What the dashboards may lean on, and what they say where something is missing."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import dashboards
from dashboards.serve import page, serve
from dashboards.views import listed
from opd_lab import cli

HOME = Path(dashboards.__file__).parent
DOORS = ("opd_lab.bins", "opd_lab.compare", "opd_lab.tracking")  # run folders and what may be said of them


def test_runs_are_read_through_their_doors_alone() -> None:
    for path in HOME.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("opd_lab"):
                assert str(node.module).startswith(DOORS), (path.name, node.module)
        assert len(path.read_text().splitlines()) <= 300, path


def test_without_streamlit_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "streamlit.web", None)
    assert cli.main(["dashboard", str(tmp_path)]) == 2
    assert "pip install 'opd_lab[dashboards]'" in capsys.readouterr().err


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*nothing"):
        serve(tmp_path / "nothing", 1, False)


def test_the_code_that_draws_is_fetched_with_the_page_and_run_before_a_figure_is_there() -> None:
    shown = page()
    found = re.findall(r'<link rel="modulepreload" crossorigin href="\./(static/js/PlotlyChart\.[^"]+\.js)">', shown)
    assert len(found) == 1
    assert f'import("./{found[0]}")' in shown
    links = re.findall(r'href="(\./static/js/[^"]+)"', shown)
    assert len(links) == len(set(links))


def test_a_refusal_keeps_its_stars_and_stands_in_lines() -> None:
    assert listed("draw eval/*/avg_at_*") == r"draw eval/\*/avg_at_\*"
    assert listed("a; b; c") == "- a\n- b\n- c"
    assert listed("a; b") == "a; b"
