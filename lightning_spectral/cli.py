"""The command `lightning-spectral`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import lightning_spectral


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser("lightning-spectral", description="Curvature exponents of a network in training.")
    parser.add_argument("--version", action="version", version=lightning_spectral.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train two small networks with a probe and show what it sees")
    demo.add_argument("--output", default="demo-runs", metavar="FOLDER", help="where the logs go (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        # Loading Lightning takes seconds, which --help should not.
        from lightning_spectral.demo.run import run

        run(options.output)
    except ImportError as error:
        print(f"lightning-spectral demo: {error}", file=sys.stderr)
        return 2
    return 0
