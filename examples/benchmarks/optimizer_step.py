"""What a step of SpectralNewton costs, beside torch.optim.Muon, AdamW, and SOAP and Shampoo of pytorch_optimizer.

    python examples/benchmarks/optimizer_step.py [--output optimizer_step.json] [--repeats 15] [--no-bfloat16]

Matrices: five single shapes, those of a GPT of 6 blocks and width 384, and those of a ResNet-18 (kernels flattened).
Rounds are interleaved: in each, every optimizer takes a step on the same gradients, and its time is divided by Muon's
of that round; given are medians of times and of ratios. SOAP and Shampoo refresh their factors every 10 steps and are
timed over 10. With `--no-bfloat16` Muon multiplies as on a processor without instructions for bfloat16. Flops are those
of matrix products (torch.utils.flop_counter) and of factorisations (r^3 / 3 each, and 2 r^3 / 3 for the inverse from
one).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from lightning_spectral import SpectralNewton, spectral_transfer

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.benchmarks.machine import environment

REFRESH = 10
"""Steps between two refreshes of SOAP's and Shampoo's factors."""

REFERENCE = "muon"

TOLERANCE = 1e-2
"""The optimizer's default."""

Shapes = list[tuple[int, int]]


def gpt(depth: int = 6, width: int = 384) -> Shapes:
    """Attention and MLP matrices; embeddings and head go to AdamW with every optimizer."""
    d = width
    return [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)] * depth


def resnet18() -> Shapes:
    """The convolutions of torchvision's resnet18, as (out, in * kernel)."""
    shapes = [(64, 3 * 49)] + [(64, 64 * 9)] * 4
    for ins, outs in ((64, 128), (128, 256), (256, 512)):
        shapes += [(outs, ins * 9), (outs, outs * 9), (outs, ins)] + [(outs, outs * 9)] * 2
    return shapes


TASKS: dict[str, Shapes] = {
    "256x256": [(256, 256)],
    "512x2048": [(512, 2048)],
    "1024x1024": [(1024, 1024)],
    "768x3072": [(768, 3072)],
    "512x4608": [(512, 4608)],
    "gpt": gpt(),
    "resnet18": resnet18(),
}


def parameters(shapes: Shapes) -> list[nn.Parameter]:
    """Weights with gradients whose singular values fall roughly as 1 / k, over noise."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for m, n in shapes:
        r = min(m, n)
        weight = nn.Parameter(torch.randn(m, n, generator=generator) / n**0.5)
        strengths = torch.arange(1, r + 1) ** -1.0
        left, right = torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)
        weight.grad = 1e-3 * ((left * strengths) @ right + 0.05 * torch.randn(m, n, generator=generator))
        made.append(weight)
    return made


def probed(parameters: list[nn.Parameter]) -> SpectralNewton:
    """With exponents as a probe gives them, here spread evenly over 1 to 2."""
    optimizer = SpectralNewton(parameters, alpha="probe", damping=0.03)
    optimizer.set_alpha({p: 1 + i / max(1, len(parameters) - 1) for i, p in enumerate(parameters)})
    return optimizer


def optimizers() -> dict[str, tuple[Callable[[list[nn.Parameter]], Optimizer], int]]:
    """Name -> how to make it, and how many steps are one measurement."""
    made: dict[str, tuple[Callable[[list[nn.Parameter]], Optimizer], int]] = {
        REFERENCE: (lambda p: torch.optim.Muon(p), 1),
        "spectral_newton": (lambda p: SpectralNewton(p, alpha=2.0, damping=0.03), 1),
        "spectral_newton_fixed_size": (lambda p: SpectralNewton(p, alpha=2.0, damping=0.03, update_rms=0.2), 1),
        "spectral_newton_alpha_1.5": (lambda p: SpectralNewton(p, alpha=1.5, damping=0.01), 1),
        "spectral_newton_alpha_1": (lambda p: SpectralNewton(p, alpha=1.0, damping=0.03), 1),
        "spectral_newton_alpha_3": (lambda p: SpectralNewton(p, alpha=3.0, damping=0.03), 1),
        "spectral_newton_alpha_probe": (probed, 1),
        "adamw": (lambda p: torch.optim.AdamW(p), 1),
    }
    try:
        import pytorch_optimizer
    except ImportError:
        return made
    made["soap"] = (lambda p: pytorch_optimizer.SOAP(p, precondition_frequency=REFRESH), REFRESH)
    made["shampoo"] = (
        lambda p: pytorch_optimizer.ScalableShampoo(
            p, start_preconditioning_step=1, preconditioning_compute_steps=REFRESH
        ),
        REFRESH,
    )
    return made


def peer_version() -> str | None:
    """Of the package that SOAP and Shampoo are taken from, None where it is absent."""
    try:
        return version("pytorch_optimizer")
    except PackageNotFoundError:
        return None


def seconds(optimizer: Optimizer, steps: int) -> float:
    """Time of one step, over that many: of one thread its own, which other work on the machine adds little to."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    for _ in range(steps):
        optimizer.step()
    return (clock() - started) / steps


