"""Measure the spectra of a network once: the post-hoc way in, without a Trainer, and what the probe runs."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_spectral._messages import group_by_reason
from lightning_spectral.curvature import LossProperties, measure_by
from lightning_spectral.distributed.process_group import DistributedGroup, SingleProcess
from lightning_spectral.errors import MeasurementError, SecondDerivativeError, SpectralWarning
from lightning_spectral.layers.kinds import Kind
from lightning_spectral.layers.matrices import LayerSelection, find_layers, matrix_parameters
from lightning_spectral.measurement.fitting import left_out, spectra_of
from lightning_spectral.measurement.loader_batches import batches_of
from lightning_spectral.measurement.loss import LossFunction
from lightning_spectral.measurement.memory import measure_within_memory
from lightning_spectral.measurement.setup import Prepared, first_buffers, losses_of, prepared, unwrapped
from lightning_spectral.measurement.sharded.on_demand_weights import whole_weights
from lightning_spectral.numerics.svd import SingularTriplets
from lightning_spectral.options import PRECISIONS, Mode, Options, Precision
from lightning_spectral.records.report import SpectralReport

if TYPE_CHECKING:
    # Not in every build of torch.
    from torch.distributed import ProcessGroup

NO_SAMPLE = "there is no sample to measure: the batch is empty"


def measure_spectra(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction | None = None,
    *,
    top_k: int = 20,
    curvature: str = "auto",
    layers: LayerSelection = None,
    kinds: Mapping[str, Kind] | None = None,
    fused_qkv: Sequence[str] | Mapping[str, Sequence[int]] = (),
    mode: Mode = "eval",
    max_samples: int | None = None,
    n_batches: int = 1,
    micro_batch_size: int | None = None,
    precision: Precision = "float32",
    spectrum_top_k: int | None = None,
    weight_spectra: bool = False,
    bootstrap: int | None = None,
    curvature_fraction: int | None = None,
    alignment: bool = False,
    process_group: ProcessGroup | None = None,
) -> SpectralReport:
    """Gradient spectrum and curvature along it, of every layer, for one loss on one batch.

    Per layer with gradient G = U diag(sigma) V^T: sigma_k, h_k = vec(u_k v_k^T)^T H vec(u_k v_k^T) for the Hessian
    block H of the layer, and the fits of `LayerSpectrum`. The model is left exactly as it was: its parameters,
    buffers, ``.grad``, metrics and counters, and all random states.

    Args:
        model: any module, a LightningModule included. A loss_fn must use the module it is given, a copy,
            and not this one.
        batch: what the loss takes, on the model's device; or a DataLoader of such batches, on any device.
        loss_fn: (model, batch) -> scalar. None: ``model.spectral_loss(batch)``, else ``model.training_step(batch, 0)``.
        top_k: directions per layer, K.
        curvature: "exact", double backward, a product per layer and direction; "ggn", Gauss-Newton of all layers at
            once; "sketch", products for all layers and several directions of each, with standard errors; "auto", the
            fastest of them that gives the Hessian's curvature.
        layers: glob patterns on names, or a callable (`MatrixLayer` -> bool); None: all matrices but embeddings.
        kinds: glob pattern -> kind of layer, where the inferred one is wrong.
        fused_qkv: glob patterns of projections that hold query, key and value in equal blocks of rows, to be measured
            apart; or pattern -> their three numbers of rows. `nn.MultiheadAttention` is split by itself.
        mode: "eval" or "train": BatchNorm's statistics and dropout as there.
        max_samples: measure on the first so many samples of each batch.
        n_batches: of a DataLoader, average gradient and curvature over its first so many batches, by samples.
        micro_batch_size: samples whose graph is in memory at once; None: as many as keep the peak within about three
            times a training step's, where the loss of a batch is a mean or sum of those of its parts.
        precision: "float32" or "float64", the lowest precision to compute in; half-precision weights are raised.
        spectrum_top_k: singular values that the rank models are fitted to; None: top_k. They cost no curvature.
        weight_spectra: take the singular values of each weight matrix, too (`WeightSpectrum`).
        bootstrap: draws for 95 % intervals of alpha, gamma and s (`Intervals`); None or 0: none.
        curvature_fraction: draws for the trace of each layer's Hessian block, to hold the curvature beside
            (`CurvatureFraction`), a Hessian-vector product each; None or 0: none. With curvature="ggn" the h are
            Gauss-Newton's, the trace is the Hessian's.
        alignment: also take the Kronecker factors of each layer, and split alpha by them (`LayerAlignment`).
        process_group: processes of torch.distributed that each call this with their own batches, of any sizes, and
            with the same model and options. Gradient and curvature are those of the mean over all their batches,
            weighted by samples, and all are given the same report. None: this process measures alone.

    Returns:
        The report. Layers that could not be measured hold NaN and say why in their ``note``; each is warned about.

    Raises:
        ValueError: for an option out of range, a pattern that matches nothing, a model without matrices or loss.
        MeasurementError: if the loss is not a finite scalar with a gradient, or nothing could be measured.
        ProcessError: in all processes of a group, if one of them failed in any other way.
        SecondDerivativeError: if no layer could, for an operation without second derivative.

    Source: arXiv 2606.02596.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    >>> batch = torch.randn(64, 8), torch.randn(64, 8)
    >>> report = measure_spectra(model, batch, lambda m, b: torch.nn.functional.mse_loss(m(b[0]), b[1]), top_k=5)
    >>> report.layers["0.weight"].h.shape
    torch.Size([5])
    """
    options = Options(
        top_k=top_k,
        curvature=curvature,
        layers=layers,
        kinds=kinds,
        fused_qkv=fused_qkv,
        mode=mode,
        max_samples=max_samples,
        micro_batch_size=micro_batch_size,
        precision=precision,
        spectrum_top_k=spectrum_top_k,
        weight_spectra=weight_spectra,
        bootstrap=bootstrap,
        curvature_fraction=curvature_fraction,
        alignment=alignment,
    )
    processes = SingleProcess() if process_group is None else DistributedGroup(process_group)
    batches = processes.call_everywhere(lambda: batches_of(batch, n_batches, model))
    report = run_measurement(model, batches, options, loss_fn, processes=processes)
    for text in report.problems():
        warnings.warn(text, SpectralWarning, stacklevel=2)
    return report


def run_measurement(
    model: nn.Module,
    batches: Sequence[Any],
    options: Options,
    loss_fn: LossFunction | None = None,
    *,
    batch_idx: int = 0,
    processes: SingleProcess | None = None,
) -> SpectralReport:
    """`measure_spectra` without warnings, for callers that read the report's ``failed`` and ``warnings`` themselves.

    Args:
        model, loss_fn: as there.
        batches: one or more; gradient and curvature are those of the mean of their losses, weighted by samples.
        options: what to measure and how.
        batch_idx: what training_step is told.
        processes: that measure together, each with its own batches, of which there may be none; None: this one alone.
    """
    started = time.perf_counter()
    processes = processes or SingleProcess()
    with ExitStack() as stack:
        network = unwrapped(model)
        whole = stack.enter_context(whole_weights(network, processes, PRECISIONS[options.precision]))

        def begin() -> Prepared:
            return stack.enter_context(prepared(network, batches, options, loss_fn, batch_idx, whole))

        begun = processes.call_everywhere(begin)
        losses, layers = begun.losses, begun.found.layers
        told = processes.all_gather_object((list(layers), options.settings))
        _check_alike(told)
        sizes = processes.all_gather_object(losses.sizes)
        if not any(size != 0 for of_process in sizes for size in of_process):
            raise MeasurementError(NO_SAMPLE)
        processes.call_everywhere(partial(begun.take, first_buffers(begun.module, processes)))
        losses.among(sizes, processes.rank)
        measured = measure_within_memory(losses, options, processes)
        failed, curvatures = measured.failed, measured.curvatures
        if len(failed) == len(layers):
            error = SecondDerivativeError if curvatures.failed else MeasurementError
            raise error("; ".join(group_by_reason(failed)))
        mine = processes.call_everywhere(lambda: spectra_of(losses, measured, options, processes))
        others = {name: spectrum for part in processes.all_gather_object(mine) for name, spectrum in part.items()}
        spectra = {name: others[name] for name in layers}
        notes = list(dict.fromkeys(note for part in processes.all_gather_object(begun.notes) for note in part))
    return SpectralReport(
        layers=spectra,
        skipped=begun.found.skipped,
        loss=measured.loss,
        n_samples=losses.samples,
        n_batches=len(losses.all_sizes),
        micro_batch_size=measured.most,
        curvature=options.curvature,
        mode=options.mode,
        precision=options.precision,
        top_k=options.top_k,
        spectrum_top_k=options.spectrum_top_k or options.top_k,
        seconds=time.perf_counter() - started,
        warnings=(*notes, *losses.notes(), *curvatures.notes, *left_out(measured, spectra, curvatures.notes)),
        chosen=curvatures.chosen,
        check_error=curvatures.check_error,
    )


def _check_alike(told: Sequence[tuple[list[str], dict[str, Any]]]) -> None:
    """Raise, in all processes alike, if they are not to measure the same."""
    names, settings = told[0]
    for rank, (others, other_settings) in enumerate(told):
        if others != names:
            apart = ", ".join(sorted(set(names) ^ set(others))[:4]) or "in another order"
            raise MeasurementError(
                f"process {rank} measures other layers than process 0 ({apart}); all must hold the same network and "
                "options"
            )
        for option, value in settings.items():
            if other_settings[option] != value:
                raise MeasurementError(
                    f"{option}: process {rank} has {other_settings[option]!r}, and process 0 has {value!r}; all must "
                    "have the same"
                )


def directional_curvature(
    model: nn.Module,
    batch: Any,
    directions: Mapping[str, SingularTriplets],
    loss_fn: LossFunction | None = None,
    *,
    method: str = "exact",
    mode: Mode = "eval",
    precision: Precision = "float32",
) -> dict[str, Tensor]:
    """h_k = vec(u_k v_k^T)^T H vec(u_k v_k^T) along given directions, H the Hessian block of one parameter.

    Args:
        model, batch, loss_fn, mode, precision: as in `measure_spectra`.
        directions: parameter name -> triplets with u (m, K) and v (n, K) for its matrix (m, n): (out, in) of a linear
            layer, (out_channels, in_channels / groups * kernel) of a convolution. sigma is not used. The vectors
            are taken as they are, so h is a Rayleigh quotient where they have unit length.
        method: the curvature method.

    Returns:
        Parameter name -> (K,) curvatures, float64 on the CPU.

    Raises:
        ValueError: for a parameter that does not exist or vectors that do not fit its matrix.
        MeasurementError: as in `measure_spectra`.
        SecondDerivativeError: if a layer's loss has no second derivative.
    """
    Options(curvature=method, mode=mode, precision=precision)
    model = unwrapped(model)
    parts = find_layers(model, layers=lambda layer: True).layers
    whole = matrix_parameters(model)[0]
    by_parameter = {alias: layer for layer in whole.values() for alias in (layer.name, *layer.aliases)} | parts
    unknown = [name for name in directions if name not in by_parameter]
    if unknown:
        raise ValueError(
            f"directions: {', '.join(unknown)} is no trained matrix of the model; it has {', '.join(parts)}"
        )
    chosen = {name: by_parameter[name] for name in directions}
    for name, triplets in directions.items():
        m, n = chosen[name].shape
        if triplets.u.shape != (m, len(triplets)) or triplets.v.shape != (n, len(triplets)):
            raise ValueError(
                f"directions: {name} is a matrix ({m}, {n}), so u must be ({m}, K) and v ({n}, K); "
                f"got {tuple(triplets.u.shape)} and {tuple(triplets.v.shape)}"
            )
    with (
        whole_weights(model, SingleProcess(), PRECISIONS[precision]) as whole_of,
        losses_of(model, [batch], loss_fn, chosen, mode, precision, whole=whole_of) as (losses, _, _),
    ):
        pieces = losses.whole()
        if not pieces:
            raise MeasurementError(NO_SAMPLE)
        measured = measure_by(
            method,
            lambda: LossProperties.of(losses.problem(pieces[0]), directions),
            lambda m: losses.curvatures(m, pieces, directions),
        )
    if measured.failed:
        raise SecondDerivativeError("; ".join(group_by_reason(measured.failed)))
    return measured.h
