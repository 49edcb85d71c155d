"""What the training benchmark trains: tasks, arms, and one run of an arm on a task."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

from examples.ablation.peers import LayerRateAdamW, MuonWithAdamW, scale_rates
from examples.ablation.tasks import Digits, DigitsData, Language, LanguageData, ThreeParts
from examples.benchmarks.train_results import DIVERGED, Result, Run
from lightning_spectral import SpectralNewton, measure_spectra
from lightning_spectral.optim.measured_alpha import MeasuredAlpha

WARMUP = 0.05
"""Share of the steps."""
PROBE_EVERY, PROBE_SAMPLES = 100, 32
"""Steps between two measurements, and samples of each, for the arms that use them."""
STUDIED = {"alpha": (1.5, 2.0), "damping": (0.01, 0.03, 0.1, 0.3, 1.0)}
"""Options of SpectralNewton on the grid that its defaults were chosen from."""


@dataclass(frozen=True)
class Task:
    """A network, its data, and how long it trains.

    Attributes:
        module: makes the network.
        data: makes the data, in three parts.
        loss: of a network on a batch.
        steps: of training.
    """

    module: Callable[[], nn.Module]
    data: Callable[[], ThreeParts]
    loss: Callable[[nn.Module, Any], Tensor]
    steps: int


def classification(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross entropy of images."""
    return F.cross_entropy(module(batch[0]), batch[1])


