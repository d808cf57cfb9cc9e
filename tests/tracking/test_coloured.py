"""Rollouts as a page: colours by KL, everything known under the pointer, nothing of a model's text taken for HTML."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from typing import Any

import pytest

from opd_lab.tracking.coloured import COLOURS, LIMITS, STYLE, page, rollout

ROW: dict[str, Any] = {
    "step": 5,
    "uid": 3,
    "reward": 1.0,
    "stopped": True,
    "prompt": "<b>2</b> + 3 ?",
    "text": "so <script>alert(1)</script> 5",
    "tokens": ["so", "<script>alert(1)</script>", "5"],
    "source": ["given", "student", "teacher"],
    "reverse_kl": [math.nan, 0.25, 4.0],
    "logp_student": [math.nan, math.log(0.5), math.log(0.125)],
    "logp_teacher": [math.nan, math.log(0.25), math.log(0.0625)],
    "weight": [math.nan, 1.5, 0.0],
}


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.spans: list[dict[str, str | None]] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        if tag == "span":
            self.spans.append(dict(attrs))


def test_each_token_has_its_colour_and_says_what_is_known_of_it() -> None:
    spans = Tags(rollout(ROW)).spans
    assert [span["class"] for span in spans] == ["token given", "token student kl2", "token teacher kl5"]
    assert spans[1]["title"] == (
        "token '<script>alert(1)</script>'\nKL 0.25 nats\np student 0.5\np teacher 0.25\nweight 1.5\nsource student"
    )
    assert spans[0]["title"] == "token 'so'\nKL - nats\np student -\np teacher -\nweight -\nsource given"
    assert "reward 1, 3 tokens, mean KL 2.12 nats" in rollout(ROW)  # (0.25 + 4) / 2


def test_text_of_models_is_no_html_and_the_page_needs_nothing_else() -> None:
    text = page([ROW], "<i>")
    assert Tags(text).names <= {"html", "head", "meta", "title", "style", "body", "h1", "p", "div", "span"}
    assert "http" not in text and "url(" not in text and "@import" not in text


def test_words_are_told_apart_and_pieces_of_words_are_not() -> None:
    pieces = ROW | {"tokens": ["4", "7\n", " 5"], "text": "47\n 5"}
    assert "</span> <span" in rollout(ROW) and "</span> <span" not in rollout(pieces)
    assert "7↵\n</span>" in rollout(pieces)


def test_a_run_without_scores_still_has_its_text() -> None:
    bare = {name: value for name, value in ROW.items() if name not in ("reverse_kl", "logp_teacher")}
    for row in (bare, bare | {"reverse_kl": math.nan, "logp_teacher": None}):
        assert [span["class"] for span in Tags(rollout(row)).spans] == ["token given", "token student", "token teacher"]


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("k", range(1, len(COLOURS) + 1))
def test_text_stands_out_from_every_ground_and_grounds_darken(k: int) -> None:
    ground, dark = luminance(COLOURS[k - 1]), k == len(COLOURS)
    contrast = (1.05 / (ground + 0.05)) if dark else ((ground + 0.05) / 0.05)
    assert contrast >= 7  # WCAG AAA
    assert k == 1 or ground < luminance(COLOURS[k - 2])
    assert f".kl{k} {{ background: {COLOURS[k - 1]}; color: {'white' if dark else 'black'}" in STYLE
    assert len(LIMITS) == len(COLOURS)
