"""What Spectral Newton is compared with: Muon with AdamW beside it, and AdamW with a learning rate per layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_spectral import SpectralNewton, SpectralProbe
from lightning_spectral.optim.placement import blocks


class MuonWithAdamW(Optimizer):
    """`torch.optim.Muon` for the matrices that `SpectralNewton` would take, `torch.optim.AdamW` for the rest.

    Muon takes parameters of two dimensions only: kernels are given to it flattened, fused qkv projections in three
    parts, all as views. With update sizes of AdamW ("match_rms_adamw"), one learning rate serves both. Each step wraps
    torch's two optimizers around the state kept here, which therefore saves, loads and moves as any optimizer's.

    Args:
        params: what `groups` gives.
        lr: learning rate.
        momentum: of Muon.
        betas: of AdamW.
        weight_decay: decoupled, times lr.

    Raises:
        ValueError: if params are not from `groups`, for nothing else says what is a hidden matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "betas": tuple(betas), "weight_decay": weight_decay, "update": ""}
        )
        if not all(group["update"] for group in self.param_groups):
            raise ValueError("MuonWithAdamW needs to know the hidden matrices; pass MuonWithAdamW.groups(model)")

    groups = staticmethod(SpectralNewton.groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both; the closure, if any, is called first with gradients on."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["update"] == "adamw":
                self._adamw(group)
            else:
                self._muon(group)
        return loss

    def _adamw(self, group: dict[str, Any]) -> None:
        adamw = AdamW(group["params"], lr=group["lr"], betas=group["betas"], weight_decay=group["weight_decay"])
        for parameter in group["params"]:
            adamw.state[parameter] = self.state[parameter]
        adamw.step()

    def _muon(self, group: dict[str, Any]) -> None:
        pieces: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for parameter, layout in zip(group["params"], group["layouts"], strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            tensors = (parameter.detach(), parameter.grad, state["momentum_buffer"])
            for weight, grad, buffer in zip(*(blocks(tensor, layout) for tensor in tensors), strict=True):
                # A view and never a copy, which would leave the parameter as it was.
                pieces.append((nn.Parameter(_matrix(weight)), _matrix(grad), _matrix(buffer)))
        if not pieces:
            return
        # Of torch 2.9 and later; what else is here needs it not.
        from torch.optim import Muon

        muon = Muon(
            [weight for weight, _, _ in pieces],
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            adjust_lr_fn="match_rms_adamw",
        )
        for weight, grad, buffer in pieces:
            weight.grad = grad
            muon.state[weight]["momentum_buffer"] = buffer
        muon.step()


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.view(tensor.shape[0], -1)


class LayerRateAdamW(AdamW):
    """AdamW in which a group's rate is ``lr`` times its ``scale``, whatever a scheduler makes of ``lr``.

    Its groups are one for each matrix that `SpectralNewton` would take, named by the parameter, and one for the rest.

    Args:
        params: what `groups` gives.
        lr: learning rate.
        betas: decay rates of the two averages.
        weight_decay: decoupled, times lr and scale.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, lr=lr, betas=tuple(betas), weight_decay=weight_decay)
        for group in self.param_groups:
            group.setdefault("scale", 1.0)

    @staticmethod
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        """A group per matrix, and "rest"."""
        found, rest = [], []
        for group in SpectralNewton.groups(model):
            if group["update"] == "adamw":
                rest += group["params"]
                continue
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                found.append({"name": name, "params": [parameter]})
        return [*found, {"name": "rest", "params": rest}] if rest else found

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """AdamW's, with each group's rate scaled for its length."""
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = group["lr"] * group["scale"]
        try:
            return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate


class ScaleRates(SpectralProbe):
    """A `SpectralProbe` that sets each layer's scale in `LayerRateAdamW` to a power of its s, over the layers' mean.

    This is the negative control of arXiv 2606.02596: what the spectrum says of a layer, put into a number instead of a
    function of the matrix. A layer whose s is not above 0 keeps its rate.

    Args:
        power: of s.
        shuffled: give each layer the scale of another one, drawn once: a control of the control.
        options: of the probe.
    """

    def __init__(self, *, power: float = 1.0, shuffled: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.power, self.shuffled = power, shuffled

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Probe, if it is time, and scale."""
        before = self.last_report
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        report = self.last_report
        if report is None or report is before:
            return
        decay = {name: layer.s.exponent for name, layer in report.layers.items()}
        for optimizer in trainer.optimizers:
            if not isinstance(optimizer, LayerRateAdamW):
                raise ValueError(f"ScaleRates scales the rates of LayerRateAdamW, got {type(optimizer).__name__}")
            scale_rates(optimizer, permuted(decay) if self.shuffled else decay, power=self.power)


def scale_rates(optimizer: LayerRateAdamW, decay: dict[str, float], *, power: float = 1.0) -> None:
    """Set scale = s^power / mean s^power for the groups named in ``decay`` whose s is above 0."""
    named = {group["name"]: group for group in optimizer.param_groups}
    scales = {name: s**power for name, s in decay.items() if name in named and math.isfinite(s) and s > 0}
    for name, scale in scales.items():
        named[name]["scale"] = scale * len(scales) / sum(scales.values())


def permuted(values: dict[str, float]) -> dict[str, float]:
    """The values under each other's names, always in the same way."""
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0)).tolist()
    found = list(values.values())
    return {name: found[i] for name, i in zip(values, order, strict=True)}
