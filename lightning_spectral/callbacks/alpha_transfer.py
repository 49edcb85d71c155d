"""From a probe's report to the optimizers that ask for it: alpha="probe" of `SpectralNewton`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.optim.measured_alpha import MeasuredAlpha
from lightning_spectral.optim.spectral_newton import SpectralNewton
from lightning_spectral.records.log_keys import ALPHA_KEY
from lightning_spectral.records.report import SpectralReport

Fits = dict[str, tuple[float, float]]
"""Layer -> (alpha, r2): all that an optimizer takes from a report, and that processes have to agree on."""


def takers(trainer: Any) -> list[SpectralNewton]:
    """The optimizers of a Trainer that take measured exponents. They are told that a probe is there."""
    found = []
    for optimizer in trainer.optimizers:
        # Wrappers keep what they wrap there; Lightning's also passes for an instance of its class.
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if isinstance(optimizer, SpectralNewton) and optimizer.takes_alpha:
            optimizer.expect_alpha()
            found.append(optimizer)
    return found


def fits_of(report: SpectralReport | None) -> Fits:
    """What was measured, failed layers as NaN."""
    return {} if report is None else {x.name: (x.alpha.exponent, x.alpha.r2) for x in report.layers.values()}


def write_alphas(
    optimizers: Iterable[SpectralNewton], module: nn.Module, layers: Mapping[str, MatrixLayer], fits: Fits
) -> None:
    """Set the exponents of the layers' parameters, which are known by identity, in every optimizer."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    measured: dict[Any, list[MeasuredAlpha]] = {}
    for name, (alpha, r2) in fits.items():
        if layer := layers.get(name):
            measured.setdefault(parameters[layer.parameter], []).append(MeasuredAlpha(alpha, r2, layer.rows))
    for optimizer in optimizers:
        optimizer.set_alpha(measured)


def alphas_in_use(
    optimizers: Sequence[SpectralNewton], module: nn.Module, layers: Mapping[str, MatrixLayer]
) -> dict[str, float]:
    """The logged names of the layers that an optimizer holds, with their exponents."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    out: dict[str, float] = {}
    for name, layer in layers.items():
        used = [optimizer.alpha_of(parameters[layer.parameter], layer.rows) for optimizer in optimizers]
        out |= {ALPHA_KEY.replace("<layer>", name): alpha for alpha in used if alpha is not None}
    return out


def unmeasured(optimizers: Iterable[SpectralNewton], module: nn.Module, layers: Mapping[str, MatrixLayer]) -> list[str]:
    """Parameters of alpha="probe" that no layer measured belongs to."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    measured = {id(parameters[layer.parameter]) for layer in layers.values()}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        names.get(id(parameter), "a parameter outside the module")
        for optimizer in optimizers
        for group in optimizer.param_groups
        if group.get("alpha") == "probe"
        for parameter in group["params"]
        if parameter.requires_grad and id(parameter) not in measured
    ]