def next_character(module: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross entropy per character, in nats."""
    return F.cross_entropy(module(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def mlp(width: int = 256) -> nn.Module:
    """64 pixels, two hidden layers, 10 classes."""
    hidden = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


TASKS = {
    "language": Task(Language, lambda: LanguageData(batch_size=16), next_character, steps=600),
    "noisy_pixels": Task(Digits, DigitsData, classification, steps=255),
    "wrong_labels": Task(mlp, lambda: DigitsData(noise=0.3, wrong_labels=0.3), classification, steps=510),
}
"""A GPT of 2 blocks on Python's source, a ResNet on digits with pixel noise (15 epochs), and an MLP on digits of which
30 % of the training labels are drawn anew (30 epochs, in which it can learn them by heart)."""

QUICK = {
    "language": Task(lambda: Language(width=16, depth=1), lambda: LanguageData(4, 8, 64, 20_000), next_character, 3),
    "noisy_pixels": Task(lambda: Digits(width=4), lambda: DigitsData(8, 50), classification, 3),
    "wrong_labels": Task(lambda: mlp(16), lambda: DigitsData(8, 50, 0.3, 0.3), classification, 3),
}


@dataclass(frozen=True)
class Arm:
    """An optimizer with its options.

    Attributes:
        optimizer: AdamW, MuonWithAdamW, LayerRateAdamW or SpectralNewton.
        start: learning rate in the middle of the first five, per task.
        options: of the optimizer.
    """

    optimizer: type[Optimizer]
    start: Mapping[str, float]
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self, module: nn.Module, lr: float) -> Optimizer:
        """The optimizer of a network."""
        groups = getattr(self.optimizer, "groups", None)
        return self.optimizer(groups(module) if groups else module.parameters(), lr=lr, **self.options)  # type: ignore[call-arg]


def rates(*of: float) -> dict[str, float]:
    """One for each task."""
    return dict(zip(TASKS, of, strict=True))


ADAM_LIKE, MUON_LIKE = rates(8e-3, 4e-3, 1e-3), rates(3.2e-2, 8e-3, 2e-3)

FIXED_SIZE: dict[str, Any] = {"update_rms": 0.2, "momentum": 0.95}
"""A step of one size, at the momentum that goes with it."""

ARMS: dict[str, Arm] = {
    "adamw": Arm(AdamW, ADAM_LIKE, {"weight_decay": 0.01}),
    "layer_rates": Arm(LayerRateAdamW, ADAM_LIKE, {"weight_decay": 0.01}),
    "muon": Arm(MuonWithAdamW, MUON_LIKE, {"weight_decay": 0.01}),
    "muon_momentum_0.85": Arm(MuonWithAdamW, MUON_LIKE, {"weight_decay": 0.01, "momentum": 0.85}),
    "spectral_newton": Arm(SpectralNewton, ADAM_LIKE),
    "adam_size_d_0.1": Arm(SpectralNewton, ADAM_LIKE, {"damping": 0.1}),
    "adam_size_alpha_1.5_d_0.01": Arm(SpectralNewton, ADAM_LIKE, {"alpha": 1.5, "damping": 0.01}),
    "fixed_size": Arm(SpectralNewton, MUON_LIKE, FIXED_SIZE),
    "fixed_size_momentum_0.85": Arm(SpectralNewton, MUON_LIKE, {**FIXED_SIZE, "momentum": 0.85}),
    "alpha_1.5_d_0.01": Arm(SpectralNewton, MUON_LIKE, {**FIXED_SIZE, "alpha": 1.5, "damping": 0.01}),
    "alpha_1": Arm(SpectralNewton, MUON_LIKE, {**FIXED_SIZE, "alpha": 1.0}),
    "auto": Arm(SpectralNewton, MUON_LIKE, {**FIXED_SIZE, "alpha": "auto"}),
    "paper": Arm(SpectralNewton, MUON_LIKE, {**FIXED_SIZE, "alpha": "auto", "damping": 0.1}),
    "probe": Arm(SpectralNewton, MUON_LIKE, {**FIXED_SIZE, "alpha": "probe"}),
}
"""What the table has a line of: `spectral_newton` is SpectralNewton with nothing but a learning rate; `paper` has the
paper's exponents by kind of layer at its damping; `layer_rates` is its negative control, AdamW with a rate per layer in
proportion to the s of its spectrum. Those of SpectralNewton from `fixed_size` on have a step of one size."""


def recipe(task: Task, arm: Arm) -> str:
    """The optimizer with the exponents and dampings that the arm's options resolve to on the task's network.

    Arms that come to the same share their runs, and runs of defaults that have changed are not taken for new ones.
    """
    torch.manual_seed(0)
    optimizer = arm.make(task.module(), 1.0)
    name, told = type(optimizer).__name__, {k: v for k, v in arm.options.items() if k not in ("alpha", "damping")}
    words = [f"{key}={value}" for key, value in sorted(told.items())]
    if isinstance(optimizer, SpectralNewton):
        spectral = [group for group in optimizer.param_groups if group["update"] == "spectral"]
        by_kind = {group["kind"]: f"alpha={group['alpha']} damping={group['damping']}" for group in spectral}
        words = [f"{key}={spectral[0][key]}" for key in sorted(FIXED_SIZE) if spectral[0][key] != FIXED_SIZE[key]]
        same = len(set(by_kind.values())) == 1
        words += [*set(by_kind.values())] if same else [f"{kind}({of})" for kind, of in sorted(by_kind.items())]
    return " ".join([name, *words])


@functools.cache
def parts(task: str, quick: bool) -> ThreeParts:
    """The task's data, read once in each process."""
    data = (QUICK if quick else TASKS)[task].data()
    data.setup("fit")
    return data


def train(run: Run, arm: Arm, *, quick: bool = False) -> Result:
    """Train on one of the three tasks, and take the losses on validation and test part."""
    task = replace((QUICK if quick else TASKS)[run.task], steps=run.steps)
    return train_task(run, task, parts(run.task, quick), arm)


def train_task(run: Run, task: Task, data: ThreeParts, arm: Arm) -> Result:
    """Train on any task, and take the losses on validation and test part."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    module = task.module()
    optimizer = arm.make(module, run.lr)
    bases = [group["lr"] for group in optimizer.param_groups]
    started = time.perf_counter()
    for step, batch in enumerate(batches(data, task.steps)):
        if step % PROBE_EVERY == 0:
            measure(optimizer, module, batch, task.loss)
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            group["lr"] = base * schedule(step, task.steps)
        optimizer.zero_grad()
        loss = task.loss(module, batch)
        if not bool(loss.isfinite()):
            break
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - started
    val, test = (evaluate(module, loader, task.loss) for loader in (data.val_dataloader(), data.test_dataloader()))
    return Result(run, val, test, round(seconds, 1))


def schedule(step: int, steps: int) -> float:
    """The learning rate's factor: up over the warmup, then down to zero after the last step.

    >>> [schedule(step, 100) for step in (0, 4, 5, 52, 99)]
    [0.2, 1.0, 1.0, 0.5052631578947369, 0.010526315789473684]
    """
    warmup = round(WARMUP * steps)
    return (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup)


def batches(data: ThreeParts, steps: int) -> Iterable[Any]:
    """As many training batches, epoch after epoch."""
    left = steps
    while left > 0:
        for batch in data.train_dataloader():
            yield batch
            left -= 1
            if not left:
                return


def measure(optimizer: Optimizer, module: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> None:
    """Give an optimizer that wants it what the spectra of its gradients are."""
    by_probe = isinstance(optimizer, SpectralNewton) and optimizer.takes_alpha
    if not by_probe and not isinstance(optimizer, LayerRateAdamW):
        return
    report = measure_spectra(module, batch, loss, max_samples=PROBE_SAMPLES)
    if isinstance(optimizer, LayerRateAdamW):
        scale_rates(optimizer, {name: layer.s.exponent for name, layer in report.layers.items()})
        return
    parameters = dict(module.named_parameters())
    alphas = {name: report.layers[name].alpha.exponent for name in report.trusted}
    optimizer.set_alpha({parameters[name]: [MeasuredAlpha(alpha)] for name, alpha in alphas.items()})


def evaluate(module: nn.Module, loader: DataLoader[Any], loss: Callable[[nn.Module, Any], Tensor]) -> float:
    """Mean loss over all samples, in eval mode; `DIVERGED` where it is not finite or larger."""
    module.eval()
    with torch.no_grad():
        sizes = [(len(batch[0]) if isinstance(batch, list) else len(batch), loss(module, batch)) for batch in loader]
    mean = float(sum(size * value for size, value in sizes) / sum(size for size, _ in sizes))
    return min(mean, DIVERGED) if math.isfinite(mean) else DIVERGED


def studied() -> dict[str, Arm]:
    """The arms of the grid of exponents and dampings."""
    grid = [dict(zip(STUDIED, values, strict=True)) for values in product(*STUDIED.values())]
    return {
        " ".join(f"{k}={v:g}" for k, v in of.items()): Arm(SpectralNewton, MUON_LIKE, {**FIXED_SIZE, **of})
        for of in grid
    }
