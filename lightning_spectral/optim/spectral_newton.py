"""The optimizer: matrices by T(sigma; alpha, d) = sigma / (sigma^alpha + d) of their momentum, the rest by AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, groupby
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_spectral.kinds import Kind
from lightning_spectral.optim.adamw import adamw_state, adamw_step
from lightning_spectral.optim.checkpoint import check_own_state
from lightning_spectral.optim.groups import ADAMW_NAMES, model_groups
from lightning_spectral.optim.matrices import Piece, momentum_step, spectral_step
from lightning_spectral.optim.options import add_missing_options, drop_foreign_options, fill_group, split_group


class SpectralNewton(Optimizer):
    """Spectral Newton for matrices and AdamW for everything else, in one optimizer.

    For a parameter with gradient G, seen as a matrix (m, n), with r = min(m, n):

    - B <- mu B + (1 - mu) G, and M = mu B + (1 - mu) G (Nesterov) or B.
    - M = U diag(sigma) V^T, sigma_hat = sigma sqrt(r) / ||M||_F.
    - X = U diag(T(sigma_hat)) V^T with T(s) = s / (s^alpha + d), computed without an SVD (`spectral_transfer`).
    - W <- (1 - lr weight_decay) W - lr c X, with c = update_rms min(sqrt(m n) / ||X||_F, max_gain sqrt(max(m, n)) /
      ||X||_2): the entries of the step have root mean square lr update_rms, as AdamW's have about 0.2 lr, unless X is
      nearly of rank one.

    alpha = 2 is curvature as the square of the gradient; alpha = 1 and d -> 0 the polar factor U V^T (Muon);
    alpha = 0 SGD with momentum and steps of one size.

    What is a matrix:

    - with `SpectralNewton.groups(model)`: Linear, convolution and attention weights, by kind of layer; embeddings and
      heads, tied ones too, go to AdamW; fused qkv projections are split; a grouped convolution is a matrix per group,
      a depthwise one goes to AdamW.
    - with `model.named_parameters()`: every parameter of two or more dimensions, flattened to (first, rest), whose
      name matches none of ``adamw_names``.
    - with `model.parameters()`, all that LightningCLI gives: every parameter of two or more dimensions. **Embeddings
      and heads then get the matrix update too**, since nothing tells them apart.

    Parameters without names or groups fall into two groups, "spectral" and "adamw". An AdamW group's learning rate is
    its own ``lr``, so that one schedule scales both; schedulers that set absolute rates (OneCycleLR) take a list.

    A gradient with NaN or infinite entries leaves its parameter and its state as they are; `skipped_updates` counts
    them. `p.grad` is never written.

    Args:
        params: parameters, (name, parameter) pairs, or groups. A group may hold any of the options below (AdamW's as
            ``adamw_lr`` and so on) and ``update="spectral"`` or ``"adamw"`` to decide for all of its parameters.
        lr: learning rate of the matrices, in units of AdamW's.
        alpha: exponent, at least 0; "auto": by kind of layer, 2 for convolutions and dense layers, 1 for
            transformer blocks (arXiv 2606.02596), for `SpectralNewton.groups` only.
        damping: d > 0, in units of the root mean square singular value to the power alpha; "auto": 0.03 for transformer
            blocks known from `SpectralNewton.groups`, else 0.1. Smaller values lift weak directions more, which
            noisy labels punish.
        momentum: mu.
        nesterov: whether M looks one step ahead.
        weight_decay: decoupled, times lr.
        update_rms: root mean square entry of an update before lr; null: X as it is.
        max_gain: how many times the spectral norm of a flat update of the same size an update may have.
        tolerance: relative error allowed to X, from 1e-7 to 0.1. With alpha = 2 it only decides when float64 is needed.
        adamw_lr: learning rate of AdamW; null: the group's lr.
        adamw_betas: decay rates of AdamW's two averages.
        adamw_eps: AdamW's epsilon.
        adamw_weight_decay: of the parameters that get AdamW; null: weight_decay.
        adamw_names: glob patterns of matrices that go to AdamW, given `model.named_parameters()`: those with a dot
            match the full name, others one of its last two parts (``head`` in ``decoder.head.weight``). Null: usual
            names of embeddings and heads.
        capturable: keep counts on the device and read nothing back from it, for CUDA graphs; takes alpha up to 2. No
            update is then redone in float64, and one that has no factorisation is skipped and counted.

    Raises:
        ValueError: if an option is out of range, or a parameter is complex, sharded or not initialised.
        RuntimeError: at a step, if a gradient is sparse.

    Source: arXiv 2606.02596 (T and its use), 2502.16982 (AdamW's size); the normaliser, the cap and the way without
    an SVD are this library's.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> optimizer = SpectralNewton(SpectralNewton.groups(model), lr=1e-2)
    >>> [(group["name"], group["param_names"]) for group in optimizer.param_groups]
    [('dense', ['0.weight']), ('adamw', ['0.bias', '2.weight', '2.bias'])]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        alpha: float | Literal["auto"] = 2.0,
        damping: float | Literal["auto"] = "auto",
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.01,
        update_rms: float | None = 0.2,
        max_gain: float = 4.0,
        tolerance: float = 1e-2,
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        adamw_names: Sequence[str] | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "damping": damping,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "update_rms": update_rms,
            "max_gain": max_gain,
            "tolerance": tolerance,
            "adamw_lr": adamw_lr,
            "adamw_betas": tuple(adamw_betas),
            "adamw_eps": adamw_eps,
            "adamw_weight_decay": adamw_weight_decay,
            "adamw_names": ADAMW_NAMES if adamw_names is None else tuple(adamw_names),
            "capturable": capturable,
        }
        super().__init__(params, defaults)
        if adamw_names is not None and not any("param_names" in group for group in self.param_groups):
            raise ValueError("adamw_names needs names: pass model.named_parameters() as params")

    @staticmethod
    def groups(
        model: nn.Module,
        *,
        kinds: Mapping[str, Kind] | None = None,
        fused_qkv: Sequence[str] | Mapping[str, Sequence[int]] | None = None,
    ) -> list[dict[str, Any]]:
        """Named groups by kind of layer, the matrices of each marked; what is frozen now is left out.

        Args:
            model: any module.
            kinds: glob pattern -> kind, over the kind inferred from the model's structure (`find_layers`). The kinds
                "embedding" and "head" go to AdamW.
            fused_qkv: glob patterns of projections that hold query, key and value in equal blocks of rows, or pattern
                -> the three numbers of rows. Default: those named ``qkv``, ``qkv_proj`` or ``c_attn`` and the
                like with three times as many outputs as inputs, and `nn.MultiheadAttention`.

        Raises:
            ValueError: if a pattern matches nothing, a kind is unknown, or rows of a projection do not add up.
        """
        return model_groups(model, kinds=kinds, fused_qkv=fused_qkv)

    @property
    def skipped_updates(self) -> int:
        """How many updates of single parameters were left out since the start, for a gradient that was not finite."""
        return sum(int(state["skipped"]) for state in self.state.values())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, split into matrices and the rest unless the group has ``update``."""
        if not isinstance(param_group, dict):
            raise TypeError(f"a param group must be a dict, got {type(param_group).__name__}")
        names = param_group.get("adamw_names", self.defaults["adamw_names"])
        for part in split_group(param_group, names):
            group = fill_group(part, self.defaults)
            group["name"] = self._unused_name(group.get("name", group["update"]))
            super().add_param_group(group)
            drop_foreign_options(group)

    def _unused_name(self, name: str) -> str:
        taken = {group["name"] for group in self.param_groups}
        return next(found for found in chain([name], (f"{name}_{i}" for i in count(2))) if found not in taken)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; the closure, if any, is called first with gradients on, and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries = list(self._entries())
        if any(entry.group["capturable"] for entry in entries):
            self._step_on_device(entries)
            return loss
        finite = finite_gradients([entry.grad for entry in entries])
        for entry in (entry for entry, good in zip(entries, finite, strict=True) if not good):
            entry.state["skipped"] += 1
        _update([entry for entry, good in zip(entries, finite, strict=True) if good])
        return loss

    def _entries(self) -> Iterator[Entry]:
        """Every parameter that has a gradient, with its state."""
        for group in self.param_groups:
            for i, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    name = group["param_names"][i] if "param_names" in group else f"{i} of group {group['name']!r}"
                    raise RuntimeError(
                        f"the gradient of parameter {name} is sparse, which Spectral Newton does not take; "
                        "make its embedding with sparse=False, or give it to torch.optim.SparseAdam"
                    )
                if not self.state[parameter]:
                    self.state[parameter] = _new_state(parameter, group)
                yield Entry(parameter, parameter.grad, self.state[parameter], group, i)

    def _step_on_device(self, entries: Sequence[Entry]) -> None:
        """The step with no look at its values: what went wrong is put back afterwards."""
        good = [entry.grad.isfinite().all() for entry in entries]
        before = [[tensor.clone() for tensor in entry.tensors] for entry in entries]
        _update(entries)
        for entry, good_gradient, old in zip(entries, good, before, strict=True):
            done = good_gradient & entry.parameter.isfinite().all()
            for tensor, old_tensor in zip(entry.tensors, old, strict=True):
                tensor.copy_(torch.where(done, tensor, old_tensor))
            entry.state["skipped"] += ~done

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; a ValueError names the class if it is another optimizer's."""
        check_own_state(self.param_groups, state_dict["param_groups"], type(self).__name__)
        super().load_state_dict(state_dict)
        saved = (state_dict["state"].get(i, {}) for group in state_dict["param_groups"] for i in group["params"])
        own = (parameter for group in self.param_groups for parameter in group["params"])
        for parameter, state in zip(own, saved, strict=True):
            if "skipped" in state:
                # torch casts it to the parameter's type, and bfloat16 counts no further than 256.
                device = self.state[parameter]["skipped"].device
                self.state[parameter]["skipped"] = state["skipped"].to(device, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            add_missing_options(group, self.defaults)


@dataclass(frozen=True)
class Entry:
    """A parameter with a gradient: its state, and the i-th of its group."""

    parameter: Tensor
    grad: Tensor
    state: dict[str, Any]
    group: dict[str, Any]
    i: int

    @property
    def tensors(self) -> list[Tensor]:
        """What a step changes."""
        return [self.parameter, *(value for key, value in self.state.items() if key != "skipped")]


def _new_state(parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    skipped = torch.zeros((), dtype=torch.float32, device=parameter.device if group["capturable"] else "cpu")
    if group["update"] == "adamw":
        return {**adamw_state(parameter, capturable=group["capturable"]), "skipped": skipped}
    buffer = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return {"momentum_buffer": buffer, "skipped": skipped}


def _update(entries: Sequence[Entry]) -> None:
    pieces: list[Piece] = []
    for _, of_group in groupby(entries, key=lambda entry: id(entry.group)):
        chosen = list(of_group)
        group = chosen[0].group
        parameters, states = [entry.parameter for entry in chosen], [entry.state for entry in chosen]
        if group["update"] == "adamw":
            adamw_step(parameters, states, group)
        else:
            pieces += momentum_step(parameters, states, group, [group["layouts"][entry.i] for entry in chosen])
    spectral_step(pieces)


def finite_gradients(grads: Sequence[Tensor]) -> list[bool]:
    """Which gradients have finite entries only, with one look at each device."""
    norms: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for i, norm in enumerate(torch._foreach_norm(list(grads)) if grads else []):
        norms.setdefault(norm.device, []).append((i, norm))
    finite = [True] * len(grads)
    for of_device in norms.values():
        flags = torch.stack([norm.isfinite() for _, norm in of_device]).tolist()
        for (i, _), flag in zip(of_device, flags, strict=True):
            # A norm that overflowed says nothing about the entries.
            finite[i] = flag or bool(grads[i].isfinite().all())
    return finite
