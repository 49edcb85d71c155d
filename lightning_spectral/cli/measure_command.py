"""`lightning-spectral measure`, a checkpoint measured without training, and `plan`, what that would do and cost."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_spectral.cli.arguments import options_of, print_note
from lightning_spectral.cli.checkpoints import Checkpoint, build_model
from lightning_spectral.cli.import_paths import SourceError, batch_reader, named_loss
from lightning_spectral.errors import first_line
from lightning_spectral.measurement.gradient_samples import enough_batches
from lightning_spectral.measurement.loader_batches import CpuBatches
from lightning_spectral.measurement.pipeline import run_measurement
from lightning_spectral.options import Options
from lightning_spectral.plan.fake_run import weightless
from lightning_spectral.plan.planner import Plan, plan_spectra
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report import print_report, run_of, write_page
from lightning_spectral.report.terminal.plan_tables import print_plan

UNPLANNED = ("weight_spectra", "bootstrap")
"""Options of a measurement that `plan_spectra` does not take."""


def run_measure(arguments: argparse.Namespace) -> None:
    """Measure a network; print the report, write ``spectra.json`` and, with plotly, ``spectra.html`` to a folder."""
    options = options_of(arguments)
    # Before measuring, so that a folder that cannot be made costs no measurement.
    folder = made_folder(arguments.output)
    report = measure_checkpoint(arguments, options)
    name = arguments.model if arguments.checkpoint is None else Path(arguments.checkpoint).name
    print_report(report, name)
    if report.chosen:
        print(f"curvature by {report.chosen}")
    json_file = folder / "spectra.json"
    try:
        report.to_json(json_file)
    except OSError as error:
        raise SourceError(f"--output {folder}: {error.strerror or error}") from error
    print(json_file)
    if arguments.page:
        try:
            print(write_page(run_of([report], name), folder / "spectra.html"))
        except ImportError as error:
            print_note("measure", f"no page: {error}; then lightning-spectral report {shlex.quote(str(json_file))}")


def measure_checkpoint(arguments: argparse.Namespace, options: Options) -> SpectralReport:
    """Build a model, load its weights and measure it; print the names left out of the checkpoint.

    The report has the step and epoch of a Lightning checkpoint.
    """
    loss_fn = named_loss(arguments.loss)
    saved = None if arguments.checkpoint is None else Checkpoint.read(arguments.checkpoint)
    torch.manual_seed(arguments.seed)
    network = build_model(arguments.model, saved)
    omissions = "" if saved is None else saved.load_into(network, prefix=arguments.prefix, strict=arguments.strict)
    device = _moved(network, arguments.device)
    read = batch_reader(arguments.data, arguments.n_batches, network)
    batches = enough_batches(lambda samples: CpuBatches(read(samples), device), network, options, loss_fn)
    report = run_measurement(network, batches, options, loss_fn, n_batches=arguments.n_batches)
    if omissions:
        print_note("measure", f"of {arguments.checkpoint}, {omissions}")
    return report.at(**saved.position) if saved is not None and saved.position else report


def made_folder(folder: str) -> Path:
    """Return a folder to write to, which is made if it is not there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise SourceError(f"--output {folder}: there is a file in its place; give a folder") from error
    except OSError as error:
        raise SourceError(f"--output {folder}: {error.strerror or error}") from error
    return Path(folder)


def _moved(model: nn.Module, device: str) -> torch.device:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        target = torch.device(name)
    except RuntimeError as error:
        raise SourceError(f"--device {device}: no device that torch knows, such as cpu, cuda or cuda:0") from error
    try:
        model.to(target)
    except Exception as error:
        # A device that is not there raises what its backend likes.
        raise SourceError(f"--device {device}: {first_line(error)}") from error
    return target


def run_plan(arguments: argparse.Namespace) -> None:
    """Print the plan of a measurement, and write it to a file if one is named."""
    plan = plan_checkpoint(arguments)
    print_plan(plan, every_layer=arguments.all)
    if arguments.json:
        print(plan.to_json(arguments.json))


def plan_checkpoint(arguments: argparse.Namespace) -> Plan:
    """Plan the measurement of a model, which is made without its weights."""
    if arguments.data is not None and arguments.batch_shape:
        raise SourceError("--data and --batch-shape: give one of them")
    loss_fn = named_loss(arguments.loss)
    saved = None if arguments.checkpoint is None else Checkpoint.read(arguments.checkpoint)
    try:
        with weightless():
            network = build_model(arguments.model, saved)
    except SourceError as error:
        if not any(words in str(error) for words in ("meta tensor", "meta device")):
            raise
        raise SourceError(
            f"{error}; a plan makes the model without its weights, whose values it seems to read"
        ) from error
    batch = shaped_batch(arguments.batch_shape) if arguments.batch_shape else None
    if arguments.data is not None:
        batch = batch_reader(arguments.data, 1, network)(None)[0]
    asked = {name: value for name, value in vars(options_of(arguments)).items() if name not in UNPLANNED}
    ranks = {name: getattr(arguments, name) for name in ("n_batches", "world_size", "sharded")}
    return plan_spectra(network, batch, loss_fn, **asked, **ranks)


def shaped_batch(shapes: Sequence[str]) -> Any:
    """Return a batch without values: a tensor for one shape, a tuple for several.

    Args:
        shapes: such as ``64x3x32x32``, with a type other than float32 after a colon.

    >>> [(tuple(x.shape), x.dtype) for x in shaped_batch(["8x5", "8:int64"])]
    [((8, 5), torch.float32), ((8,), torch.int64)]
    """
    tensors = []
    for text in shapes:
        sizes, _, kind = text.partition(":")
        dtype = getattr(torch, kind or "float32", None)
        if not all(size.isdecimal() and int(size) for size in sizes.split("x")) or not isinstance(dtype, torch.dtype):
            raise SourceError(f"--batch-shape must be as 64x3x32x32 or 64x128:int64, got {text!r}")
        tensors.append(torch.empty([int(size) for size in sizes.split("x")], dtype=dtype, device="meta"))
    return tensors[0] if len(tensors) == 1 else tuple(tensors)
