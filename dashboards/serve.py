"""`opd-lab dashboard`: the app on this machine's own address, asking the network for nothing."""

from __future__ import annotations

import threading
from pathlib import Path

APP = Path(__file__).with_name("app.py")


def serve(folder: Path, port: int, open_browser: bool) -> None:
    """Serve until it is interrupted.

    Raises:
        ValueError: there is no such folder, or Streamlit is not installed.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give the folder in which runs are kept, by default opd_runs")
    try:
        from streamlit.web import bootstrap
    except ImportError:
        raise ValueError("the dashboard needs Streamlit: pip install 'opd_lab[dashboards]'") from None
    threading.Thread(target=_warm, args=(folder.resolve(),), daemon=True).start()

    options = {
        "server.address": "127.0.0.1",
        "server.port": port,
        "server.headless": not open_browser,
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": False,
        "client.toolbarMode": "minimal",
    }
    bootstrap.load_config_options(options)
    bootstrap.run(str(APP), False, [str(folder.resolve())], options)


def _warm(folder: Path) -> None:
    """Import, and read what the first page shows, before the first reader waits for it."""
    from dashboards.choose import runs_in
    from dashboards.runs import select
    from dashboards.views import accuracy, usual_baseline
    from opd_lab.compare.groups import groups

    if folders := [run for runs in runs_in(folder).values() for run in runs]:
        selected, labels = select(folders), [group.label for group in groups(folders)]
        accuracy.accuracy(selected)
        if labels:
            selected.compared(labels[usual_baseline(labels)])
