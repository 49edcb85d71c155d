"""Measured exponents, from a report to optimizers with alpha="probe": `SpectralNewton`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_spectral._messages import join_names
from lightning_spectral.layers.matrices import MatrixLayer, find_layers
from lightning_spectral.optim.measured_alpha import MeasuredAlpha
from lightning_spectral.optim.spectral_newton import SpectralNewton
from lightning_spectral.options import Options
from lightning_spectral.records.log_keys import ALPHA_KEY
from lightning_spectral.records.report import SpectralReport


def probe_alpha_optimizers(trainer: Any) -> list[SpectralNewton]:
    """Return the Trainer's optimizers with alpha="probe", after letting each know that a probe measures it."""
    optimizers = []
    for optimizer in trainer.optimizers:
        # A wrapper keeps its optimizer there; Lightning's wrapper also passes for an instance of its class.
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if isinstance(optimizer, SpectralNewton) and optimizer.takes_alpha:
            optimizer.expect_alpha()
            optimizers.append(optimizer)
    return optimizers


def transfer_alphas(
    report: SpectralReport | None,
    optimizers: Sequence[SpectralNewton],
    module: nn.Module,
    options: Options,
    logged: Callable[[Sequence[str]], Sequence[str]],
) -> dict[str, float]:
    """Give the optimizers the exponents to trust of a report, if any, and return logged key -> exponent in use.

    ``logged`` maps the names of all layers to those logged one by one.
    """
    if not optimizers:
        return {}
    layers = _measured_layers(module, options)
    alphas = {} if report is None else {name: report.layers[name].alpha.exponent for name in report.trusted}
    write_alphas(optimizers, module, layers, alphas)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    exponents: dict[str, float] = {}
    for name in logged(list(layers)):
        used = [optimizer.alpha_of(parameters[layers[name].parameter], layers[name].rows) for optimizer in optimizers]
        exponents |= {ALPHA_KEY.replace("<layer>", name): alpha for alpha in used if alpha is not None}
    return exponents


def warn_of_unmeasured(
    optimizers: Sequence[SpectralNewton], module: nn.Module, options: Options, warn: Callable[[str], None]
) -> None:
    """Warn of parameters of alpha="probe" that the options leave unmeasured."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    measured = {id(parameters[layer.parameter]) for layer in _measured_layers(module, options).values()}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups if group.get("alpha") == "probe"]
    steps = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
    left = [names.get(id(x), "a parameter outside the module") for x in steps if id(x) not in measured]
    if left:
        warn(
            f"alpha='probe': {join_names(left)} are not measured, so their alpha stays as it is; choose them with "
            "layers, or leave them to AdamW"
        )


def _measured_layers(module: nn.Module, options: Options) -> dict[str, MatrixLayer]:
    try:
        return find_layers(module, layers=options.layers, kinds=options.kinds, fused_qkv=options.fused_qkv).layers
    except Exception:
        # The measurement fails for the same reason, and warns.
        return {}


def write_alphas(
    optimizers: Iterable[SpectralNewton],
    module: nn.Module,
    layers: Mapping[str, MatrixLayer],
    alphas: Mapping[str, float],
) -> None:
    """Set the exponents, by layer, of the layers' parameters, matched by identity, in every optimizer."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    measured: dict[Any, list[MeasuredAlpha]] = {}
    for name, alpha in alphas.items():
        if layer := layers.get(name):
            measured.setdefault(parameters[layer.parameter], []).append(MeasuredAlpha(alpha, layer.rows))
    for optimizer in optimizers:
        optimizer.set_alpha(measured)
