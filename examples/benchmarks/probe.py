"""What a measurement costs in training steps, and how far each method is from double backward.

    python examples/benchmarks/probe.py [--output probe.json] [--repeats 3] [--only svd ...]

Networks: a ReLU ResNet (BatchNorm in eval mode), a GPT of 3 blocks and one of 12. In one run, for each: the time of a
training step, of `measure_spectra` by each method, and, where curvlinops is installed, of one product with its Hessian
operator of a layer, times layers and directions. Medians of the repeats, of which the slow methods get one; K = 20. A
training step is timed before and after each. `memory` is the peak of what is allocated, in that of a training step.
`alignment` is what the Kronecker factors of the layers add to `auto`.
`svd` is the leading triplets of large matrices against a full SVD, both in float32, with errors against float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from lightning_spectral import SpectralReport, measure_spectra, top_singular_triplets
from lightning_spectral.demo.networks import CHARACTERS, CharacterGPT, PythonSource, ResidualBlock

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.benchmarks.machine import environment

K = 20
FAST = ("ggn", "auto")
"""Methods that are timed more than once."""

REFERENCE = "exact"
"""One product per layer and direction."""


@dataclass(frozen=True)
class Task:
    """A network after a few steps of training, its batch, and the methods to measure it by."""

    name: str
    model: nn.Module
    batch: tuple[Tensor, Tensor]
    methods: tuple[str, ...]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy over the last dimension of the output."""
    output = model(batch[0])
    return F.cross_entropy(output.flatten(0, -2), batch[1].flatten())


def resnet(samples: int) -> Task:
    """14 convolutions, 2 of them in skips, and a head, on random images (3, 32, 32) of 10 classes."""
    width = 16
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        ResidualBlock(width, width),
        ResidualBlock(width, width),
        ResidualBlock(width, 2 * width, 2),
        ResidualBlock(2 * width, 2 * width),
        ResidualBlock(2 * width, 4 * width, 2),
        ResidualBlock(4 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )
    batch = torch.randn(samples, 3, 32, 32), torch.randint(0, 10, (samples,))
    return Task("resnet", trained(model, batch), batch, ("exact", "ggn", "sketch", "auto"))


def gpt(samples: int, depth: int, methods: tuple[str, ...]) -> Task:
    """A GPT on characters of Python's source; 4 matrices per block and a head."""
    text = PythonSource(64)
    windows = torch.stack([text[i] for i in range(samples)])
    model = CharacterGPT(len(CHARACTERS), 64, width=96, heads=4, depth=depth)
    batch = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    return Task(f"gpt{depth}", trained(model, batch), batch, methods)


def trained(model: nn.Module, batch: tuple[Tensor, Tensor], steps: int = 20) -> nn.Module:
    """The network after a few steps of AdamW on its batch, in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return model.eval()


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median wall time."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most that the CPU's allocator had handed out at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def curvlinops_seconds(task: Task, layers: list[str], repeats: int) -> float | None:
    """Time of curvlinops for all layers and directions, from one product with each layer's Hessian; None if absent."""
    try:
        from curvlinops import HessianLinearOperator
    except ImportError:
        return None
    flat = nn.Sequential(task.model, nn.Flatten(0, -2)) if task.batch[1].ndim > 1 else task.model
    data = [(task.batch[0], task.batch[1].flatten() if task.batch[1].ndim > 1 else task.batch[1])]
    total = 0.0
    for name in layers:
        parameter = dict(task.model.named_parameters())[name]
        operator = HessianLinearOperator(
            flat,
            nn.CrossEntropyLoss(),
            [parameter],
            data,
            check_deterministic=False,
            batch_size_fn=lambda x: x.shape[0],
        )
        vector = torch.randn(operator.shape[1])
        # Its forward-mode derivative knows no other attention kernel.
        with sdpa_kernel([SDPBackend.MATH]):
            total += seconds(lambda operator=operator, vector=vector: operator @ vector, repeats)
    return total * K


def errors(found: SpectralReport, exact: SpectralReport) -> dict[str, float]:
    """Of h relative to the layer's largest, and of alpha."""
    relative, alpha = [], []
    for name, layer in exact.layers.items():
        other = found.layers[name]
        relative.append(((other.h - layer.h).abs() / layer.h.abs())[layer.h.isfinite()])
        alpha.append(abs(other.alpha.exponent - layer.alpha.exponent))
    h, alphas = torch.cat(relative), torch.tensor(alpha)
    return {
        "h_median": float(h.median()),
        "h_p90": float(h.quantile(0.9)),
        "alpha_median": float(alphas.median()),
        "alpha_p90": float(alphas.quantile(0.9)),
    }


