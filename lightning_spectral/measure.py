"""Measure the spectra of a network once: the post-hoc way in, without a Trainer, and what the probe runs."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_spectral.batch import FirstSamples, HeldBatches
from lightning_spectral.curvature import Curvatures, Outlook, measure_by
from lightning_spectral.errors import MeasurementError, SecondDerivativeError, SpectralWarning, by_cause
from lightning_spectral.fraction import CurvatureFraction
from lightning_spectral.kinds import Kind
from lightning_spectral.layers import LayerSelection, LayerSet, MatrixLayer, find_layers, matrix_parameters
from lightning_spectral.loss import LossFunction, mute, resolve_loss, stand_ins
from lightning_spectral.memory import Measured, measure_within_memory
from lightning_spectral.options import Options
from lightning_spectral.pieces import Losses
from lightning_spectral.processes import Alone, Together, owners_of
from lightning_spectral.quiet import Beginning, Mode, Precision, RandomStates, copy_batch, quiet
from lightning_spectral.record import SpectralReport
from lightning_spectral.sharding import whole_parameters
from lightning_spectral.spectrum import LayerSpectrum
from lightning_spectral.svd import SingularTriplets
from lightning_spectral.weights import WeightSpectrum

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
    processes = Alone() if process_group is None else Together(process_group)
    batches = processes.agreed(lambda: _batches(batch, n_batches, model))
    report = measure_quietly(model, batches, options, loss_fn, processes=processes)
    for text in report.problems():
        warnings.warn(text, SpectralWarning, stacklevel=2)
    return report


def measure_quietly(
    model: nn.Module,
    batches: Sequence[Any],
    options: Options,
    loss_fn: LossFunction | None = None,
    *,
    batch_idx: int = 0,
    processes: Alone | None = None,
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
    processes = processes or Alone()
    with ExitStack() as stack:
        network = unwrapped(model)
        whole = whole_parameters(network, processes)

        def begin() -> _Begun:
            return stack.enter_context(_begun(network, batches, options, loss_fn, batch_idx, whole))

        begun = processes.agreed(begin)
        losses, layers = begun.losses, begun.found.layers
        told = processes.gathered((list(layers), losses.sizes))
        _check_parts(told)
        processes.agreed(partial(begun.take, _first_buffers(begun.module, processes)))
        losses.among([sizes for _, sizes in told], processes.rank)
        measured = measure_within_memory(losses, options, processes)
        failed, curvatures = measured.failed, measured.curvatures
        if len(failed) == len(layers):
            error = SecondDerivativeError if curvatures.failed else MeasurementError
            raise error("; ".join(by_cause(failed)))
        mine = processes.agreed(lambda: _spectra(losses, measured, options, processes))
        others = {name: spectrum for part in processes.gathered(mine) for name, spectrum in part.items()}
        spectra = {name: others[name] for name in layers}
        notes = list(dict.fromkeys(note for part in processes.gathered(begun.notes) for note in part))
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
        warnings=(*notes, *losses.notes(), *curvatures.notes, *_left_out(measured, spectra, curvatures.notes)),
        chosen=curvatures.chosen,
        check_error=curvatures.check_error,
    )


@dataclass(frozen=True, eq=False)
class _Begun:
    """A loss ready to be measured: which layers, and what to tell."""

    losses: Losses
    module: nn.Module
    found: LayerSet
    notes: list[str]

    def take(self, buffers: Mapping[str, Tensor]) -> None:
        self.losses.beginning.take(self.module, buffers)


@contextmanager
def _begun(
    model: nn.Module,
    batches: Sequence[Any],
    options: Options,
    loss_fn: LossFunction | None,
    batch_idx: int,
    whole: Mapping[int, nn.Parameter],
) -> Iterator[_Begun]:
    found = find_layers(model, layers=options.layers, kinds=options.kinds, fused_qkv=options.fused_qkv)
    if not found.layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(found.skipped.items())[:4])
        raise ValueError(f"layers: no layer is left to measure ({reasons})")
    if options.max_samples is not None:
        batches = FirstSamples(batches, options.max_samples)
    with _losses(model, batches, loss_fn, found.layers, options.mode, options.precision, batch_idx, whole) as (
        losses,
        module,
        notes,
    ):
        yield _Begun(losses, module, found, notes)


def _first_buffers(module: nn.Module, processes: Alone) -> dict[str, Tensor]:
    """The first process's buffers: DDP gives them to all with the next step, and until then they differ."""
    if processes.size == 1:
        return {}
    own = {
        name: buffer
        for name, buffer in module.named_buffers()
        if not isinstance(buffer, nn.UninitializedBuffer) and buffer.layout is torch.strided
    }
    found = processes.shared({n: [b] for n, b in own.items()} if processes.rank == 0 else {}, dict.fromkeys(own, 0))
    return {name: tensors[0] for name, tensors in found.items()}


