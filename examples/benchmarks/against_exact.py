"""What a measurement by "auto" costs in training steps, and how far its alphas are from those of double backward.

With one thread times are of the processor, so that other work on the machine does not count; else they are of the wall.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_spectral
from examples.benchmarks.machine import environment
from lightning_spectral import SpectralReport, measure_spectra

K = 20
TRUSTED_R2 = 0.9
"""Of the exact fit; the errors of such layers are told apart."""

TARGET_STEPS, TARGET_ERROR, TARGET_ERROR_OF_FEW, FEW = 25, 0.03, 0.05, 32
"""The larger error is that of fewer samples than FEW."""

LONG_SECONDS = 5
"""A measurement that takes longer is timed once."""

Loss = Callable[[nn.Module, Any], Tensor]


def seconds(function: Callable[[], Any]) -> float:
    """Time one call."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    function()
    return clock() - started


def step_seconds(model: nn.Module, batch: Any, loss: Loss) -> float:
    """Take the median of training steps, forward, backward and AdamW: for half a second, 5 at least, 50 at most.

    At a learning rate of 0, with buffers and modes put back: the network is as it was.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def step() -> None:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()

    model.train()
    step()
    times = [seconds(step)]
    times = [seconds(step) for _ in range(max(5, min(50, int(0.5 / times[0]))))]
    optimizer.zero_grad()
    for module, training in modes.items():
        module.training = training
    for buffer, value in buffers:
        buffer.copy_(value)
    return statistics.median(times)


def fits(report: SpectralReport) -> dict[str, dict[str, Any]]:
    """Return what the comparison needs of each layer."""
    return {
        name: {
            "shape": list(layer.shape),
            "kind": layer.kind,
            "method": layer.method,
            "alpha": layer.alpha.exponent,
            "stderr": layer.alpha.stderr,
            "r2": layer.alpha.r2,
            "note": layer.note,
        }
        for name, layer in report.layers.items()
    }


def summary(errors: list[float]) -> dict[str, float]:
    """Return the number, the median and the 90 % quantile; NaN of none."""
    values = torch.tensor(errors or [math.nan], dtype=torch.float64)
    return {"layers": len(errors), "median": float(values.median()), "p90": float(values.quantile(0.9))}


def comparison(found: dict[str, dict[str, Any]], exact: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Compare the alphas of layers: of all, of those with a trusted exact fit, and those that only one has."""

    def has(layers: dict[str, dict[str, Any]], name: str) -> bool:
        return name in layers and math.isfinite(layers[name]["alpha"])

    both = [name for name in exact if has(exact, name) and has(found, name)]
    error = {name: abs(found[name]["alpha"] - exact[name]["alpha"]) for name in both}
    only = {"exact": [n for n in exact if has(exact, n) and not has(found, n)]}
    only["auto"] = [n for n in found if has(found, n) and not has(exact, n)]
    trusted = [name for name in exact if has(exact, name) and exact[name]["r2"] >= TRUSTED_R2]
    return {
        "all": summary(list(error.values())),
        "trusted": summary([error[name] for name in trusted if name in error]),
        "only_exact": only["exact"],
        "only_exact_trusted": [name for name in only["exact"] if name in trusted],
        "only_auto": only["auto"],
    }


def measured(model: nn.Module, batch: Any, loss: Loss, exact: dict[str, Any] | None = None) -> dict[str, Any]:
    """Measure by "auto" and "exact" with steps timed before and after each; `exact` holds known alphas instead."""
    before = step_seconds(model, batch, loss)
    reports: list[SpectralReport] = []

    # A loss that draws numbers is to draw the same each time.
    def auto() -> None:
        torch.manual_seed(0)
        reports.append(measure_spectra(model, batch, loss, top_k=K))

    took = [seconds(auto)]
    if took[0] < LONG_SECONDS:
        # The first call also pays for what is done once.
        took = [seconds(auto) for _ in range(3)]
    report, after = reports[-1], step_seconds(model, batch, loss)
    step_time = (before + after) / 2
    row = {
        "n_samples": report.n_samples,
        "step_seconds": step_time,
        "step_seconds_before_after": [before, after],
        "seconds": statistics.median(took),
        "steps": statistics.median(took) / step_time,
        "chosen": report.chosen,
        "check_error": report.check_error,
        "micro_batch_size": report.micro_batch_size,
        "methods": dict(Counter(layer.method for layer in report.layers.values())),
        "layers": fits(report),
        "skipped": report.skipped,
        "failed": report.failed,
        "warnings": list(report.warnings),
    }
    if exact is None:
        # In one piece, as the others take the gradient: its directions are then theirs to the last bit.
        whole = report.n_samples

        def by_exact() -> None:
            torch.manual_seed(0)
            reports.append(measure_spectra(model, batch, loss, top_k=K, curvature="exact", micro_batch_size=whole))

        row["exact_steps"] = seconds(by_exact) / step_time
        exact = fits(reports[-1])
    row |= {"exact_layers": exact, "error": comparison(row["layers"], exact)}
    return row | {"target": within_target(row)}