def run(task: Task, repeats: int) -> dict[str, Any]:
    """Every figure of one task."""

    def step() -> None:
        task.model.zero_grad()
        loss(task.model, task.batch).backward()

    step_bytes = peak_bytes(step)
    # In one piece, as the others take the gradient: its directions are then theirs to the last bit.
    whole = len(task.batch[0])
    reports: dict[str, SpectralReport] = {}
    result: dict[str, Any] = {"step_seconds": seconds(step, 10), "step_bytes": step_bytes, "methods": {}}
    for method in task.methods:

        def measure(method: str = method) -> None:
            reports[method] = measure_spectra(
                task.model,
                task.batch,
                loss,
                top_k=K,
                curvature=method,
                micro_batch_size=whole if method == REFERENCE else None,
            )

        before = seconds(step, 10)
        took = seconds(measure, repeats if method in FAST else 1)
        steps = 2 * took / (before + seconds(step, 10))
        report = reports[method]
        row = {
            "steps": steps,
            "seconds": took,
            "chosen": report.chosen,
            "check_error": report.check_error,
            "micro_batch_size": report.micro_batch_size,
        }
        if method != REFERENCE:
            row["memory"] = peak_bytes(measure) / step_bytes
        if REFERENCE in reports and method != REFERENCE:
            row |= errors(report, reports[REFERENCE])
        result["methods"][method] = {k: v for k, v in row.items() if v == v and v != ""}
        print(f"{task.name:8s} {method:8s} {steps:7.1f} steps  {result['methods'][method]}", flush=True)
    result["layers"] = len(report.layers)
    result["alignment"] = alignment_figures(task, repeats, step, step_bytes)
    before = seconds(step, 10)
    if "exact" in task.methods and (peer := curvlinops_seconds(task, list(report.layers), 1)) is not None:
        steps = 2 * peer / (before + seconds(step, 10))
        result["methods"]["curvlinops"] = {"steps": steps, "seconds": peer}
        print(f"{task.name:8s} curvlinops {steps:7.1f} steps", flush=True)
    return result


def alignment_figures(task: Task, repeats: int, step: Callable[[], None], step_bytes: int) -> dict[str, float]:
    """What `alignment=True` adds to `auto`, in training steps: a step, a probe without and one with it, in turn."""

    def measure(alignment: bool) -> None:
        measure_spectra(task.model, task.batch, loss, top_k=K, alignment=alignment)

    extra = []
    for _ in range(max(5, repeats)):
        before, without = seconds(step, 3), seconds(lambda: measure(False), 1)
        extra.append(2 * (seconds(lambda: measure(True), 1) - without) / (before + seconds(step, 3)))
    row = {"extra_steps": statistics.median(extra), "memory": peak_bytes(lambda: measure(True)) / step_bytes}
    print(f"{task.name:8s} alignment {row['extra_steps']:+6.1f} steps  {row}", flush=True)
    return row


def spectra(m: int, n: int) -> dict[str, Tensor]:
    """Matrices with sigma_k = 1 / k, as gradients have, and with the flat spectrum of noise."""
    u, v = torch.linalg.qr(torch.randn(m, n))[0], torch.linalg.qr(torch.randn(n, n))[0]
    return {"power law": u / torch.arange(1, n + 1) @ v.T, "flat": torch.randn(m, n)}


def svd_figures(repeats: int) -> dict[str, Any]:
    """Time and errors of the K leading triplets by `top_singular_triplets` and by a full SVD, run in turn."""
    result: dict[str, Any] = {}
    for name, matrix in spectra(4096, 1024).items():
        taken: dict[str, tuple[Tensor, Tensor]] = {}

        def full(matrix: Tensor = matrix, taken: dict[str, tuple[Tensor, Tensor]] = taken) -> None:
            _, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
            taken["full"] = sigma[:K], vh[:K].T

        def fast(matrix: Tensor = matrix, taken: dict[str, tuple[Tensor, Tensor]] = taken) -> None:
            triplets = top_singular_triplets(matrix, K)
            taken["fast"] = triplets.sigma, triplets.v

        times = [(seconds(full, 1), seconds(fast, 1)) for _ in range(max(5, repeats))]
        full_seconds, fast_seconds = (statistics.median(column) for column in zip(*times, strict=True))
        _, sigma, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        row: dict[str, Any] = {"full_seconds": full_seconds, "fast_seconds": fast_seconds}
        row["speedup"] = full_seconds / fast_seconds
        for method, (sigma_k, v) in taken.items():
            outside = v.double() - vh[:K].T @ (vh[:K] @ v.double())
            row[f"{method}_sigma_{K}_error"] = float((sigma_k[-1].double() / sigma[K - 1] - 1).abs())
            row[f"{method}_subspace_sine"] = float(torch.linalg.matrix_norm(outside, 2))
        result[name] = row
        print(f"svd      {name:9s} {row}", flush=True)
    return result


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "resnet": lambda repeats: run(resnet(256), repeats),
    "gpt3": lambda repeats: run(gpt(128, 3, ("exact", "ggn", "sketch", "auto")), repeats),
    "gpt12": lambda repeats: run(gpt(128, 12, ("auto",)), repeats),
    "svd": svd_figures,
}


def main() -> None:
    """Run all tasks and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="probe.json")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS), help="which parts to run")
    options = parser.parse_args()
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    told = environment(threads=options.threads, repeats=options.repeats)
    figures = {}
    for name in options.only:
        torch.manual_seed(0)
        figures[name] = PARTS[name](options.repeats)
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump({"environment": told, "figures": figures}, file, indent=2)


if __name__ == "__main__":
    main()
