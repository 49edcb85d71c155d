"""What a measurement costs in real programs, each trained for some steps through its own Trainer on synthetic data.

    python examples/benchmarks/programs.py [--output programs.json] [--only scvi ...] [--reference earlier.json]

Figures as of `others.py`; the loss is the program's training_step. Programs that are not installed are left out, with
the reason. Each can be installed beside torch, and lightly without torchvision (--no-deps).
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

# Before the path changes: PYTHONPATH says which package is measured, of this tree or another.
import lightning_spectral

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.benchmarks import program_sciences, program_series, program_transformers
from examples.benchmarks.against_exact import HEADER, attempt, known, line, measured, written
from examples.benchmarks.machine import environment
from examples.benchmarks.program_training import training_loss

PROGRAMS = {**program_series.PROGRAMS, **program_sciences.PROGRAMS, **program_transformers.PROGRAMS}


def run(name: str, exact: dict[str, Any] | None) -> dict[str, Any]:
    """Train and measure one program."""
    torch.manual_seed(0)
    return measured(*PROGRAMS[name](), training_loss, exact)


def main() -> None:
    """Run all programs, print a line for each, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="programs.json")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(PROGRAMS), choices=list(PROGRAMS), metavar="NAME")
    parser.add_argument("--reference", help="an earlier file to take the exact alphas from")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
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