def within_target(row: dict[str, Any]) -> bool:
    """Tell whether cost and median error, of trusted layers if there are any, are in the targets, and none is lost."""
    few = row["n_samples"] is not None and row["n_samples"] < FEW
    error = row["error"]
    counted = error["trusted"] if error["trusted"]["layers"] else error["all"]
    close = not counted["layers"] or counted["median"] <= (TARGET_ERROR_OF_FEW if few else TARGET_ERROR)
    return bool(row["steps"] <= TARGET_STEPS and close and not error["only_exact_trusted"])


def attempt(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the figures, or the error that was raised instead."""
    started = time.perf_counter()
    try:
        row = function()
    except Exception as error:
        row = {"failure": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return row | {"total_seconds": time.perf_counter() - started}


HEADER = (
    f"{'network':24s} {'layers':>6s} {'no a':>4s} {'N':>5s} {'ms/step':>8s} {'steps':>6s} {'exact':>6s}  "
    f"{'methods':22s} {'trusted: n  median    p90':>26s}  {'all: n  median    p90':>22s} {'lost':>4s}  ok  chosen"
)


def line(name: str, row: dict[str, Any]) -> str:
    """Return a line of the table: `no a` layers without an alpha, `lost` those with an exact alpha alone."""
    if "failure" in row:
        return f"{name:24s} {row['failure'].splitlines()[0]}"
    trusted, every = row["error"]["trusted"], row["error"]["all"]
    methods = ", ".join(f"{count} {method}" for method, count in row["methods"].items())
    exact_steps = f"{row['exact_steps']:6.0f}" if "exact_steps" in row else f"{'-':>6s}"
    return (
        f"{name:24s} {len(row['layers']):6d} {len(row['failed']):4d} {row['n_samples'] or 0:5d} "
        f"{1e3 * row['step_seconds']:8.1f} {row['steps']:6.1f} {exact_steps}  {methods:22s} "
        f"{trusted['layers']:12d} {trusted['median']:6.4f} {trusted['p90']:6.4f}  "
        f"{every['layers']:8d} {every['median']:6.4f} {every['p90']:6.4f} {len(row['error']['only_exact']):4d}  "
        f"{'yes' if row['target'] else ' no'} {row['chosen']}"
    )


def known(path: str | None) -> dict[str, Any]:
    """Return the exact fits of each network in an earlier file."""
    if path is None:
        return {}
    rows = json.loads(Path(path).read_text(encoding="utf-8"))["figures"]
    return {name: nan_for_none(row["exact_layers"]) for name, row in rows.items() if "exact_layers" in row}


def nan_for_none(layers: dict[str, Any]) -> dict[str, Any]:
    """Return fits read from JSON with their NaN."""
    return {
        name: {key: math.nan if value is None else value for key, value in layer.items()}
        for name, layer in layers.items()
    }


def jsonable(value: Any) -> Any:
    """Return the value with None for what is not finite."""
    if isinstance(value, dict):
        return {key: jsonable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [jsonable(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def written(path: str, told: dict[str, Any], figures: dict[str, Any]) -> None:
    """Write the figures so far."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(
        json.dumps({"environment": told, "figures": jsonable(figures)}, indent=1, allow_nan=False), encoding="utf-8"
    )


def run_all(description: str | None, output: str, runs: Mapping[str, Callable[[dict[str, Any] | None], Any]]) -> None:
    """Run what is asked for, print a line for each, and write the figures.

    Args:
        description: text of the help.
        output: file to write, unless another is named.
        runs: name -> measures, given the exact layers of an earlier file or None.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=output)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(runs), choices=list(runs), metavar="NAME")
    parser.add_argument("--reference", help="an earlier file to take the exact alphas from")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    told, references = environment(threads=options.threads), known(options.reference)
    figures: dict[str, Any] = {}
    print(f"measuring {Path(lightning_spectral.__file__).parent}")
    print(HEADER)
    for name in options.only:
        torch.manual_seed(0)
        figures[name] = attempt(lambda name=name: runs[name](references.get(name)))
        print(line(name, figures[name]), flush=True)
        written(options.output, told, figures)
    met = sum(row.get("target", False) for row in figures.values())
    print(f"{met} of {len(figures)} in the targets")
