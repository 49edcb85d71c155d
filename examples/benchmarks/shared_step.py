"""What a step of SpectralNewton costs when processes share its matrices, beside every process computing all of them.

    python examples/benchmarks/shared_step.py [--output shared_step.json] [--repeats 15] [--only gpt ...]

Processes of one thread each on one machine, which talk by gloo. Rounds are interleaved; given are medians of the times
between two barriers and of their ratios. "share" is the part of r^2 n that the busiest process has: the ratio that
would be left if talking took no time. All matrices are shared here, those too that the optimizer leaves alone for
their size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_spectral import SpectralNewton
from lightning_spectral.optim import ddp as sharing
from lightning_spectral.optim.matrix_update import matrix_blocks

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.benchmarks.machine import environment
from examples.benchmarks.optimizer_step import Shapes, gpt, parameters, resnet18

TASKS: dict[str, Shapes] = {
    **{f"{r}x{r}": [(r, r)] * count for r, count in ((16, 64), (32, 64), (64, 64), (128, 32), (256, 16), (1024, 2))},
    "768x3072": [(768, 3072)] * 4,
    "gpt": gpt(),
    "resnet18": resnet18(),
}


def seconds(optimizer: SpectralNewton) -> float:
    """Of a step, until the last process has taken it."""
    dist.barrier()
    started = time.perf_counter()
    optimizer.step()
    dist.barrier()
    return time.perf_counter() - started


def share(optimizer: SpectralNewton, n: int) -> float:
    """Of the flops, what the busiest of n processes has."""
    (group,) = optimizer.param_groups
    pieces = [piece for i, p in enumerate(group["params"]) for piece in matrix_blocks(p.data, p.data, group, i)]
    loads = [sum(piece.cost for piece in of_rank) for of_rank in sharing.shares_by_cost(pieces, n)]
    return max(loads) / sum(loads)


def run(shapes: Shapes, repeats: int) -> dict[str, float]:
    """Every figure of one list of matrices."""
    shared, alone = (SpectralNewton(parameters(shapes), process_group=group) for group in ("world", None))
    for optimizer in (shared, alone):
        seconds(optimizer)
    times = [(seconds(shared), seconds(alone)) for _ in range(repeats)]
    return {
        "milliseconds_shared": 1e3 * statistics.median(t for t, _ in times),
        "milliseconds_alone": 1e3 * statistics.median(t for _, t in times),
        "of_alone": statistics.median(t / alone for t, alone in times),
        "share": share(shared, dist.get_world_size()),
    }


def work(rank: int, options: argparse.Namespace, folder: str) -> None:
    """All tasks; the first process writes the figures."""
    torch.set_num_threads(1)
    sharing.SMALLEST = 1
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=options.processes)
    told = environment(processes=options.processes, repeats=options.repeats)
    figures: dict[str, Any] = {}
    for name in options.only:
        figures[name] = run(TASKS[name], options.repeats)
        if rank == 0:
            print(name, {key: f"{value:.2f}" for key, value in figures[name].items()}, flush=True)
    if rank == 0:
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump({"environment": told, "figures": figures}, file, indent=2)
    dist.destroy_process_group()


def main() -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="shared_step.json")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS), help="of the lists of matrices")
    options = parser.parse_args()
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(options, folder), nprocs=options.processes)


if __name__ == "__main__":
    main()
