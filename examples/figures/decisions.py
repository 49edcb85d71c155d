"""Three decisions of a training run, each with a small figure of real runs: a GPT on characters of Python's source.

The learning rate by the scale of the step that was taken, the batch size by the noise scale of the gradient, and the
optimizer by alpha of each kind of layer. `make.py` draws them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from lightning_spectral import SpectralProbe, SpectralReport
from lightning_spectral.demo.networks import CHARACTERS, CharacterGPT, PythonSource
from lightning_spectral.report import figures
from lightning_spectral.report.figures.canvas import canvas
from lightning_spectral.report.figures.style import QUIET, ink, run_style

WIDTH, HEIGHT, LENGTH = 7.0, 2.6, 64
SIZES = (8, 128)
"""Batch sizes that are compared."""

LEAST_SCALE = 1e-2
"""Lower end of the axis of scales; smaller ones are drawn there."""


@dataclass
class Run:
    """A trained GPT: its reports, and by step the scale of the step that followed and the loss before it."""

    history: list[SpectralReport] = field(default_factory=list)
    scales: dict[int, float] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)


Runs = Mapping[str, Run]


class KeepSteps(pl.Callback):
    """Keep what the probe measures of steps, which it has of the last one alone."""

    def __init__(self, probe: SpectralProbe, run: Run) -> None:
        self.probe, self.run = probe, run

    def on_train_batch_end(self, *_: Any) -> None:
        """Read the last step that was measured, after the probe has."""
        last = self.probe.step_probe.last
        if last is not None and last.step is not None:
            self.run.scales[last.step], self.run.losses[last.step] = last.scale, last.loss_before


@cache
def text() -> PythonSource:
    """Python's source, read once."""
    return PythonSource(LENGTH)


def train(steps: int, every: int, *, lr: float = 3e-3, batch_size: int = 64, **options: Any) -> Run:
    """Train with a probe before every so many steps, and before the last."""
    pl.seed_everything(0, verbose=False)
    torch.set_num_threads(1)
    model = CharacterGPT(len(CHARACTERS), LENGTH, lr=lr)
    probe = SpectralProbe(
        every_n_steps=every, min_probes=0, keep_reports=False,
        **{"max_samples": 64, "gradient_samples": None, **options},
    )  # fmt: skip
    run = Run()
    trainer = pl.Trainer(
        max_steps=steps + 1, accelerator="cpu", logger=False, callbacks=[probe, KeepSteps(probe, run)],
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(text(), batch_size, shuffle=True, drop_last=True))
    run.history = list(probe.history)
    return run


def same_samples() -> DataLoader[Any]:
    """A loader of its own gives each probe the same samples, whatever the batches of training."""
    return DataLoader(text(), 64, shuffle=True, generator=torch.Generator().manual_seed(1))


def learning_rates(steps: int) -> Runs:
    """Train at three rates; each probe measures one layer, for the steps that follow are what is looked at."""
    rates = ("0.003", "0.03", "0.3")
    options: dict[str, Any] = {"top_k": 3, "layers": "head*"}
    return {f"lr {rate}": train(steps, max(1, steps // 20), lr=float(rate), **options) for rate in rates}


def batch_sizes(steps: int, samples: int) -> Runs:
    """Train on two batch sizes, each probe on the same samples."""
    options: dict[str, Any] = {"top_k": 3, "step": False, "gradient_samples": samples, "max_samples": 8}
    return {
        str(size): train(steps, max(1, steps // 10), batch_size=size, batch=same_samples(), **options) for size in SIZES
    }


def optimizers(steps: int, samples: int) -> Runs:
    """Train with both optimizers at one rate, each probe on the same samples."""
    options: dict[str, Any] = {"lr": 0.016, "step": False, "gradient_samples": samples, "max_samples": min(64, samples)}
    return {
        name: train(steps, max(1, steps // 10), batch=same_samples(), swap_optimizer=swap, **options)
        for name, swap in (("AdamW", False), ("SpectralNewton", True))
    }


def draw_step_scale(runs: Runs) -> Figure:
    """Is the learning rate past the edge? The factor on each step that would have been best, and the loss."""
    with canvas(WIDTH, HEIGHT, title=False) as drawing:
        left, right = drawing.panels(1, 2)
        for i, (name, run) in enumerate(runs.items()):
            # Where the curvature along the step is not positive there is no best factor.
            scales = {step: max(scale, LEAST_SCALE) for step, scale in run.scales.items() if scale > 0}
            _curve(left, i, scales)
            _curve(right, i, run.losses, label=name)
        left.axhline(1.0, color=QUIET, linewidth=0.8)
        left.axhspan(LEAST_SCALE / 2, 0.5, color=ink(), alpha=0.12, linewidth=0)
        left.text(0.16, 0.43, "below 1/2: past the edge", transform=left.transAxes, fontsize=7)
        left.set(yscale="log", ylim=(LEAST_SCALE / 1.4, 40), xlabel="optimizer step", ylabel="step scale")
        left.set_yticks([0.01, 0.1, 0.5, 1, 10], ["0.01", "0.1", "0.5", "1", "10"])
        left.minorticks_off()
        _loss_panel(right)
    return drawing.figure


def draw_noise_scale(runs: Runs) -> Figure:
    """Is the batch too small? The samples at which half of the squared gradient is noise, and the loss."""
    with canvas(WIDTH, HEIGHT, title=False) as drawing:
        left, right = drawing.panels(1, 2)
        for i, (size, run) in enumerate(runs.items()):
            _curve(left, i, {report.step or 0: report.medians()["noise_scale_median"] for report in run.history})
            left.axhline(int(size), color=run_style(i)[0], linestyle="--", linewidth=0.8)
            look: dict[str, Any] = {"color": run_style(i)[0], "ha": "right", "va": "bottom", "fontsize": 7}
            left.text(max(report.step or 0 for report in run.history), int(size), f"batch of {size}", **look)
            _curve(right, i, {report.step or 0: report.loss for report in run.history}, label=f"batch of {size}")
        left.set(yscale="log", ylim=(0.7, 400), xlabel="optimizer step", ylabel="noise scale (samples)")
        left.set_yticks([1, 10, 100], ["1", "10", "100"])
        left.minorticks_off()
        _loss_panel(right)
    return drawing.figure


def draw_alpha_by_kind(runs: Runs) -> Figure:
    """Which layers, which optimizer? alpha of the layers of the blocks."""
    blocks = {
        name: [
            replace(report, layers={name: layer for name, layer in report.layers.items() if name.startswith("blocks")})
            for report in run.history
        ]
        for name, run in runs.items()
    }
    return figures.plot_alpha_over_training(blocks, width=WIDTH, title=False)


def _curve(axes: Axes, i: int, values: Mapping[int, float], label: str | None = None) -> None:
    colour, marker, _ = run_style(i)
    axes.plot(
        list(values), list(values.values()), color=colour, marker=marker, markersize=3, linewidth=1.0, label=label
    )


def _loss_panel(axes: Axes) -> None:
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.legend()


def draw(steps: int = 200, samples: int = 1024) -> dict[str, Figure]:
    """Train and draw; return figures by the names of their files. Tests take fewer steps and samples of a gradient."""
    return {
        "step_scale": draw_step_scale(learning_rates(steps)),
        "noise_scale": draw_noise_scale(batch_sizes(2 * steps, samples)),
        "alpha_by_kind": draw_alpha_by_kind(optimizers(2 * steps, samples)),
    }
