"""The command `lightning-spectral`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning_spectral

LIGHTNING_COMMANDS = {
    "fit": "train a LightningModule from a configuration (a LightningCLI with this package's parts)",
    "validate": "validate one",
    "test": "test one",
    "predict": "predict with one",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser("lightning-spectral", description="Curvature exponents of a network in training.")
    parser.add_argument("--version", action="version", version=lightning_spectral.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train two small networks with a probe and show what it sees")
    demo.add_argument("--output", default="demo-runs", metavar="FOLDER", help="where the logs go (%(default)s)")
    _add_report(commands)
    for name, help_text in LIGHTNING_COMMANDS.items():
        commands.add_parser(name, help=help_text)
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and given[0] in LIGHTNING_COMMANDS:
        return _lightning(given, from_command_line=arguments is None)
    options = parser.parse_args(given)
    return _report(options) if options.command == "report" else _demo(options.output)


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="write one HTML page of a run: summary, table, interactive plots",
        description="Write one self-contained HTML page of a run, which needs no network.",
        epilog="A log holds scalars only; checkpoints and JSON reports hold the spectra too, and may stand beside it.",
    )
    report.add_argument(
        "run",
        nargs="+",
        metavar="RUN",
        help="a CSVLogger's folder or metrics.csv; an offline W&B run's folder or .wandb file; a checkpoint of a "
        "Trainer with a SpectralProbe; JSON files of SpectralReport.to_json, or a folder of them",
    )
    report.add_argument("--output", metavar="FILE", help="where the page goes (report.html in RUN, or RUN's name.html)")
    report.add_argument("--title", help="of the page (RUN's name)")
    report.add_argument("--prefix", help="of the probe's keys, where a run holds several probes'")


def _report(options: argparse.Namespace) -> int:
    from lightning_spectral.report.page import write_page
    from lightning_spectral.report.read import RunError, read_run

    first = Path(options.run[0])
    beside = first / "report.html" if first.is_dir() else first.with_suffix(".html")
    try:
        run = read_run(options.run, prefix=options.prefix)
        print(write_page(run, options.output or beside, title=options.title))
    except (RunError, ImportError) as error:
        print(f"lightning-spectral report: {error}", file=sys.stderr)
        return 2
    return 0


def _demo(folder: str) -> int:
    try:
        # Loading Lightning takes seconds, which --help should not.
        from lightning_spectral.demo.run import run

        run(folder)
    except ImportError as error:
        print(f"lightning-spectral demo: {error}", file=sys.stderr)
        return 2
    return 0


def _lightning(arguments: Sequence[str], *, from_command_line: bool) -> int:
    # As with `python train.py fit`, models and data beside which the command is run can be imported.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    from lightning_spectral.callbacks._lightning import jsonargparse_missing

    if missing := jsonargparse_missing():
        print(f"lightning-spectral {arguments[0]}: {missing}", file=sys.stderr)
        return 2
    from lightning_spectral.lightning_cli import run

    run(arguments, from_command_line=from_command_line)
    return 0
