"""The app's pages: each is the figures and tables that answer one kind of question about the chosen runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import streamlit as st

from dashboards import style
from dashboards.figures import accuracy, alarms, cost, divergence, estimators, papers, rollouts, sweep, tokens
from dashboards.runs import AXES, Frame, Selected, params
from opd_lab.compare import printed
from opd_lab.compare.groups import finished
from opd_lab.compare.guard import CONVENTIONS, conventions
from opd_lab.tracking import coloured

LISTED = 3  # parts from which a sentence is easier to read as a list
REACHED = {  # column of `Comparison.rows` -> its heading
    "method": "method",
    "seeds": "seeds",
    "accuracy_before": "before",
    "accuracy_after": "after",
    "accuracy_low": "95 % from",
    "accuracy_high": "to",
    "accuracy_best": "best checkpoint",
    "kl_held_out_nats": "KL, nats",
    "student_tokens": "student tokens",
    "teacher_tokens": "teacher tokens",
    "seconds": "seconds",
}
GAINED = {  # column of `Comparison.gains` -> its heading
    "method": "method",
    "gain": "gain",
    "gain_low": "95 % from",
    "gain_high": "to",
    "p_holm": "p (Holm)",
    "separated": "* separated",
    "improvement": "beats it",
    "improvement_low": "beats it, from",
    "improvement_high": "beats it, to",
    "seeds_needed": "seeds to separate",
}
LETTER, GIVES = 8, 50  # pixels of a letter in a table; of the context, that it gives to long names of methods
CONFIG = {"displaylogo": False, "toImageButtonOptions": {"format": "svg"}}


def draw(figure: object) -> None:
    """The question as a heading, the figure, how to read it; in place of an empty one, what to do."""
    words = style.words(figure)
    st.subheader(words["question"], anchor=False)
    if words["empty"]:
        st.info(listed(words["empty"]))
        return
    shown = style.bare(figure, style.DARK if st.context.theme.type == "dark" else style.LIGHT)
    st.plotly_chart(shown, theme=None, config=CONFIG, alt=words["alt"], key=f"figure {words['question']}")
    if words["note"]:
        st.caption(words["note"])


def listed(text: str) -> str:
    """Words as they are, whatever Markdown would make of them; a long sentence a part to a line."""
    parts = re.sub(r"([\\*\[\]<>~$])", r"\\\1", text).split("; ")
    return "; ".join(parts) if len(parts) < LISTED else "\n".join(f"- {part}" for part in parts)


def table(title: str, rows: Frame, stays: Collection[str] = ()) -> None:
    """Sorts by the heading that is pressed; some columns stay where they are when the others are scrolled."""
    st.subheader(title, anchor=False)
    pinned = {name: st.column_config.Column(pinned=True) for name in stays}
    st.dataframe(rows, hide_index=True, alt=title, column_config=pinned)


def headed(rows: Frame, heads: Mapping[str, str]) -> Frame:
    """The columns of a table that have a heading, under it."""
    return rows[[name for name in heads if name in rows]].rename(columns=heads)


def axis() -> str:
    """What the curves are drawn against."""
    return st.selectbox("Curves against", list(AXES), format_func=lambda x: AXES[x], key="x", bind="query-params")


def show_accuracy(selected: Selected) -> None:
    draw(accuracy.accuracy(selected, axis()))
    comparison(selected)
    draw(papers.pass_at_k(selected))


def comparison(selected: Selected) -> None:
    """The final table, every method against a baseline, and what must be known to believe them."""
    labels = [group.label for group in finished(selected.groups)]
    if not labels:
        st.info("No run has finished yet: the comparison comes with the first.")
        return
    baseline = st.selectbox("Baseline", labels, usual_baseline(labels), key="baseline", bind="query-params")
    draw(accuracy.final(selected, baseline))
    draw(accuracy.gains(selected, baseline))
    found = selected.compared(baseline)
    table("What did each method reach, and at what price?", headed(found.rows, REACHED), ["method"])
    st.caption(printed.caption(found))
    if len(found.gains):
        table(f"What does each method gain over {found.baseline}?", headed(found.gains, GAINED), ["method"])
        st.caption(printed.gains_caption(found))
    for note in printed.notes(found):
        (st.warning if note.startswith("WARNING") else st.caption)(note)


def usual_baseline(labels: list[str]) -> int:
    """The place of plain OPD, or else the first."""
    return next((place for place, label in enumerate(labels) if label.split()[0] == "opd"), 0)


def show_divergence(selected: Selected) -> None:
    x = axis()
    draw(divergence.kl(selected, x))
    draw(divergence.quantiles(selected, x))
    draw(divergence.probes(selected, x))
    found = selected.table("histograms")
    names = sorted(found["name"].unique()) if len(found) else ["kl/reverse_nats"]
    first = names.index("kl/reverse_nats") if "kl/reverse_nats" in names else 0
    name = st.selectbox("Histogram of", names, first, key="histogram", bind="query-params")
    draw(divergence.histogram(selected, name))
    draw(divergence.positions(selected))
    draw(divergence.entropy(selected, x))
    draw(divergence.overlap(selected, x))


def show_tokens(selected: Selected) -> None:
    draw(tokens.shares(selected))
    found = tokens.types(selected)
    if not len(found):
        return
    title = "Which token types stay hard?"
    found = found.assign(example=found["example"].map(tokens.near))
    wider = min(max(LETTER * max(map(len, found["method"])) - tokens.COLUMNS["method"].pixels, 0), GIVES)
    st.subheader(title, anchor=False)
    config = {name: _column(name, {"method": wider, "example": -wider}.get(name, 0)) for name in found}
    st.dataframe(found, hide_index=True, alt=title, column_config=config)
    st.caption(tokens.READ)


def _column(name: str, wider: int) -> Any:
    said, stays = tokens.COLUMNS[name], name in ("method", "token")
    heading, width = said.heading, said.pixels + wider
    if not said.form:
        return st.column_config.TextColumn(heading, help=said.says, width=width, pinned=stays)
    form = {"%": "percent", "d": "localized"}.get(said.form[-1], f"%{said.form}")
    return st.column_config.NumberColumn(heading, help=said.says, width=width, format=form)


def show_rollouts(selected: Selected) -> None:
    st.subheader(rollouts.QUESTION, anchor=False)
    left, right = st.columns(2)
    one = left.selectbox("Method", selected.labels, 0, key="one", bind="query-params")
    second = min(1, len(selected.labels) - 1)
    other = right.selectbox("Beside it", selected.labels, second, key="other", bind="query-params")
    found = rollouts.pairs(selected, one, other)
    if not found:
        st.info(rollouts.MISSING)
        return
    steps = sorted({int(a["step"]) for a, _ in found})
    step = st.select_slider("After step", steps, steps[-1]) if len(steps) > 1 else steps[0]
    shown = "".join(rollouts.beside(a, b) for a, b in found if a["step"] == step)
    st.html(f"<style>{rollouts.STYLE}</style>{coloured.legend()}{shown}")


def show_cost(selected: Selected) -> None:
    draw(cost.seconds(selected))
    draw(cost.tokens(selected))
    draw(accuracy.accuracy(selected, "flops"))


def show_loss(selected: Selected) -> None:
    x = axis()
    draw(loss := divergence.loss(selected, x))
    if style.words(loss)["empty"]:
        draw(divergence.probes(selected, x))  # the yardstick that the refusal names
    said = {group.label: conventions(group.folders[0]) for group in selected.groups}
    rows = [{"method": label} | {name: one.get(name, "-") for name in CONVENTIONS} for label, one in said.items()]
    table("What is each method's loss?", rows)
    draw(estimators.lens(selected))


def show_alarms(selected: Selected) -> None:
    draw(alarms.timeline(selected))
    found = alarms.rows(selected)
    if len(found):
        table("What was wrong?", found)


def show_search(selected: Selected) -> None:
    journals = sweep.studies(selected.folders[0].parent)
    names = ["the chosen runs", *(path.stem for path in journals)]
    chosen = st.selectbox("Study", names, key="study", bind="query-params")
    stored = [path for path in journals if path.stem == chosen]
    study = sweep.load(stored[0]) if stored else sweep.study_of(selected)
    if found := sweep.searchable(selected):
        parameter = st.selectbox("Hyperparameter", found, key="parameter", bind="query-params")
        draw(sweep.response(selected, parameter))
    if study is None:
        st.info(f"{sweep.NOTHING}.")
        return
    for figure in (figure(study) for figure in sweep.FIGURES.values()):
        draw(figure)


def show_papers(selected: Selected) -> None:
    found = papers.every(selected)
    if not found:
        st.info("These runs log nothing that a paper's figure needs; `opd-lab sweep compare` does.")
    for figure in found:
        draw(figure)


def show_runs(selected: Selected) -> None:
    rows = params(selected.folders).drop(columns=["folder", "conventions"], errors="ignore").fillna("").astype(str)
    first = [name for name in ("run", "status", "method", "seed") if name in rows]
    table("Which runs are these?", rows[[*first, *(name for name in rows if name not in first)]], ["run"])
    runs, methods = len(selected.folders), len(selected.groups)
    st.caption(f"{runs} runs of {methods} methods; settings in which all agree are left out.")


VIEWS: dict[str, Callable[[Selected], None]] = {
    "Accuracy": show_accuracy,
    "Divergence": show_divergence,
    "Tokens": show_tokens,
    "Rollouts": show_rollouts,
    "Cost": show_cost,
    "Loss": show_loss,
    "Alarms": show_alarms,
    "Search": show_search,
    "Papers": show_papers,
    "Runs": show_runs,
}


def nothing(folder: Path) -> None:
    st.info(f"No run is chosen, or none is in {folder}. `opd-lab sweep smoke tracking.folder={folder}` makes two.")
