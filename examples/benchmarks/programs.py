"""What a measurement costs in real programs, each trained for some steps through its own Trainer on synthetic data.

    python examples/benchmarks/programs.py [--output programs.json] [--only scvi ...] [--reference earlier.json]

Figures as of `others.py`; the loss is the program's training_step. Programs that are not installed are left out, with
the reason. Each can be installed beside torch, and lightly without torchvision (--no-deps).
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.benchmarks import program_sciences, program_series, program_transformers
from examples.benchmarks.against_exact import measured, run_all
from examples.benchmarks.program_training import training_loss

PROGRAMS = {**program_series.PROGRAMS, **program_sciences.PROGRAMS, **program_transformers.PROGRAMS}


def run(name: str, exact: dict[str, Any] | None) -> dict[str, Any]:
    """Build, train and measure one."""
    return measured(*PROGRAMS[name](), training_loss, exact)


def main() -> None:
    """Run all."""
    logging.disable(logging.WARNING)
    run_all(__doc__, "programs.json", {name: partial(run, name) for name in PROGRAMS})


if __name__ == "__main__":
    main()
