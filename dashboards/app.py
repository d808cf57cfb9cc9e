"""The live app, served by `opd-lab dashboard`: choose runs at the left, a question at the top; runs that go on are
followed. Streamlit runs this file from top to bottom whenever something was chosen."""

from __future__ import annotations

import sys
from pathlib import Path

import streamlit as st

from dashboards.choose import runs_in, sidebar
from dashboards.views import VIEWS, nothing
from opd_lab.tracking import read

REFRESH_SECONDS = 5  # between two looks at runs that go on


def main(folder: Path) -> None:
    st.set_page_config("opd_lab", layout="wide")
    with st.sidebar:
        st.title("opd_lab", anchor=False)
        selected = sidebar(folder)
        live = st.toggle("Follow runs that go on", True, key="live", bind="query-params")
    view = st.segmented_control(
        "Question", list(VIEWS), default="Accuracy", required=True, key="view", bind="query-params"
    )
    before = _states(folder)
    goes_on = "RUNNING" in before.values() or not before

    @st.fragment(run_every=REFRESH_SECONDS if live and goes_on else None)
    def show() -> None:
        if _states(folder) != before:
            st.rerun()
        if selected.groups:
            VIEWS[view or "Accuracy"](selected)
        else:
            nothing(folder)

    show()


def _states(folder: Path) -> dict[str, str]:
    return {str(run): read.status(run)["status"] for runs in runs_in(folder).values() for run in runs}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
