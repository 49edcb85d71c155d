"""What the probe and the optimizer cost on an accelerator: probe, optimizer and share of a run, in one file.

    python examples/benchmarks/gpu.py [--output gpu.json] [--seconds 60] [--device cuda] [--small]

On whatever accelerator there is. `probe`: `measure_spectra` by each method in training steps (forward and backward in
float32), with the error of alpha beside `exact` and the peak memory in that of a training step, for the networks of
`probe.py` and for a GPT of 12 blocks and width 768 on 16 sequences of 256 tokens. `optimizer`: a step on the matrices
of `optimizer_step.py`, beside torch.optim.Muon, plain and compiled, and AdamW. `overhead`: the share of wall time that
`SpectralProbe()` takes in runs of so many seconds. Medians; the device is waited for before the clock is read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_spectral import SpectralNewton, measure_spectra
from lightning_spectral.demo.networks import CHARACTERS, CharacterGPT, DigitsResNet, PythonSource, digits

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.benchmarks import optimizer_step, overhead, probe
from examples.benchmarks.machine import environment


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).synchronize()


def seconds(function: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median wall time of calls after the first, which compiles and allocates."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def peak_bytes(function: Callable[[], Any], device: torch.device) -> float:
    """The most that was allocated at once; NaN on a device that does not tell."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return float(torch.cuda.max_memory_allocated(device))


def wide_gpt() -> probe.Task:
    """GPT of 12 blocks and width 768, 49 matrices, on 16 sequences of 256 characters."""
    text = PythonSource(256)
    windows = torch.stack([text[i] for i in range(16)])
    model = CharacterGPT(len(CHARACTERS), 256, width=768, heads=12, depth=12)
    return probe.Task(
        "gpt768", model.eval(), (windows[:, :-1].contiguous(), windows[:, 1:].contiguous()), ("sketch", "auto")
    )


def tasks(small: bool) -> list[probe.Task]:
    """Networks to probe."""
    methods = ("exact", "ggn", "sketch", "auto")
    if small:
        return [probe.gpt(4, 1, ("exact", "auto"))]
    return [probe.resnet(256), probe.gpt(128, 3, methods), wide_gpt()]


def probe_figures(task: probe.Task, repeats: int, device: torch.device) -> dict[str, Any]:
    """Cost of each method, and its error beside `exact` where that was run."""
    x, y = (tensor.to(device) for tensor in task.batch)
    task = replace(task, model=task.model.to(device), batch=(x, y))

    def step() -> None:
        task.model.zero_grad()
        probe.loss(task.model, task.batch).backward()

    step_seconds, step_bytes = seconds(step, 10, device), peak_bytes(step, device)
    row: dict[str, Any] = {"step_seconds": step_seconds, "methods": {}}
    reports = {}
    for method in task.methods:

        def measure(method: str = method) -> None:
            reports[method] = measure_spectra(task.model, task.batch, probe.loss, top_k=probe.K, curvature=method)

        took = seconds(measure, 1 if method == probe.REFERENCE else repeats, device)
        figures = {"steps": took / step_seconds, "seconds": took, "memory": peak_bytes(measure, device) / step_bytes}
        if probe.REFERENCE in reports and method != probe.REFERENCE:
            figures |= probe.errors(reports[method], reports[probe.REFERENCE])
        row["methods"][method] = {key: value for key, value in figures.items() if value == value}
        print(f"{task.name:8s} {method:8s} {row['methods'][method]}", flush=True)
    return row | {"layers": len(reports[task.methods[-1]].layers), "chosen": reports[task.methods[-1]].chosen}


def optimizer_figures(shapes: optimizer_step.Shapes, repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of a step."""
    makers: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
        "muon": lambda p: torch.optim.Muon(p),
        "muon_compiled": lambda p: torch.optim.Muon(p),
        "spectral_newton": lambda p: SpectralNewton(p, alpha=2.0, damping=0.03),
        "spectral_newton_alpha_1.5": lambda p: SpectralNewton(p, alpha=1.5, damping=0.01),
        "adamw": lambda p: torch.optim.AdamW(p),
    }
    row = {}
    for name, make in makers.items():
        parameters = []
        for made in optimizer_step.parameters(shapes):
            weight = nn.Parameter(made.detach().to(device))
            assert made.grad is not None
            weight.grad = made.grad.to(device)
            parameters.append(weight)
        optimizer = make(parameters)
        step = torch.compile(optimizer.step) if name.endswith("_compiled") else optimizer.step
        try:
            row[name] = 1e3 * seconds(step, repeats, device)
        except Exception as error:  # a machine without a compiler
            print(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0]}")
    print({name: f"{value:.2f} ms" for name, value in row.items()}, flush=True)
    return row


def overhead_figures(length: float, device: torch.device) -> dict[str, Any]:
    """Share of wall time that `SpectralProbe()` takes of a GPT's and a ResNet's run."""
    gpt = CharacterGPT(len(CHARACTERS), 64, width=64, heads=4, depth=2)
    accelerator = "gpu" if device.type in ("cuda", "mps") else device.type
    return {
        "gpt": overhead.figures("gpt", gpt, PythonSource(64), 32, length, accelerator),
        "resnet": overhead.figures("resnet", DigitsResNet(), digits(), 128, length, accelerator),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run all three and write the figures, what is done so far after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="gpu.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run of `overhead`")
    parser.add_argument("--device", help="default: the accelerator that PyTorch finds")
    parser.add_argument("--small", action="store_true", help="small networks and matrices, for a try on a CPU")
    options = parser.parse_args(arguments)
    device = torch.device(options.device) if options.device else torch.accelerator.current_accelerator()
    if device is None:
        raise SystemExit("there is no accelerator; --device cpu --small tries the benchmark on the CPU")
    warnings.simplefilter("ignore")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    result: dict[str, Any] = {"environment": environment(device=name, repeats=options.repeats)}

    def keep(part: str, figures: dict[str, Any]) -> None:
        result[part] = figures
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(json.dumps(result, indent=2), encoding="utf-8")

    torch.manual_seed(0)
    keep("probe", {task.name: probe_figures(task, options.repeats, device) for task in tasks(options.small)})
    matrices = {"64x64": [(64, 64)]} if options.small else optimizer_step.TASKS
    keep("optimizer", {task: optimizer_figures(shapes, options.repeats, device) for task, shapes in matrices.items()})
    keep("overhead", overhead_figures(options.seconds, device))


if __name__ == "__main__":
    main()
