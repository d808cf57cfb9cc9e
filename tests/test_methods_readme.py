"""The pages about the methods are made from the cards, and the cards say what the pages need."""

import re

import pytest

from opd_lab.catalogue import BEGIN, PAGE, Entry, cost, entries, front, hooks, lines, page, prose, teacher, title
from opd_lab.config import CONF, ROOT

ENTRIES = entries()
CARDS = {entry.cls.__module__.rpartition(".")[2]: entry.card for entry in ENTRIES}
AGAIN = "run `python -m opd_lab.catalogue` and commit what it writes"


def test_the_page_is_what_the_cards_say():
    assert PAGE.read_text() == page(), AGAIN


def test_the_front_page_has_the_same_table():
    text = (ROOT / "README.md").read_text()
    if BEGIN in text:
        assert text == front(text), AGAIN


def test_front_replaces_what_stands_between_the_markers_and_nothing_else():
    text = front("above\n<!-- methods -->\nstale\n<!-- /methods -->\nbelow\n")
    assert text.startswith("above\n<!-- methods -->\n| `method=` |") and text.endswith("|\n<!-- /methods -->\nbelow\n")
    assert "stale" not in text and front(text) == text and front("no markers\n") == "no markers\n"


def test_every_yaml_has_one_line():
    names = [variant.name for entry in ENTRIES for variant in entry.variants]
    assert sorted(names) == sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
    text = page()
    assert all(text.count(f"\n| `{name}` |") == 1 for name in names)


def test_no_two_methods_say_the_same_of_themselves():
    said = [entry.title for entry in ENTRIES]
    assert len(set(said)) == len(said), "a class that shares its file needs a docstring of its own"


def test_what_a_method_answers_asks_and_costs():
    found = {entry.main.name: entry for entry in ENTRIES}
    said = {name: (hooks(e.cls), teacher(e.main.bound), cost(e.main.bound)) for name, e in found.items()}
    assert said["opd"] == ([], "distributions", "none")
    assert said["fire_opd"] == (["needs", "weights", "losses"], "log-probs, distributions", "none")
    assert said["omniopd"][1:] == ("texts", "no teacher pass, a reference pass, the teacher writes texts")
    assert said["oprd_bridge"][1:] == ("hidden states", "a fit before the first step")
    assert said["trb"][2] == "the teacher decodes along" and said["kat"][2] == "the teacher scores while decoding"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.main.name)
def test_every_variant_says_what_it_is_for(entry: Entry):
    assert all(variant.says for variant in entry.variants), "the YAML begins with a comment"


@pytest.mark.parametrize("name", CARDS)
def test_a_card_has_a_title_prose_and_labels(name: str):
    card = CARDS[name]
    assert re.search(r"`method=\w+`", card.splitlines()[0]), "its first line names the command"
    assert len(title(card)) < 100 and len(prose(card)) > 100
    for paragraph in card.split("\n\n"):
        if re.search(r"^(Neutral|Differs|Status):", paragraph, re.MULTILINE):
            for line in paragraph.splitlines():
                assert re.match(r"[A-Z][^:]*:|  ", line), f"indent what goes on behind a label: {line}"


def test_labels_are_read_with_what_goes_on_behind_them():
    card = "T: `method=t`.\n\nNeutral: itself.\nDiffers: one\n         thing.\nDiffers: another.\n\nMetrics: m."
    assert lines(card, "Differs") == ["one thing.", "another."]
    assert lines(card, "Status") == []
