"""Memory and time of a measurement where two processes hold the weights in shards (FSDP2), and where each holds all.

    python examples/benchmarks/shards.py [--output shards_cpu.json] [--layers 48] [--width 2048]

A network of equal linear layers with ReLU on 32 samples in each process, by gloo on a CPU, one thread each. Memory is
the most that resident memory rises by, for which every larger tensor is given pages of its own and returns them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_spectral import measure_spectra
from lightning_spectral.plan import plan_spectra

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.benchmarks.machine import environment

PROCESSES, SAMPLES, CLASSES, K = 2, 32, 10, 10
METHODS = ("ggn", "sketch")
OWN_PAGES = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
"""For glibc, before a process starts."""


class Rise:
    """The most that this process's resident memory rises by, seen every few milliseconds."""

    def __enter__(self) -> Rise:
        self.before = self.peak_bytes = resident()
        self.on = True
        self.watch = threading.Thread(target=self._look, daemon=True)
        self.watch.start()
        return self

    def _look(self) -> None:
        while self.on:
            self.peak_bytes = max(self.peak_bytes, resident())
            time.sleep(0.003)

    def __exit__(self, *_: object) -> None:
        self.on = False
        self.watch.join()
        self.bytes = self.peak_bytes - self.before


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGESIZE")


def network(width: int, layers: int) -> nn.Sequential:
    """With weights whose signal neither grows nor vanishes over the layers."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers)]
    for block in blocks:
        nn.init.kaiming_normal_(block[0].weight)  # type: ignore[arg-type]
    return nn.Sequential(*blocks, nn.Linear(width, CLASSES))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def work(rank: int, folder: str, width: int, layers: int, method: str, sharded: bool) -> None:
    """One process's part."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    model: nn.Module = network(width, layers)
    if sharded:
        mesh = init_device_mesh("cpu", (PROCESSES,))
        for block in model.children():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    torch.manual_seed(rank)
    batch = torch.randn(SAMPLES, width), torch.randint(0, CLASSES, (SAMPLES,))
    with Rise() as rise:
        report = measure_spectra(
            model,
            batch,
            loss,
            top_k=K,
            curvature=method,
            process_group=dist.group.WORLD,  # type: ignore[arg-type]
        )
    alphas = [layer.alpha.exponent for layer in report.layers.values()]
    found = {"bytes": rise.bytes, "seconds": report.seconds, "alphas": alphas}
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def run(width: int, layers: int, method: str, sharded: bool) -> dict[str, Any]:
    """The larger rise of the processes, and the time."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(folder, width, layers, method, sharded), nprocs=PROCESSES)  # type: ignore[no-untyped-call]
        found = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(PROCESSES)]
    with torch.device("meta"):
        model = network(width, layers)
        joined = torch.empty(PROCESSES * SAMPLES, width), torch.empty(PROCESSES * SAMPLES, dtype=torch.long)
    plan = plan_spectra(
        model, joined, loss, top_k=K, curvature=method, world_size=PROCESSES, sharded=sharded
    )  # fmt: skip
    return {
        "bytes": max(one["bytes"] for one in found),
        "planned_bytes": plan.costs[method].memory.peak,
        "seconds": found[0]["seconds"],
        "alphas": found[0]["alphas"],
    }


def main() -> None:
    """Run both ways for each method, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="shards_cpu.json")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, default=2048)
    options = parser.parse_args()
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    os.environ.update(OWN_PAGES)
    figures: dict[str, Any] = {}
    for method in METHODS:
        rows = {
            name: run(options.width, options.layers, method, sharded)
            for name, sharded in (("whole", False), ("shards", True))
        }
        whole, shards = rows.values()
        apart = [abs(a - b) for a, b in zip(whole.pop("alphas"), shards.pop("alphas"), strict=True)]
        ratios = {f"{what}_ratio": shards[what] / whole[what] for what in ("bytes", "seconds")}
        figures[method] = rows | ratios | {"largest_difference_of_alpha": max(apart)}
        print(method, figures[method], flush=True)
        told = {
            "environment": environment(processes=PROCESSES, threads=1),
            "layers": options.layers,
            "width": options.width,
            "weights_bytes": 4 * sum(p.numel() for p in network(options.width, options.layers).parameters()),
            "figures": figures,
        }
        Path(options.output).write_text(json.dumps(told, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