def _check_parts(told: Sequence[tuple[list[str], list[int | None]]]) -> None:
    """Raise, in all processes alike, if their parts make no whole."""
    names = told[0][0]
    for rank, (others, _) in enumerate(told):
        if others != names:
            apart = ", ".join(sorted(set(names) ^ set(others))[:4]) or "in another order"
            raise MeasurementError(
                f"process {rank} measures other layers than process 0 ({apart}); all must hold the same network and "
                "options"
            )
    if not any(size != 0 for _, sizes in told for size in sizes):
        raise MeasurementError(NO_SAMPLE)


def _spectra(losses: Losses, measured: Measured, options: Options, processes: Alone) -> dict[str, LayerSpectrum]:
    """The spectra and fits of the layers that fall to this process."""
    owners = owners_of({name: layer.decomposition_cost for name, layer in losses.layers.items()}, processes.size)
    mine = [name for name, owner in owners.items() if owner == processes.rank]
    weights = losses.weights() if options.weight_spectra else {}
    return {name: _spectrum(losses, name, measured, options, weights.get(name)) for name in mine}


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
    whole_parameters(model, Alone())
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
    with _losses(model, [batch], loss_fn, chosen, mode, precision) as (losses, _, _):
        pieces = losses.whole()
        if not pieces:
            raise MeasurementError(NO_SAMPLE)
        measured = measure_by(
            method,
            lambda: Outlook.of(losses.problem(pieces[0]), directions),
            lambda m: losses.curvatures(m, pieces, directions),
        )
    if measured.failed:
        raise SecondDerivativeError("; ".join(by_cause(measured.failed)))
    return measured.h


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside a DistributedDataParallel or DataParallel wrapper."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return model.module if isinstance(model, wrappers) else model


