"""Measure the spectra of a network once: the post-hoc way in, without a Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from lightning_spectral._messages import group_by_reason
from lightning_spectral.distributed.process_group import SINGLE_PROCESS, joint_group
from lightning_spectral.errors import SecondDerivativeError, SpectralWarning
from lightning_spectral.layers.kinds import Kind
from lightning_spectral.layers.matrices import LayerSelection, MatrixLayer, find_layers, matrix_parameters
from lightning_spectral.layers.names import unwrapped
from lightning_spectral.measurement.estimation import Evaluation, estimate_curvature
from lightning_spectral.measurement.gradient_samples import batches_to_measure
from lightning_spectral.measurement.loss import LossFunction, resolve_loss
from lightning_spectral.measurement.pipeline import run_measurement
from lightning_spectral.measurement.setup import isolated_copy, set_up_objective
from lightning_spectral.numerics.svd import SingularTriplets
from lightning_spectral.options import Mode, Options, Precision, from_arguments
from lightning_spectral.records.report import SpectralReport

if TYPE_CHECKING:
    # Not in every build of torch.
    from torch.distributed import ProcessGroup


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
    gradient_samples: int | Literal["auto"] | None = None,
    gradient_samples_max: int = 4096,
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
    """Measure the gradient spectrum and the curvature along it, of every layer, for one loss on one batch.

    Per layer with gradient G = U diag(sigma) V^T: sigma_k, h_k = vec(u_k v_k^T)^T H vec(u_k v_k^T) for the Hessian
    block H of the layer, and the fits of `LayerSpectrum`. The model is left exactly as it was: its parameters,
    buffers, ``.grad``, metrics and counters, and all random states.

    Args:
        model: any module, a LightningModule included. A loss_fn must use the module it is given, a copy,
            and not this one.
        batch: what the loss takes, on the model's device; or a DataLoader of such batches, on any device.
        loss_fn: (model, batch) -> scalar. None: ``model.spectral_loss(batch)``, else ``model.training_step(batch, 0)``.
        top_k: directions per layer, K, 3 or more.
        curvature: "exact", double backward, a product per layer and direction; "ggn", Gauss-Newton of all layers at
            once; "sketch", products for all layers and several directions of each, with standard errors; "auto", the
            fastest of them that gives the Hessian's curvature.
        layers: glob patterns on names, or a callable (`MatrixLayer` -> bool); None: all matrices but embeddings.
        kinds: glob pattern -> kind of layer, where the inferred one is wrong.
        fused_qkv: glob patterns of projections that hold query, key and value in equal blocks of rows, to be measured
            apart; or pattern -> their three numbers of rows. `nn.MultiheadAttention` is split by itself.
        mode: "eval" or "train": BatchNorm's statistics and dropout in the measurement.
        max_samples: measure on the first so many samples of each batch; None: on all, or with gradient_samples on 64
            where the loss is a mean or sum of parts. A sketch of fewer than 32 takes more passes the fewer there are.
        gradient_samples: samples whose mean gradient gives sigma, u and v, of which curvature is measured on the first
            max_samples; "auto": as many as leave 5 % of sampling noise in the squared gradient of the median layer;
            None: the same for both.
        gradient_samples_max: most samples that gradient_samples="auto" takes.
        n_batches: of a DataLoader, average gradient and curvature over its first so many batches, by samples.
        micro_batch_size: samples whose graph is in memory at once; None: as many as keep the peak within about three
            times a training step's, if a batch's loss is a mean or sum of parts. Out of memory it is halved, twice.
        precision: "float32" or "float64", the lowest precision to compute in, whatever the weights' or the Trainer's.
        spectrum_top_k: singular values that the rank models are fitted to; None: top_k. They cost no curvature.
        weight_spectra: take the singular values of each weight matrix, too (`WeightSpectrum`).
        bootstrap: draws for 95 % intervals of alpha, gamma and s (`Intervals`); None or 0: none.
        curvature_fraction: draws for the trace of each layer's Hessian block, with curvature="ggn" too, and its
            fraction along the directions (`CurvatureFraction`), a Hessian-vector product each; None or 0: none.
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
    options = from_arguments(Options, locals())
    group = SINGLE_PROCESS if process_group is None else joint_group(process_group)
    batches = batches_to_measure(batch, n_batches, model, options, loss_fn, group)
    report = run_measurement(model, batches, options, loss_fn, n_batches=n_batches, group=group)
    for text in report.problems():
        warnings.warn(text, SpectralWarning, stacklevel=2)
    return report


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
    """Return h_k = vec(u_k v_k^T)^T H vec(u_k v_k^T) along given directions, H the Hessian block of one parameter.

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
    options = Options(curvature=method, mode=mode, precision=precision)
    network = unwrapped(model)
    layers = _layers_of(network, directions)
    with isolated_copy(model, mode, precision, SINGLE_PROCESS) as copy:
        loss = resolve_loss(network, loss_fn)
        objective = set_up_objective(copy, loss, [batch], layers, options, SINGLE_PROCESS)
        micro_batches = objective.full_batches()
        evaluation = Evaluation(objective, micro_batches, objective.differentiable(micro_batches[0]))
        curvatures = estimate_curvature(evaluation, directions, method)
    if curvatures.failed:
        raise SecondDerivativeError("; ".join(group_by_reason(curvatures.failed)))
    return curvatures.h


def _layers_of(model: nn.Module, directions: Mapping[str, SingularTriplets]) -> dict[str, MatrixLayer]:
    parts = find_layers(model, layers=lambda layer: True).layers
    parameters = matrix_parameters(model)[0]
    by_name = {
        alias: layer for layer in parameters.values() for alias in (layer.name, layer.parameter, *layer.aliases)
    } | parts
    unknown = [name for name in directions if name not in by_name]
    if unknown:
        raise ValueError(
            f"directions: {', '.join(unknown)} is no trained matrix of the model; it has {', '.join(parts)}"
        )
    for name, triplets in directions.items():
        m, n = by_name[name].shape
        if triplets.u.shape != (m, len(triplets)) or triplets.v.shape != (n, len(triplets)):
            raise ValueError(
                f"directions: {name} is a matrix ({m}, {n}), so u must be ({m}, K) and v ({n}, K); "
                f"got {tuple(triplets.u.shape)} and {tuple(triplets.v.shape)}"
            )
    return {name: by_name[name] for name in directions}
