"""`lightning-spectral report`, the page of runs, and `workspace`, a saved view of a W&B project's workspace."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from lightning_spectral.cli.arguments import print_note
from lightning_spectral.errors import first_line
from lightning_spectral.report.page.build import is_page, write_page
from lightning_spectral.report.runs.run import RunError
from lightning_spectral.report.runs.several import differences, named_path, read_runs
from lightning_spectral.report.trackers.wandb_tracker import wandb_workspace


def run(arguments: argparse.Namespace) -> None:
    """Write the page of a run, or of several, and print what it was made of."""
    inputs = [path for _, path in map(named_path, arguments.run)]
    target = default_target(inputs) if arguments.output is None else Path(arguments.output)
    is_there = target.is_file()
    if arguments.output is not None:
        check_target(target)
    if is_there and not arguments.force and not is_page(target):
        raise RunError(f"{target} is there and no page of this command; give another --output, or --force")
    runs = read_runs(arguments.run, prefix=arguments.prefix)
    print(write_page(runs, target, title=arguments.title))
    for shown in runs:
        of = f"{shown.name}: " if len(runs) > 1 else ""
        # What lay in a folder is for the reader to know: others may have put more there.
        if any(path.is_dir() for path in inputs):
            for source in shown.sources:
                print_note("report", f"{of}read {source}")
        for omission in shown.omissions:
            print_note("report", f"{of}left out: {omission}")
    if len(runs) > 1:
        for difference in differences(runs):
            print_note("report", f"the runs were measured in different ways, {difference}")
    if is_there:
        print_note("report", f"{target} was there and is replaced")


def check_target(path: Path) -> None:
    """Refuse a file that is to hold a page and has no such name, or no folder to be in."""
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


def save_workspace(arguments: argparse.Namespace) -> None:
    """Make the view in W&B, which prints its address."""
    entity, project = project_of(arguments.project)
    view = wandb_workspace(entity, project, name=arguments.name, prefix=arguments.prefix)
    try:
        view.save()
    except Exception as error:
        # Without a login or a network it is of many classes.
        raise ValueError(f"W&B took no view: {first_line(error)}") from error


def project_of(path: str) -> tuple[str, str]:
    """Return entity and project of a path, or of a project's address in the browser.

    >>> project_of("team/nets"), project_of("https://wandb.ai/team/nets/workspace")
    (('team', 'nets'), ('team', 'nets'))
    """
    match = re.fullmatch(r"([^/\s]+)/([^/\s]+)", re.sub(r"^https?://[^/]+/([^/]+/[^/?]+).*", r"\1", path))
    if match is None:
        raise ValueError(f"{path!r} is no ENTITY/PROJECT; give what stands in https://wandb.ai/ENTITY/PROJECT")
    return match[1], match[2]