def first_batches(
    loader: DataLoader[Any], n: int, model: nn.Module, prepare: Callable[[Any], Any] = lambda batch: batch
) -> list[Any]:
    """The first n batches of a loader, prepared.

    The loader may be in use: a copy of it is iterated, and all generators that it draws from are put back.
    """
    states = RandomStates(model)
    own = [(generator, generator.get_state()) for generator in _generators(loader)]
    loader = copy.copy(loader)
    # What a loader with persistent workers is in the middle of.
    loader._iterator = None
    try:
        found = [prepare(batch) for batch in islice(loader, n)]
    finally:
        states.restore()
        for generator, state in own:
            generator.set_state(state)
    if len(found) < n:
        raise ValueError(f"n_batches: {n} batches were asked for, and the DataLoader has {len(found)}")
    return found


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators of a loader and of its samplers."""
    samplers = [getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    samplers.append(getattr(samplers[1], "sampler", None))
    found = [getattr(part, "generator", None) for part in (loader, *samplers)]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def _batches(batch: Any, n_batches: int, model: nn.Module) -> Sequence[Any]:
    if not isinstance(n_batches, int) or n_batches < 1:
        raise ValueError(f"n_batches must be a whole number of at least 1, got {n_batches!r}")
    if isinstance(batch, DataLoader):
        device = next((parameter.device for parameter in model.parameters()), None)
        return HeldBatches(first_batches(batch, n_batches, model), device)
    if n_batches > 1:
        raise ValueError(f"n_batches={n_batches} needs a DataLoader as batch, got {type(batch).__name__}")
    return [batch]


@contextmanager
def _losses(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: LossFunction | None,
    layers: Mapping[str, MatrixLayer],
    mode: Mode,
    precision: Precision,
    batch_idx: int = 0,
    whole: Mapping[int, nn.Parameter] | None = None,
) -> Iterator[tuple[Losses, nn.Module, list[str]]]:
    """The loss on a shadow of the model, ready to be differentiated; all traces are gone at the end."""
    loss = resolve_loss(model, loss_fn, batch_idx)
    replaced = stand_ins(model)
    with quiet(model, mode=mode, precision=precision, stand_ins=replaced | dict(whole or {})) as shadow:
        mute(shadow.module, model, replaced)
        parameters = dict(shadow.module.named_parameters(remove_duplicate=False))
        leaves = {name: parameters[layer.parameter] for name, layer in layers.items()}
        notes = [f"{path} cannot be copied and is shared with the probe ({why})" for path, why in shadow.shared.items()]
        yield (
            Losses(
                lambda batch: loss(shadow.module, copy_batch(batch, precision)),
                batches,
                layers,
                leaves,
                Beginning(shadow.module),
            ),
            shadow.module,
            notes,
        )


def _unaligned(spectra: Mapping[str, LayerSpectrum]) -> list[str]:
    """What of the alignment that was asked for is not there, beside the layers that were not measured at all."""
    missing = {
        name: f"no alignment: {x.alignment_note}" for name, x in spectra.items() if x.alignment_note and not x.note
    }
    partly = {name: f"alignment: {x.alignment.note}" for name, x in spectra.items() if x.alignment and x.alignment.note}
    return by_cause(missing | partly)


def _spectrum(losses: Losses, name: str, measured: Measured, options: Options, weights: Tensor | None) -> LayerSpectrum:
    layer, eps = losses.layers[name], losses.eps(name)
    curvatures, factored = measured.curvatures, measured.alignment
    triplets, nothing = measured.triplets.get(name), torch.zeros(0, dtype=torch.float64)
    sigma = nothing if triplets is None else triplets.sigma
    h, stderr = torch.full(sigma.shape, float("nan"), dtype=torch.float64), torch.zeros(len(sigma), dtype=torch.float64)
    if name in curvatures.h:
        h[: len(curvatures.h[name])] = curvatures.h[name]
    if name in curvatures.stderr:
        stderr[: len(curvatures.stderr[name])] = curvatures.stderr[name]
    why = factored.notes.get(name) or measured.failed.get(name) or "no direction above the noise floor"
    spectrum = LayerSpectrum.from_spectrum(
        sigma,
        h,
        name=name,
        kind=layer.kind,
        shape=layer.shape,
        groups=layer.groups,
        h_stderr=stderr,
        method=curvatures.methods.get(name, curvatures.method),
        eps=eps,
        note=measured.failed.get(name, ""),
        spectrum=measured.spectra.get(name, nothing),
        bootstrap=options.bootstrap,
        factors=factored.factors.get(name),
        alignment_note=why if options.alignment and name not in factored.factors else "",
        per_sample=factored.per_sample,
    )
    if weights is not None:
        of_weights = WeightSpectrum.of(weights, top_k=options.top_k, groups=layer.groups, eps=eps)
        spectrum = replace(spectrum, weights=of_weights)
    return replace(spectrum, fraction=_fraction(spectrum, measured.traces)) if options.curvature_fraction else spectrum


def _fraction(spectrum: LayerSpectrum, traces: Curvatures) -> CurvatureFraction:
    if spectrum.name not in traces.h:
        return CurvatureFraction.missing(traces.failed.get(spectrum.name, spectrum.note))
    return CurvatureFraction.of(
        traces.h[spectrum.name],
        spectrum.h,
        shape=spectrum.shape,
        h_stderr=spectrum.h_stderr,
        note=traces.failed.get(spectrum.name, ""),
    )


def _left_out(measured: Measured, spectra: Mapping[str, LayerSpectrum], told: Sequence[str]) -> list[str]:
    """What was measured on request could not be had of which layers, beside what the layers' own notes say."""
    no_weights = {n: x.weights.note for n, x in spectra.items() if x.weights is not None and x.weights.note}
    return [
        *(note for note in measured.traces.notes if note not in told),
        *(f"curvature_fraction: {text}" for text in by_cause(measured.traces.failed)),
        *(f"spectrum_top_k: {text}" for text in by_cause(measured.shorter)),
        *(f"weight_spectra: {text}" for text in by_cause(no_weights)),
        *_unaligned(spectra),
    ]
