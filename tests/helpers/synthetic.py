"""Reports made from formulas, the same on every machine: no training, no random numbers."""

import torch
from fits import fit_numbers

from lightning_spectral import SpectralReport
from lightning_spectral.layers.kinds import KINDS
from lightning_spectral.numerics.gradient_noise import GradientNoise


def spectrum(
    name, kind="conv", *, alpha=2.0, gamma=1.0, rate=0.0, bend=0.0, noise=0.1, k=20, negative=(), shape=(64, 64), **more
):
    """sigma ~ k^-gamma exp(-rate k - bend (log k)^2), and h ~ sigma^alpha, wavy by `noise`; h < 0 at `negative`."""
    ranks = torch.arange(1, k + 1, dtype=torch.float64)
    wave = 0.01 * (3 * ranks).sin()
    sigma = 0.1 * (-gamma * ranks.log() - rate * ranks - bend * ranks.log().square() + wave).exp()
    h = 50 * sigma**alpha * (noise * (7 * ranks + len(name)).sin()).exp()
    h[list(negative)] *= -1
    return fit_numbers(sigma, h, name=name, kind=kind, shape=shape, **more)


def dead(name, kind="conv"):
    """A layer whose curvature could not be measured."""
    sigma = 0.1 / torch.arange(1, 21, dtype=torch.float64)
    return fit_numbers(
        sigma, torch.full((20,), float("nan")), name=name, kind=kind, shape=(64, 64), note="no second derivative"
    )


def report(layers, *, step=None, **options):
    values = {"skipped": {}, "loss": 1.0, "n_samples": 64, "curvature": "exact", "mode": "eval", "precision": "float32"}
    layers = {layer.name: layer for layer in layers}
    return SpectralReport(layers, **{**values, "top_k": 20, "seconds": 0.1, "step": step, **options})


def network(step=160):
    """A layer of each kind, exponents and rank models moving with the step: one noisy, one with h < 0, one sampled.

    The signal falls with depth and, a little, with the step: of the last layer below what a fit to trust needs, late.
    """
    late = step / (step + 60)
    layers = []
    for i, kind in enumerate(KINDS):
        options = {"alpha": 1.2 + 0.15 * i + late * (0.8 - 0.2 * i), "gamma": 0.7 + 0.06 * i}
        options["gradient_noise"] = GradientNoise(1.0 - 0.025 * i - 0.05 * late, 0.01, parts=4)
        if i in (1, 2, 3):
            options["bend"] = max(0.0, 0.05 * i - 0.13 * late)
        if kind == "head":
            options |= {"noise": 3.0, "gamma": 0.0, "rate": 0.3}
        if kind == "mlp_up":
            options["negative"] = (3, 11)
        if kind == "dense":
            options |= {"k": 9, "shape": (9, 64)}
        if kind == "attention_out":
            options |= {"method": "sketch", "h_stderr": torch.full((20,), 4e-3)}
        layers.append(spectrum(f"block.{kind}.weight", kind, **options))
    return report(layers, step=step)


def history(steps=(0, 20, 40, 80, 160)):
    return [network(step) for step in steps]


def deep(count=160):
    """More layers than there is room for, with long names."""
    kinds = ("attention_qkv", "attention_out", "mlp_up", "mlp_down")
    names = [f"model.decoder.layers.{i // 4}.self_attn.{kinds[i % 4]}_projection.weight" for i in range(count)]
    layers = [spectrum(n, kinds[i % 4], alpha=1.5 + 0.3 * (i % 4) + i / count) for i, n in enumerate(names)]
    return report(layers, step=3, curvature="auto", chosen="sketch: 160 layers")


def broken():
    """Layers with every flaw there is: not measured, only negative, two directions, no line, falling, empty, flat."""
    nothing = {
        "empty": (torch.zeros(0), torch.zeros(0)),
        "zero": (torch.zeros(5), torch.zeros(5)),
        "flat": (torch.ones(5), torch.ones(5)),
        "rounding": (torch.tensor([0.1, 0.05, 0.03, 0.02, 1e-11]), torch.tensor([1.0, 0.3, 0.1, 0.0, 1.0])),
    }
    layers = [
        spectrum("good"),
        dead("dead"),
        spectrum("negative", negative=range(20)),
        spectrum("short", k=2),
        spectrum("cloud", "head", noise=3.0, negative=(1, 4)),
        spectrum("falling", alpha=-0.7),
        *(fit_numbers(*of, name=name, kind="by hand", shape=(5, 5)) for name, of in nothing.items()),
    ]
    return report(layers, step=5)