def flops(optimizer: Optimizer) -> int:
    """Of one step."""

    def cholesky(shape: torch.Size, *_: Any, **__: Any) -> int:
        return int(shape.numel() * shape[-1] / 3)

    def inverse(shape: torch.Size, *_: Any, **__: Any) -> int:
        return int(shape.numel() * shape[-1] * 2 / 3)

    aten = torch.ops.aten
    counted = {aten.linalg_cholesky_ex: cholesky, aten.cholesky_inverse: inverse}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        optimizer.step()
    return counter.get_total_flops()


def state_numbers(optimizer: Optimizer) -> int:
    """Return how many numbers of state a matrix has beside tensors of its own shape, at most."""
    return max(
        sum(value.numel() for value in state.values() if torch.is_tensor(value) and value.shape != parameter.shape)
        for parameter, state in optimizer.state.items()
    )


def run(shapes: Shapes, repeats: int, only: Sequence[str] | None = None) -> dict[str, Any]:
    """Every figure of one list of matrices, of the optimizers named or of all."""
    made = {
        name: (make(parameters(shapes)), steps)
        for name, (make, steps) in optimizers().items()
        if only is None or name in (REFERENCE, *only)
    }
    times: dict[str, list[float]] = {name: [] for name in made}
    for optimizer, _ in made.values():
        seconds(optimizer, 2)  # state, and the cached sums of inverses
    for i in range(repeats):
        for name, (optimizer, steps) in made.items():
            if steps == 1 or i < max(1, repeats // 5):
                if steps == 1:
                    optimizer.step()  # else the first of those that share code would pay for loading it
                times[name].append(seconds(optimizer, steps))
    counted = (REFERENCE, "spectral_newton", "spectral_newton_alpha_1.5", "spectral_newton_alpha_1")
    counts = {name: flops(made[name][0]) for name in counted if name in made}
    result = {}
    for name, found in times.items():
        ratios = [t / reference for t, reference in zip(found, times[REFERENCE], strict=False)]
        result[name] = {"milliseconds": 1e3 * statistics.median(found), "of_muon": statistics.median(ratios)}
        result[name]["state_numbers"] = state_numbers(made[name][0])
        if name in counts:
            result[name]["flops_of_muon"] = counts[name] / counts[REFERENCE]
    return result


def largest_error() -> dict[str, float]:
    """Relative error of the update against a float64 SVD over the single shapes, at the optimizer's tolerance."""
    errors: dict[str, float] = {}
    for name, shapes in TASKS.items():
        if len(shapes) > 1:
            continue
        grad = parameters(shapes)[0].grad
        assert grad is not None
        u, sigma, vh = torch.linalg.svd(grad.double(), full_matrices=False)
        sigma = sigma * len(sigma) ** 0.5 / sigma.norm()
        for alpha, d in ((2.0, 0.03), (1.5, 0.01), (1.0, 0.03), (3.0, 0.03)):
            exact = (u * (sigma / (sigma**alpha + d))) @ vh
            found = spectral_transfer(grad, alpha=alpha, damping=d, tolerance=TOLERANCE).double()
            key = f"alpha_{alpha:g}"
            errors[key] = max(errors.get(key, 0.0), float((found - exact).norm() / exact.norm()))
        print(f"errors {name:10s} {errors}", flush=True)
    if max(errors.values()) > TOLERANCE:
        raise SystemExit(f"an update is off by more than the {TOLERANCE} that the optimizer asks for: {errors}")
    return errors


def main() -> None:
    """Run all tasks and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="optimizer_step.json")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=optimizers(), help="of the optimizers, beside Muon (all)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-bfloat16", action="store_true", help="leave the processor's own out")
    options = parser.parse_args()
    if options.no_bfloat16:
        # oneDNN reads it at its first product.
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    told = environment(
        threads=options.threads,
        onednn_max_cpu_isa=os.environ.get("ONEDNN_MAX_CPU_ISA"),
        repeats=options.repeats,
        refresh_of_soap_and_shampoo=REFRESH,
        pytorch_optimizer=peer_version(),
    )
    if told["pytorch_optimizer"] is None:
        print("SOAP and Shampoo are left out: pip install --no-deps pytorch_optimizer")
    errors = largest_error()
    figures: dict[str, Any] = {}
    for name, shapes in TASKS.items():
        figures[name] = run(shapes, options.repeats, options.only)
        print(name, {key: f"{row['of_muon']:.2f}" for key, row in figures[name].items()}, flush=True)
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump({"environment": told, "largest_error": errors, "figures": figures}, file, indent=2)


if __name__ == "__main__":
    main()
