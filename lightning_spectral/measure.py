"""Measure the spectra of a network once: the post-hoc way in, without a Trainer, and what the probe runs."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_spectral.batch import batch_size, take_samples
from lightning_spectral.curvature import Curvatures, Gradients, Problem, curvature_method
from lightning_spectral.errors import MeasurementError, SecondDerivativeError, SpectralWarning, by_cause
from lightning_spectral.fits import noise_floor
from lightning_spectral.kinds import Kind
from lightning_spectral.layers import LayerSelection, MatrixLayer, check_selection, find_layers, matrix_parameters
from lightning_spectral.loss import LossFunction, mute, resolve_loss, stand_ins
from lightning_spectral.quiet import MODES, PRECISIONS, Mode, Precision, copy_batch, quiet, repeatable
from lightning_spectral.record import SpectralReport
from lightning_spectral.spectrum import LayerSpectrum
from lightning_spectral.svd import SingularTriplets, top_singular_triplets


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
    precision: Precision = "float32",
) -> SpectralReport:
    """Gradient spectrum and curvature along it, of every layer, for one loss on one batch.

    Per layer with gradient G = U diag(sigma) V^T: sigma_k, h_k = vec(u_k v_k^T)^T H vec(u_k v_k^T) for the Hessian
    block H of the layer, and the fits of `LayerSpectrum`. The model is left exactly as it was: its parameters,
    buffers, ``.grad``, metrics and counters, and all random states.

    Args:
        model: any module, a LightningModule included. A loss_fn must use the module it is given, a copy,
            and not this one.
        batch: what the loss takes, on the model's device.
        loss_fn: (model, batch) -> scalar. None: ``model.spectral_loss(batch)``, else ``model.training_step(batch, 0)``.
        top_k: directions per layer, K.
        curvature: "exact", double backward, a product per layer and direction; "ggn", Gauss-Newton of all layers at
            once; "sketch", a product per direction for all layers, with standard errors; "auto", the fastest of them
            that gives the Hessian's curvature.
        layers: glob patterns on names, or a callable (`MatrixLayer` -> bool); None: all matrices but embeddings.
        kinds: glob pattern -> kind of layer, where the inferred one is wrong.
        fused_qkv: glob patterns of projections that hold query, key and value in equal blocks of rows, to be measured
            apart; or pattern -> their three numbers of rows. `nn.MultiheadAttention` is split by itself.
        mode: "eval" or "train": BatchNorm's statistics and dropout as there.
        max_samples: measure on the first so many samples of the batch.
        precision: "float32" or "float64", the lowest precision to compute in; half-precision weights are raised.

    Returns:
        The report. Layers that could not be measured hold NaN and say why in their ``note``; each is warned about.

    Raises:
        ValueError: for an option out of range, a pattern that matches nothing, a model without matrices or loss.
        MeasurementError: if the loss is not a finite scalar with a gradient, or nothing could be measured.
        SecondDerivativeError: if no layer could, for an operation without second derivative.

    Source: arXiv 2606.02596.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    >>> batch = torch.randn(64, 8), torch.randn(64, 8)
    >>> report = measure_spectra(model, batch, lambda m, b: torch.nn.functional.mse_loss(m(b[0]), b[1]), top_k=5)
    >>> report.layers["0.weight"].h.shape
    torch.Size([5])
    """
    report = measure_quietly(
        model,
        batch,
        loss_fn,
        top_k=top_k,
        curvature=curvature,
        layers=layers,
        kinds=kinds,
        fused_qkv=fused_qkv,
        mode=mode,
        max_samples=max_samples,
        precision=precision,
    )
    for text in report.problems():
        warnings.warn(text, SpectralWarning, stacklevel=2)
    return report


def measure_quietly(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction | None = None,
    *,
    top_k: int,
    curvature: str,
    layers: LayerSelection,
    kinds: Mapping[str, Kind] | None,
    fused_qkv: Sequence[str] | Mapping[str, Sequence[int]],
    mode: Mode,
    max_samples: int | None,
    precision: Precision,
    batch_idx: int = 0,
) -> SpectralReport:
    """`measure_spectra` without warnings, for callers that read the report's ``failed`` and ``warnings`` themselves.

    Args:
        batch_idx: what training_step is told; the rest as in `measure_spectra`.
    """
    started = time.perf_counter()
    check_options(top_k=top_k, curvature=curvature, mode=mode, max_samples=max_samples, precision=precision)
    check_selection("layers", layers)
    check_selection("fused_qkv", fused_qkv, only_patterns=True)
    model = unwrapped(model)
    found = find_layers(model, layers=layers, kinds=kinds, fused_qkv=fused_qkv)
    if not found.layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(found.skipped.items())[:4])
        raise ValueError(f"layers: no layer is left to measure ({reasons})")
    if max_samples is not None:
        batch = take_samples(batch, max_samples)
    method = curvature_method(curvature)
    with _problem(model, batch, loss_fn, found.layers, mode, precision, batch_idx) as (problem, notes):
        gradients = problem.gradients(keep_graph=method.differentiates_gradients)
        triplets, failed = _triplets(problem, gradients, top_k)
        usable = {name: t.first(_usable(problem, name, t)) for name, t in triplets.items()}
        measured = method(problem, {name: t for name, t in usable.items() if len(t)})
    failed |= measured.failed
    if len(failed) == len(found.layers):
        error = SecondDerivativeError if measured.failed or gradients.failed else MeasurementError
        raise error("; ".join(by_cause(failed)))
    return SpectralReport(
        layers={name: _spectrum(problem, name, triplets.get(name), measured, failed) for name in found.layers},
        skipped=found.skipped,
        loss=problem.loss,
        n_samples=batch_size(batch),
        curvature=curvature,
        mode=mode,
        precision=precision,
        top_k=top_k,
        seconds=time.perf_counter() - started,
        warnings=(*notes, *_casts(problem), *measured.notes),
        chosen=measured.chosen,
        check_error=measured.check_error,
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
    check_options(curvature=method, mode=mode, precision=precision)
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
    with _problem(model, batch, loss_fn, chosen, mode, precision) as (problem, _):
        measured = curvature_method(method)(problem, directions)
    if measured.failed:
        raise SecondDerivativeError("; ".join(by_cause(measured.failed)))
    return measured.h


def check_options(
    *,
    curvature: str,
    mode: str,
    precision: str,
    top_k: int = 1,
    max_samples: int | None = None,
) -> None:
    """Raise ValueError for an option out of range, with its name and what it may be."""
    curvature_method(curvature)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    if not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k must be a whole number of at least 1, got {top_k!r}")
    if max_samples is not None and (not isinstance(max_samples, int) or max_samples < 1):
        raise ValueError(f"max_samples must be None or a whole number of at least 1, got {max_samples!r}")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside a DistributedDataParallel or DataParallel wrapper."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return model.module if isinstance(model, wrappers) else model


@contextmanager
def _problem(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction | None,
    layers: Mapping[str, MatrixLayer],
    mode: Mode,
    precision: Precision,
    batch_idx: int = 0,
) -> Iterator[tuple[Problem, list[str]]]:
    """The loss on a shadow of the model, ready to be differentiated; all traces are gone at the end."""
    loss = resolve_loss(model, loss_fn, batch_idx)
    replaced = stand_ins(model)
    with quiet(model, mode=mode, precision=precision, stand_ins=replaced) as shadow:
        mute(shadow.module, model, replaced)
        parameters = dict(shadow.module.named_parameters(remove_duplicate=False))
        leaves = {name: parameters[layer.parameter] for name, layer in layers.items()}
        notes = [f"{path} cannot be copied and is shared with the probe ({why})" for path, why in shadow.shared.items()]
        evaluate = repeatable(lambda: loss(shadow.module, copy_batch(batch, precision)), shadow.module)
        yield Problem(evaluate, layers, leaves, batch_size(batch)), notes


def _triplets(problem: Problem, gradients: Gradients, top_k: int) -> tuple[dict[str, SingularTriplets], dict[str, str]]:
    triplets, failed = {}, {}
    for name, gradient in gradients.values.items():
        layer = problem.layers[name]
        if gradient is None and name in gradients.failed:
            failed[name] = gradients.failed[name]
            continue
        if gradient is None:
            failed[name] = (
                "the loss does not depend on it; a loss_fn must use the module it is given, "
                "and checkpointing needs use_reentrant=False"
            )
            continue
        try:
            triplets[name] = top_singular_triplets(layer.to_matrix(gradient.detach()), top_k, groups=layer.groups)
        except RuntimeError as error:
            failed[name] = f"its gradient has no singular values: {error}"
    return triplets, failed


def _usable(problem: Problem, name: str, triplets: SingularTriplets) -> int:
    """How many directions lie above the noise floor: no product is spent on rounding noise."""
    layer = problem.layers[name]
    return int((triplets.sigma > noise_floor(triplets.sigma, layer.shape, layer.groups, _eps(problem, name))).sum())


def _eps(problem: Problem, name: str) -> float:
    """Machine epsilon of a layer's gradient: of its type, or of float32 where the network goes down to that or lower.

    Half precision's own would leave no direction of a wide layer; that it is used is told instead.
    """
    dtypes = [problem.parameters[name].dtype, *([torch.float32] if problem.trace.casts else [])]
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _casts(problem: Problem) -> list[str]:
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in problem.trace.casts))
    return [f"the network casts to {names} by itself, and nothing measured is more precise than that"] if names else []


def _spectrum(
    problem: Problem, name: str, triplets: SingularTriplets | None, measured: Curvatures, failed: Mapping[str, str]
) -> LayerSpectrum:
    sigma = torch.zeros(0, dtype=torch.float64) if triplets is None else triplets.sigma.detach().cpu().double()
    h = torch.full_like(sigma, float("nan"))
    if name in measured.h:
        h[: len(measured.h[name])] = measured.h[name]
    stderr = torch.zeros_like(h)
    if name in measured.stderr:
        stderr[: len(measured.stderr[name])] = measured.stderr[name]
    layer = problem.layers[name]
    return LayerSpectrum.from_spectrum(
        sigma,
        h,
        name=name,
        kind=layer.kind,
        shape=layer.shape,
        groups=layer.groups,
        h_stderr=stderr,
        method=measured.methods.get(name, measured.method),
        eps=_eps(problem, name),
        note=failed.get(name, ""),
    )
