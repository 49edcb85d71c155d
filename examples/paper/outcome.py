"""One training run of the reproduction: what it is of, how it is made, and what came of it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from examples.ablation.peers import LayerRateAdamW, ScaleRates
from examples.ablation.run import hush
from examples.paper.data import Parts, fixed_batch
from examples.paper.modules import Classifier, LanguageModel, Loaders
from examples.paper.tasks import DATA, NETWORKS, TEXT, without_layer_norm
from lightning_spectral import SpectralProbe, SpectralReport, measure_spectra


@dataclass(frozen=True)
class Training:
    """What a run is of: an entry of `trainings` in a config file.

    Attributes:
        name: of the entry.
        data: "name", one of `tasks.DATA`, and its arguments.
        network: "name", one of `tasks.NETWORKS`, and its arguments; "layer_norm: false" takes every LayerNorm out.
        steps: optimizer steps; 0 measures the network as it comes.
        batch_size: samples per step.
        lr: learning rate of AdamW at the start.
        cosine: let it fall to 0 at the end; else it stays.
        weight_decay: of AdamW.
        rate_power: scale each matrix's rate by its s to this power over the mean of all (`ScaleRates`); None: do not.
        shuffled: give each matrix the scale of another one, drawn at random.
        measure_at: steps before which to measure, the last of which may be ``steps``, after the training.
        samples: of the training part to measure on, always the same.
        gradient_samples: numbers of samples to take the gradient of, a measurement each, with the curvature of the
            first ``samples`` of them; none: one measurement, gradient and curvature of ``samples``.
        probe: further options of the measurement.
    """

    name: str
    data: Mapping[str, Any]
    network: Mapping[str, Any]
    steps: int
    batch_size: int
    lr: float
    measure_at: tuple[int, ...]
    samples: int
    weight_decay: float = 0.01
    cosine: bool = True
    rate_power: float | None = None
    shuffled: bool = False
    gradient_samples: tuple[int, ...] = ()
    probe: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, name: str, values: Mapping[str, Any]) -> Training:
        """An entry of a config file.

        Raises:
            ValueError: for an option that there is not, or a missing one.
        """
        known = {f.name for f in fields(cls)} - {"name"}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"training {name}: {', '.join(unknown)} is no option; there are {', '.join(sorted(known))}"
            )
        several = {
            "measure_at": tuple(values.get("measure_at", (0,))),
            "gradient_samples": tuple(values.get("gradient_samples", ())),
        }
        try:
            made = cls(name=name, **{**values, **several})
        except TypeError as error:
            raise ValueError(f"training {name}: {error}") from error
        for what, table in (("data", DATA), ("network", NETWORKS)):
            given = getattr(made, what).get("name")
            if given not in table:
                raise ValueError(f"training {name}: {what} has no {given!r}; there are {', '.join(table)}")
        if max(made.measure_at) > made.steps:
            raise ValueError(
                f"training {name}: measure_at holds step {max(made.measure_at)}, and there are {made.steps} steps"
            )
        return made

    def digest(self, seed: int) -> str:
        """Tells this run from one with another option or seed."""
        text = json.dumps({**asdict(self), "name": "", "seed": seed}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        training: the name of its entry.
        seed: of its weights and the order of its samples.
        test: what the module logged of the test part after training; empty where there was none.
        seconds: of all.
        reports: a measurement before each step of ``measure_at``, or one for each of ``gradient_samples``.
    """

    training: str
    seed: int
    test: dict[str, float]
    seconds: float
    reports: list[SpectralReport]

    @property
    def last(self) -> SpectralReport:
        """The last measurement."""
        return self.reports[-1]

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["reports"] = [report.to_dict() for report in self.reports]
        part = path.with_suffix(".part")
        part.write_text(json.dumps(values), encoding="utf-8")
        part.rename(path)

    @classmethod
    def load(cls, path: Path) -> Outcome:
        """The inverse of `save`.

        Raises:
            OldOutcomeError: if the file is of another version of the package, or none of ours.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**values, "reports": [SpectralReport.from_dict(report) for report in values["reports"]]})
        except (ValueError, KeyError, TypeError) as error:
            raise OldOutcomeError(f"{path} cannot be read ({error}); remove it, and it is made anew") from error


class OldOutcomeError(RuntimeError):
    """A file of an outcome that cannot be read."""


class MeasureAt(SpectralProbe):
    """A `SpectralProbe` before given steps.

    Args:
        steps: before which to measure.
        options: of the probe.
    """

    def __init__(self, steps: tuple[int, ...], **options: Any) -> None:
        super().__init__(every_n_steps=1, min_probes=0, history_size=max(len(steps), 1), **options)
        self.steps = frozenset(steps)

    def should_measure(self, step: int) -> bool:
        """Whether the step is one of those given."""
        return step in self.steps


def outcome(training: Training, seed: int, folder: Path) -> Outcome:
    """Read what came of a run, or train and measure, and write it.

    Args:
        training: what to do.
        seed: of the weights and the order of the samples.
        folder: of all outcomes.

    Raises:
        RuntimeError: if a measurement failed.
    """
    path = folder / f"{training.name}-{seed}-{training.digest(seed)}.json"
    if path.exists():
        return Outcome.load(path)
    hush()
    started = time.perf_counter()
    made = _run(training, seed)
    found = Outcome(training.name, seed, made[0], time.perf_counter() - started, made[1])
    found.save(path)
    return found


def _run(training: Training, seed: int) -> tuple[dict[str, float], list[SpectralReport]]:
    pl.seed_everything(seed, verbose=False)
    chosen = dict(training.data)
    parts = DATA[chosen.pop("name")](**chosen)
    module = _module(training, parts)
    measurements = _measurements(training, parts)
    if not training.steps:
        return {}, [_measured(module, *one).at(step=0, epoch=0) for one in measurements]
    during = tuple(step for step in training.measure_at if step < training.steps)
    quiet = {"log_layers": "none", "keep_reports": False, "step": False}
    probes = [
        MeasureAt(during, batch=batches, prefix=f"spectral/{i}", **quiet, **options)
        for i, (batches, options) in enumerate(measurements)
    ]
    trainer = pl.Trainer(
        max_steps=training.steps,
        max_epochs=-1,
        callbacks=[*probes, *_scaling(training)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    loaders = Loaders(parts, training.batch_size)
    trainer.fit(module, loaders)
    if failed := sum(probe.failed_probes for probe in probes):
        raise RuntimeError(f"{training.name}, seed {seed}: {failed} measurements failed; see the warnings")
    reports = [report for of_step in zip(*(probe.history for probe in probes), strict=True) for report in of_step]
    if training.steps in training.measure_at:
        last = (_measured(module, *one) for one in measurements)
        reports += [report.at(step=training.steps, epoch=trainer.current_epoch) for report in last]
    (tested,) = trainer.test(module, datamodule=loaders, verbose=False)
    return dict(tested), reports


def _measurements(training: Training, parts: Parts) -> list[tuple[DataLoader[Any], dict[str, Any]]]:
    """Batch and options of each measurement at a step; gradient and curvature of the same batch unless said otherwise.

    A probe's own choice of the gradient's samples would go by their noise, and take the curvature of 64 of them.
    """
    if not training.gradient_samples:
        return [(fixed_batch(parts.plain, training.samples), {"gradient_samples": None, **training.probe})]
    return [
        (fixed_batch(parts.plain, n), {"gradient_samples": n, "max_samples": training.samples, **training.probe})
        for n in training.gradient_samples
    ]


def _measured(module: pl.LightningModule, batches: DataLoader[Any], options: Mapping[str, Any]) -> SpectralReport:
    """Measure where there is a GPU on it: Lightning leaves a module that was trained there on the CPU."""
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    return measure_spectra(module, batches, **options)


def _module(training: Training, parts: Parts) -> Classifier | LanguageModel:
    chosen = dict(training.network)
    name, keeps_norms = chosen.pop("name"), chosen.pop("layer_norm", True)
    network: nn.Module = NETWORKS[name](parts.classes, **chosen)
    if not keeps_norms:
        without_layer_norm(network)
    make: Callable[[nn.Module], Optimizer] | None = None
    if training.rate_power is not None:
        make = partial(_layer_rates, lr=training.lr, weight_decay=training.weight_decay)
    kind = LanguageModel if training.data["name"] in TEXT else Classifier
    return kind(network, training.lr, training.weight_decay, make, cosine=training.cosine)


def _layer_rates(module: nn.Module, lr: float, weight_decay: float) -> LayerRateAdamW:
    return LayerRateAdamW(LayerRateAdamW.groups(module), lr=lr, weight_decay=weight_decay)


def _scaling(training: Training) -> list[SpectralProbe]:
    if training.rate_power is None:
        return []
    every = max(training.steps // 10, 1)
    options = {"every_n_steps": every, "min_probes": 0, "prefix": "scale", "log_layers": "none"}
    options["max_samples"] = training.samples
    # The batch about to be trained on, at its step: more samples would be a later one.
    options["gradient_samples"] = None
    return [ScaleRates(power=training.rate_power, shuffled=training.shuffled, **options)]
