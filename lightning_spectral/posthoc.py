"""`lightning-spectral measure`: a checkpoint measured without training, as a table, JSON and a page."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lightning_spectral.batch import HeldBatches
from lightning_spectral.measure import measure_quietly
from lightning_spectral.options import Options
from lightning_spectral.record import SpectralReport
from lightning_spectral.report import run_of, write_page
from lightning_spectral.report.page import plotly_js
from lightning_spectral.sources import Checkpoint, SourceError, build_model, first_line, named_loss, read_batches


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
        model: import path, see `lightning_spectral.sources.build_model`.
        data: import path, see `lightning_spectral.sources.read_batches`.
        loss: name of a loss, see `lightning_spectral.sources.named_loss`; None: the module's ``spectral_loss`` or
            ``training_step``.
        checkpoint: file of a Lightning checkpoint or a state dict; None: the weights stay as they are.
        prefix, strict: see `lightning_spectral.sources.Checkpoint.load_into`.
        n_batches: average over so many batches.
        device: such as "cpu" or "cuda:1"; "auto": "cuda" where there is one.
        seed: of whatever is random in the model, the data and the measurement.
        options: what to measure and how.

    Returns:
        The report, with the step and epoch of a Lightning checkpoint; and what was left out of the checkpoint.

    Raises:
        SourceError: if something named cannot be found or loaded.
        ValueError, MeasurementError: as in `lightning_spectral.measure_spectra`.
    """
    loss_fn = named_loss(loss)
    saved = None if checkpoint is None else Checkpoint.read(checkpoint)
    torch.manual_seed(seed)
    network = build_model(model, saved)
    left_out = "" if saved is None else saved.load_into(network, prefix=prefix, strict=strict)
    chosen = _moved(network, device)
    batches = HeldBatches(read_batches(data, n_batches, network), chosen)
    report = measure_quietly(network, batches, options or Options(), loss_fn)
    return (report if saved is None or not saved.place else report.at(**saved.place)), left_out


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
    """Make a folder to write to. What cannot be written is better said before measuring than after it.

    Raises:
        SourceError: if it cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"--output {folder}: {error.strerror or error}") from error
    return Path(folder)


def check_page() -> None:
    """See that a page can be written.

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
        chosen = torch.device(name)
        model.to(chosen)
    except Exception as error:
        # A device that is not there raises what its backend likes.
        raise SourceError(f"--device {device}: {first_line(error)}") from error
    return chosen
