"""How far alpha of a batch lies from alpha of 4,096 samples, and what more samples for the gradient change.

    python examples/benchmarks/noise.py [--output noise.json] [--figure noise.png] [--seeds 3]

A GPT and a CNN are trained by Lightning on batches of 64, each with two default probes at fixed steps and of the final
weights: one with `gradient_samples=None`, gradient and curvature on the batch, and one with "auto". At the same weights
the reference takes the gradient of 4,096 samples (of all 1,088 images for the CNN) and curvature of 256. In the last
weights the number of gradient samples is varied, too: `plain` has the curvature of the same samples, `few` that of 64
of them.

Errors are of alpha, over the layers whose reference is a fit to trust but for its signal; `covered` is the share of
them within 1.96 standard errors. Cost is in that of the probe with `gradient_samples=None`, in the same run.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, default_collate

from lightning_spectral import SpectralProbe, measure_spectra
from lightning_spectral._serialization import to_jsonable
from lightning_spectral.errors import SpectralWarning
from lightning_spectral.numerics.statistics import median
from lightning_spectral.records.report import SpectralReport

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.ablation.tasks import Digits, DigitsData, Language, LanguageData, ThreeParts
from examples.benchmarks.machine import environment
from examples.benchmarks.noise_figure import figure

BATCH, REFERENCE, REFERENCE_CURVATURE, FEW = 64, 4096, 256, 64

TASKS: dict[str, tuple[Callable[[], pl.LightningModule], Callable[[], ThreeParts], int, int]] = {
    "gpt": (Language, lambda: LanguageData(batch_size=BATCH), 100, 401),
    "cnn": (Digits, lambda: DigitsData(batch_size=BATCH), 50, 201),
}
"""Network, data, steps between probes, steps of training."""

SAMPLES = (32, 64, 128, 256, 512, 1024, 2048)
DRAWS = 3
"""Numbers of gradient samples in the last weights, and how many disjoint draws of each there are at most."""


class Compare(pl.Callback):
    """Measure the reference where the probe before it has just measured, at the same weights."""

    def __init__(self, probes: dict[str, SpectralProbe], loader: DataLoader[Any]) -> None:
        self.probes, self.loader = probes, loader
        self.rows: list[dict[str, Any]] = []
        self._seen = dict.fromkeys(probes, 0)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Compare the reports before a step."""
        self._compare(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Compare those of the final weights."""
        self._compare(pl_module)

    def _compare(self, pl_module: Any) -> None:
        fresh = {name: probe for name, probe in self.probes.items() if probe.probes > self._seen[name]}
        if not fresh:
            return
        reference = reference_of(pl_module, self.loader)
        for name, probe in fresh.items():
            self._seen[name] = probe.probes
            report = probe.history[-1]
            cost = probe.budget.last_seconds
            self.rows.append({"arm": name, "step": report.step, "seconds": cost, **errors(report, reference)})


def reference_of(module: Any, loader: DataLoader[Any]) -> SpectralReport:
    """Return the report of many samples."""
    return measure_spectra(module, loader, gradient_samples=REFERENCE, max_samples=REFERENCE_CURVATURE)


def errors(report: SpectralReport, reference: SpectralReport) -> dict[str, Any]:
    """Compare the layers whose reference is a line."""
    names = [n for n, x in reference.layers.items() if replace(x.fit_quality, signal=1.0).trusted]
    pairs = [(report.layers[n], reference.layers[n]) for n in names]
    difference = [x.alpha.exponent - y.alpha.exponent for x, y in pairs]
    seen = [x for x in zip(pairs, difference, strict=True) if x[0][0].gradient_noise.signal >= 0.5]
    own = [(x, d) for (x, _), d in zip(pairs, difference, strict=True) if x.fit_quality.trusted]
    return {
        "samples": report.n_samples,
        "curvature_samples": report.curvature_samples,
        "layers": len(names),
        "alpha": median(x.alpha.exponent for x, _ in pairs),
        "reference": median(y.alpha.exponent for _, y in pairs),
        "bias": statistics.mean(difference) if difference else math.nan,
        "median_error": median(map(abs, difference)),
        "signal": median(x.gradient_noise.signal for x, _ in pairs),
        "noise_scale": median(x.gradient_noise.noise_scale for x, _ in pairs),
        "reference_signal": median(y.gradient_noise.signal for _, y in pairs),
        "with_signal": len(seen),
        "covered": sum(abs(d) <= 1.96 * x.alpha.stderr for (x, _), d in seen),
        "trusted": len(own),
        "trusted_median_error": median(abs(d) for _, d in own),
    }


def train(name: str, seed: int) -> tuple[pl.LightningModule, ThreeParts, list[dict[str, Any]]]:
    """Train one network with both probes beside the reference."""
    make, data_of, every, steps = TASKS[name]
    pl.seed_everything(seed, verbose=False)
    module, data = make(), data_of()
    data.setup("fit")
    loader = DataLoader(data.train, 256, shuffle=True)
    probes = {
        arm: SpectralProbe(every_n_steps=every, gradient_samples=value, prefix=f"spectral/{arm}", print_end=False)
        for arm, value in (("batch", None), ("auto", "auto"))
    }
    compare = Compare(probes, loader)
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[*probes.values(), compare], accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, data)
    return module, data, compare.rows


def vary(module: pl.LightningModule, data: ThreeParts, seed: int) -> Iterator[dict[str, Any]]:
    """Yield errors at the last weights, by number of gradient samples."""
    reference = reference_of(module, DataLoader(data.train, 256))
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed)).tolist()  # type: ignore[arg-type]
    for samples in SAMPLES:
        for draw in range(min(DRAWS, len(order) // samples)):
            batch = default_collate([data.train[i] for i in order[draw * samples : (draw + 1) * samples]])
            for arm, options in (("plain", {}), ("few", {"gradient_samples": samples, "max_samples": FEW})):
                if arm == "few" and samples <= FEW:
                    continue
                report = measure_spectra(module, batch, **options)
                yield {"arm": arm, **errors(report, reference)}


def summarized(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the probes after the first, and coverage over all fits of a signal from 0.5."""
    arms = {arm: [row for row in rows if row["arm"] == arm and row["step"] >= 10] for arm in ("batch", "auto")}
    seconds = {arm: median(row["seconds"] for row in of_arm) for arm, of_arm in arms.items()}
    keys = ("samples", "signal", "noise_scale", "median_error", "bias", "alpha", "reference")
    return {
        arm: {key: median(row[key] for row in of_arm) for key in keys} | {"cost": seconds[arm] / seconds["batch"]}
        for arm, of_arm in arms.items()
    }


def coverage(rows: list[dict[str, Any]]) -> float | None:
    """Return the share of fits with a signal from 0.5 whose interval holds the reference."""
    n = sum(row["with_signal"] for row in rows)
    return sum(row["covered"] for row in rows) / n if n else None


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / "noise_cpu.json")
    parser.add_argument("--figure", type=Path, default=results / "noise_cpu.png")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=TASKS, default=list(TASKS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    warnings.simplefilter("ignore", SpectralWarning)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    networks: dict[str, Any] = {}
    for name in arguments.only:
        probes, varied = [], []
        for seed in range(arguments.seeds):
            module, data, rows = train(name, seed)
            probes += [{"seed": seed, **row} for row in rows]
            varied += [{"seed": seed, **row} for row in vary(module.eval(), data, seed)]
            print(
                name,
                seed,
                json.dumps(summarized(probes), default=str),
                "coverage",
                coverage(probes + varied),
                flush=True,
            )
        networks[name] = {
            "summary": summarized(probes),
            "coverage": coverage(probes + varied),
            "probes": probes,
            "varied": varied,
        }
    result = {"environment": environment(threads=torch.get_num_threads(), seeds=arguments.seeds), "networks": networks}
    arguments.output.write_text(json.dumps(to_jsonable(result), indent=1) + "\n", encoding="utf-8")
    figure(networks, arguments.figure)


if __name__ == "__main__":
    main()
