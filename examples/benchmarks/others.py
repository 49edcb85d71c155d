"""What a measurement costs, and how far it is from double backward, on networks and losses as other people write them.

    python examples/benchmarks/others.py [--output others.json] [--only simclr gpt2 ...] [--reference earlier.json]

Per network: layers, samples, the cost of `measure_spectra` by "auto" in training steps (forward, backward and AdamW,
timed before and after), what it chose, the methods of its layers, and the error of alpha beside "exact" on the whole
batch: of layers whose exact fit is trusted (r2 of 0.9), and of all. With `--reference` the exact alphas are those of
an earlier file, where it has them: networks and batches are the same on the same machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.benchmarks import other_networks, other_pairs, other_sequences
from examples.benchmarks.against_exact import measured, run_all
from examples.benchmarks.other_networks import Network

NETWORKS: dict[str, Callable[[], Network]] = {
    **other_networks.NETWORKS,
    **other_pairs.NETWORKS,
    **other_sequences.NETWORKS,
}


def run(name: str, exact: dict[str, Any] | None) -> dict[str, Any]:
    """Build, train and measure one."""
    return measured(*NETWORKS[name](), exact)


def main() -> None:
    """Run all."""
    run_all(__doc__, "others.json", {name: partial(run, name) for name in NETWORKS})


if __name__ == "__main__":
    main()
