"""`lightning-spectral measure` and `plan`: a checkpoint measured without training, and what that would cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_spectral._messages import first_line
from lightning_spectral.cli.checkpoints import Checkpoint, build_model
from lightning_spectral.cli.import_paths import SourceError, named_loss, read_batches
from lightning_spectral.measurement.cpu_batches import CpuBatches
from lightning_spectral.measurement.pipeline import run_measurement
from lightning_spectral.options import Options
from lightning_spectral.plan.meta_init import weightless
from lightning_spectral.plan.planner import Plan, plan_quietly
from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report import run_of, write_page
from lightning_spectral.report.page.build import plotly_js


def measure_checkpoint(
    model: str,
    data: str,
    *,
    loss: str | None = None,
    checkpoint: str | Path | None = None,
    prefix: str = "",
    strict: bool = True,
    n_batches: int = 1,
    device: str = "auto",
    seed: int = 0,
    options: Options | None = None,
) -> tuple[SpectralReport, str]:
    """Build a model, load its weights, and measure it.

    Args:
        model: import path, see `lightning_spectral.cli.checkpoints.build_model`.
        data: import path, see `lightning_spectral.cli.import_paths.read_batches`.
        loss: name of a loss, see `named_loss`; None: the module's ``spectral_loss`` or
            ``training_step``.
        checkpoint: file of a Lightning checkpoint or a state dict; None: the weights stay as they are.
        prefix, strict: see `lightning_spectral.cli.checkpoints.Checkpoint.load_into`.
        n_batches: average over so many batches.
        device: such as "cpu" or "cuda:1"; "auto": "cuda" where there is one.
        seed: of whatever is random in the model, the data and the measurement.
        options: what to measure and how.

    Returns:
        The report, with the step and epoch of a Lightning checkpoint; and the names left out of the checkpoint.

    Raises:
        SourceError: if something named cannot be found or loaded.
        ValueError, MeasurementError: as in `lightning_spectral.measure_spectra`.
    """
    loss_fn = named_loss(loss)
    saved = None if checkpoint is None else Checkpoint.read(checkpoint)
    torch.manual_seed(seed)
    network = build_model(model, saved)
    note = "" if saved is None else saved.load_into(network, prefix=prefix, strict=strict)
    target = _moved(network, device)
    batches = CpuBatches(read_batches(data, n_batches, network), target)
    report = run_measurement(network, batches, options or Options(), loss_fn)
    return (report if saved is None or not saved.position else report.at(**saved.position)), note


def plan_model(
    model: str,
    data: str | None = None,
    *,
    shapes: Sequence[str] = (),
    loss: str | None = None,
    checkpoint: str | Path | None = None,
    options: Options | None = None,
    n_batches: int = 1,
    world_size: int = 1,
    sharded: bool = False,
) -> Plan:
    """Return what `measure_checkpoint` would do and cost; the model is made without its weights.

    Args:
        model, data, loss, checkpoint, n_batches, options: as there. Of a checkpoint the hyper-parameters count alone,
            of the data the shapes of the first batch.
        shapes: of a batch in place of data, see `shaped_batch`.
        world_size: processes that share a batch.
        sharded: whether parameters are shards over them.

    Raises:
        SourceError: as there, and for data and shapes both, or a model that reads its weights when it is made.
        ValueError, MeasurementError: as in `lightning_spectral.plan.planner.plan_spectra`.
    """
    if data is not None and shapes:
        raise SourceError("--data and --batch-shape: give one of them")
    loss_fn = named_loss(loss)
    saved = None if checkpoint is None else Checkpoint.read(checkpoint)
    try:
        with weightless():
            network = build_model(model, saved)
    except SourceError as error:
        if not any(words in str(error) for words in ("meta tensor", "meta device")):
            raise
        raise SourceError(
            f"{error}; a plan makes the model without its weights, whose values it seems to read"
        ) from error
    batch = shaped_batch(shapes) if shapes else None if data is None else read_batches(data, 1, network)[0]
    return plan_quietly(
        network, batch, loss_fn, options or Options(), n_batches=n_batches, world_size=world_size, sharded=sharded
    )


def shaped_batch(shapes: Sequence[str]) -> Any:
    """Return a batch without values: a tensor for one shape, a tuple for several.

    Args:
        shapes: such as ``64x3x32x32``, with a type other than float32 after a colon.

    Raises:
        SourceError: for what is no shape or no type.

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


def write_report(report: SpectralReport, folder: str | Path, *, name: str, page: bool = True) -> list[Path]:
    """Write ``spectra.json``, and ``spectra.html`` beside it, into a folder that is made if it is not there.

    Raises:
        SourceError: if they cannot be written.
        ImportError: for the page, without plotly.
    """
    folder = check_folder(folder)
    written = [folder / "spectra.json"]
    try:
        report.to_json(written[0])
    except OSError as error:
        raise SourceError(f"--output {folder}: {error.strerror or error}") from error
    return [*written, write_page(run_of([report], name), folder / "spectra.html")] if page else written


def check_folder(folder: str | Path) -> Path:
    """Make a folder to write to, before measuring, so that an error costs no measurement.

    Raises:
        SourceError: if it cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise SourceError(f"--output {folder}: there is a file in its place; give a folder") from error
    except OSError as error:
        raise SourceError(f"--output {folder}: {error.strerror or error}") from error
    return Path(folder)


def check_page() -> None:
    """Raise if no page can be written.

    Raises:
        SourceError: if plotly is not installed.
    """
    try:
        plotly_js()
    except ImportError as error:
        raise SourceError(f"{error}; or measure with --no-page") from error


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
