"""`opd-lab dashboard`: the app on this machine's own address, asking the network for nothing."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import webbrowser
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

APP = Path(__file__).with_name("app.py")
DRAWS = "elements/PlotlyChart/PlotlyChart.tsx"  # in Streamlit's list of its own code, what draws figures
# The largest part of the browser's work for a first picture is to fetch, read and run Plotly. Streamlit begins with it
# when the first figure has arrived; here it is done while the browser would wait for the figure.
AHEAD = '<script type="module">requestIdleCallback(() => import("./{draws}"))</script>'


def serve(folder: Path, port: int, open_browser: bool) -> None:
    """Serve until it is interrupted.

    Raises:
        ValueError: there is no such folder, or Streamlit is not installed.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give the folder in which runs are kept, by default opd_runs")
    try:
        import streamlit.web  # noqa: F401  # pyright: ignore[reportUnusedImport]
        from streamlit import App
    except ImportError:
        raise ValueError("the dashboard needs Streamlit: pip install 'opd_lab[dashboards]'") from None
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    threading.Thread(target=_warm, args=(folder.resolve(),), daemon=True).start()
    shown = page()

    async def index(_: Any) -> HTMLResponse:
        return HTMLResponse(shown, headers={"Cache-Control": "no-cache"})

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncGenerator[None]:
        if open_browser:  # the port listens by now, and answers as soon as this is over
            asyncio.get_running_loop().run_in_executor(None, webbrowser.open, f"http://127.0.0.1:{port}")
        yield

    options = {
        "server.address": "127.0.0.1",
        "server.port": port,
        "server.headless": not open_browser,
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": False,
        "client.toolbarMode": "minimal",
    }
    sys.argv = [str(APP), str(folder.resolve())]  # what the app reads as its own
    App(APP, routes=[Route("/", index)], lifespan=lifespan).run(config=options)


def page() -> str:
    """Streamlit's page, with its code that draws fetched from the start and run when the browser is first idle."""
    from streamlit import file_util

    home = Path(file_util.get_static_dir())
    parts = json.loads((home / "manifest.json").read_text())
    draws = next(part for name, part in parts.items() if name.endswith(DRAWS))
    own = (home / "index.html").read_text()
    needed = [draws["file"], *(parts[name]["file"] for name in draws["imports"])]
    links = [f'<link rel="modulepreload" crossorigin href="./{file}">' for file in needed if file.endswith(".js")]
    head = "".join(link for link in links if link not in own)
    return own.replace("</head>", f"{head}{AHEAD.format(draws=draws['file'])}</head>")


def _warm(folder: Path) -> None:
    """Import and read what the first figure shows while the browser starts. What follows it on its page is left to the
    first reader: read here, it would only keep a processor from the browser."""
    from dashboards.choose import runs_in
    from dashboards.figures import accuracy
    from dashboards.runs import select

    if folders := [run for runs in runs_in(folder).values() for run in runs]:
        accuracy.accuracy(select(folders))
