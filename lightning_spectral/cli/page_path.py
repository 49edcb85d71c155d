"""Choose and check the file that the command `report` writes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning_spectral.report.runs.run import RunError


def check_target(path: Path) -> None:
    """Refuse a file that is to hold a page and has no such name, or no folder to be in.

    Raises:
        RunError: naming what is wrong.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise RunError(f"--output {path}: the name of a page ends in .html or .htm")
    if not path.parent.is_dir():
        raise RunError(f"--output {path}: there is no folder {path.parent}; make it first, or give another")


def default_target(paths: Sequence[Path]) -> Path:
    """Return the file of a run's page: in its folder, beside its file, or in the folder that several have in common."""
    first, *further = paths
    if not further:
        return first / "report.html" if first.is_dir() else first.with_suffix(".html")
    folders = [(path if path.is_dir() else path.parent).resolve() for path in paths]
    common, current = Path(os.path.commonpath(folders)), Path.cwd()
    return (common.relative_to(current) if common.is_relative_to(current) else common) / "report.html"
