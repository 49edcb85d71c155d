"""One self-contained HTML page of a run, or of several runs laid over each other."""

from __future__ import annotations

import base64
import gzip
import html
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning_spectral._messages import join_names
from lightning_spectral._version import __version__
from lightning_spectral.analysis import DOUBTFUL, TRUSTED
from lightning_spectral.report.page.data import page_data, runs_data, script_json
from lightning_spectral.report.palette import MOST_RUNS
from lightning_spectral.report.runs.run import Run, RunError

PAGE_BYTES = 6_000_000
"""Largest size of a page that can be sent by mail. plotly.js takes 2 MB of it, compressed."""

SCRIPTS = {"page": ("frame", "plots", "page"), "runs": ("frame", "runs")}
"""Scripts of a run's page and of that of several runs, in the order in which they are read."""

GENERATOR = b'<meta name="generator" content="lightning-spectral '
"""Mark of a page that `write_page` wrote."""


def plotly_js() -> str:
    """Return the source of plotly.js, from the Python package plotly."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError('the page\'s plots need plotly: pip install "lightning-spectral[report]"') from error
    source: str = get_plotlyjs()
    return source


def write_page(run: Run | Sequence[Run], path: str | Path, *, title: str | None = None) -> Path:
    """Write the page of a run, or of several laid over each other, to a file, whose folder is made if it is not there.

    Args:
        run: what to show: `read_run` of files, or `run_of` a probe's history; several as a list.
        path: the file.
        title: of the page; the run's name, or the names of all, where none is given.

    Raises:
        ImportError: if plotly is not installed.
        RunError: if a run is empty, or the file cannot be written.
    """
    path = Path(path)
    runs = list(run) if isinstance(run, Sequence) else [run]
    if not all(isinstance(each, Run) for each in runs):
        raise TypeError("run must be a run or several, as of read_run(path), or run_of(reports, name)")
    text = page(runs[0], title=title) if len(runs) == 1 else runs_page(runs, title=title)
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
    parts = {"trusted": TRUSTED, "doubtful": DOUBTFUL}
    return _fill("page", title or run.name, run.sources, data, data["probes"][-1]["summary"], parts)


def runs_page(runs: Sequence[Run], *, title: str | None = None) -> str:
    """Return the HTML of the page of several runs, which needs no network either."""
    if not 1 <= len(runs) <= MOST_RUNS:
        raise RunError(f"need 1 to {MOST_RUNS} runs for one page, got {len(runs)}")
    if empty := [run.name for run in runs if not run.steps]:
        raise RunError(f"{empty[0]}: no probe to show")
    data = runs_data(runs)
    sources = [f"{run.name}: {source}" for run in runs for source in run.sources]
    return _fill(
        "runs", title or join_names([run.name for run in runs]), sources, data, data["summary"], {"trusted": TRUSTED}
    )


def _fill(
    name: str, title: str, sources: Sequence[str], data: Any, summary: Sequence[str], texts: Mapping[str, str]
) -> str:
    parts = {
        "title": html.escape(title),
        "version": __version__,
        "summary": "".join(f"<li>{html.escape(sentence)}</li>" for sentence in summary),
        "sources": html.escape("; ".join(sources)),
        "style": _asset("page.css"),
        "plotly": _compressed(plotly_js()),
        "data": script_json(data),
        "scripts": "\n".join(_asset(f"{script}.js") for script in SCRIPTS[name]),
        **{key: html.escape(text) for key, text in texts.items()},
    }
    template = _asset("frame.html").replace("<!--=main-->", _asset(f"{name}.html"))
    # In one pass: what is put in may look like a place to put something.
    return re.sub(r"<!--=(\w+)-->|/\*=(\w+)\*/", lambda match: parts[match.group(1) or match.group(2)], template)


@lru_cache(maxsize=1)
def _compressed(script: str) -> str:
    """Return a script as text that the page unpacks; kept, since it is the same in every page and most of its time."""
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()


def _asset(name: str) -> str:
    return (files("lightning_spectral.report.page") / "assets" / name).read_text(encoding="utf-8")
