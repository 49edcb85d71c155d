"""What a measurement costs, and how far it is from double backward, on networks and losses as other people write them.

    python examples/benchmarks/others.py [--output others.json] [--only simclr gpt2 ...] [--reference earlier.json]

Per network: layers, samples, the cost of `measure_spectra` by "auto" in training steps (forward, backward and AdamW,
timed before and after), what it chose, the methods of its layers, and the error of alpha beside "exact" on the whole
batch: of layers whose exact fit is trusted (r2 of 0.9), and of all. With `--reference` the exact alphas are those of
an earlier file, where it has them: networks and batches are the same on the same machine.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Before the path changes: PYTHONPATH says which package is measured, of this tree or another.
import lightning_spectral

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.benchmarks import other_networks, other_pairs, other_sequences
from examples.benchmarks.against_exact import HEADER, attempt, known, line, measured, written
from examples.benchmarks.machine import environment
from examples.benchmarks.other_networks import Network

NETWORKS: dict[str, Callable[[], Network]] = {
    **other_networks.NETWORKS,
    **other_pairs.NETWORKS,
    **other_sequences.NETWORKS,
}


def run(name: str, exact: dict[str, Any] | None) -> dict[str, Any]:
    """Build, train and measure one network."""
    torch.manual_seed(0)
    return measured(*NETWORKS[name](), exact)


def main() -> None:
    """Run all networks, print a line for each, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="others.json")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), choices=list(NETWORKS), metavar="NAME")
    parser.add_argument("--reference", help="an earlier file to take the exact alphas from")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    told, references = environment(threads=options.threads), known(options.reference)
    figures: dict[str, Any] = {}
    print(f"measuring {Path(lightning_spectral.__file__).parent}")
    print(HEADER)
    for name in options.only:
        figures[name] = attempt(lambda name=name: run(name, references.get(name)))
        print(line(name, figures[name]), flush=True)
        written(options.output, told, figures)
    met = sum(row.get("target", False) for row in figures.values())
    print(f"{met} of {len(figures)} in the targets")


if __name__ == "__main__":
    main()
