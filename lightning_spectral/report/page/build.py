"""One self-contained HTML page of a run: summary in words, table of layers, interactive plots."""

from __future__ import annotations

import base64
import gzip
import html
import re
from importlib.resources import files
from pathlib import Path

from lightning_spectral._version import __version__
from lightning_spectral.analysis import DOUBTFUL, TRUSTED
from lightning_spectral.report.page.data import page_data, script_json
from lightning_spectral.report.runs.run import Run, RunError

PAGE_BYTES = 6_000_000
"""Largest size of a page that can be sent by mail. plotly.js takes 2 MB of it, compressed."""

SCRIPTS = ("plot_base", "overview_plots", "layer_plots", "page")
"""Scripts of the page, in the order in which they are read."""

GENERATOR = b'<meta name="generator" content="lightning-spectral '
"""Mark of a page that `write_page` wrote."""


def plotly_js() -> str:
    """Return the source of plotly.js, from the Python package plotly.

    Raises:
        ImportError: if plotly is not installed; the message says how to install it.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError('the page\'s plots need plotly: pip install "lightning-spectral[report]"') from error
    source: str = get_plotlyjs()
    return source


def write_page(run: Run, path: str | Path, *, title: str | None = None) -> Path:
    """Write a run's page to a file, whose folder is made if it is not there.

    Args:
        run: what to show: `read_run` of files, or `run_of` a probe's history.
        path: the file.
        title: of the page; the run's name where none is given.

    Raises:
        ImportError: if plotly is not installed.
        RunError: if the run is empty, or the file cannot be written.
    """
    path = Path(path)
    text = page(run, title=title)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Names of files may hold bytes that are no UTF-8.
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def is_page(path: Path) -> bool:
    """Return True if a file can be read and is a page that `write_page` wrote."""
    try:
        with path.open("rb") as file:
            return GENERATOR in file.read(4096)
    except OSError:
        return False


def page(run: Run, *, title: str | None = None) -> str:
    """Return the page's HTML, which needs no network: its style, its scripts and its data are within it."""
    if not run.steps:
        raise RunError(f"{run.name}: no probe to show")
    data = page_data(run)
    compressed = gzip.compress(plotly_js().encode(), mtime=0)
    parts = {
        "title": html.escape(title or run.name),
        "version": __version__,
        "summary": "".join(f"<li>{html.escape(sentence)}</li>" for sentence in data["probes"][-1]["summary"]),
        "sources": html.escape("; ".join(run.sources)),
        "trusted": html.escape(TRUSTED),
        "doubtful": html.escape(DOUBTFUL),
        "style": _asset("page.css"),
        "plotly": base64.b64encode(compressed).decode(),
        "data": script_json(data),
        "scripts": "\n".join(_asset(f"{name}.js") for name in SCRIPTS),
    }
    # In one pass: what is put in may look like a place to put something.
    return re.sub(
        r"<!--=(\w+)-->|/\*=(\w+)\*/", lambda match: parts[match.group(1) or match.group(2)], _asset("page.html")
    )


def _asset(name: str) -> str:
    return (files("lightning_spectral.report.page") / "assets" / name).read_text(encoding="utf-8")
