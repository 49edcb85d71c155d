"""The optimizer: matrices by T(sigma; alpha, d) = sigma / (sigma^alpha + d) of their momentum, the rest by AdamW."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, count
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_spectral._torch_private import not_compiled
from lightning_spectral.distributed.dtensor import is_dtensor
from lightning_spectral.errors import SpectralWarning
from lightning_spectral.layers.kinds import Kind
from lightning_spectral.optim.carry_over import check_own_state, check_parts, restore_numbers
from lightning_spectral.optim.ddp import Sharing, check_process_group
from lightning_spectral.optim.measured_alpha import INITIAL_ALPHA, MeasuredAlpha, mean_alpha_used, update_averages
from lightning_spectral.optim.model_groups import ADAMW_NAMES, model_groups, warn_of_look_ups
from lightning_spectral.optim.param_groups import check_group, drop_foreign, fill_group, split_group
from lightning_spectral.optim.step import ParameterStep, agree_on_steps, complete_states, mesh_scope, update


class SpectralNewton(Optimizer):
    """Spectral Newton for matrices and AdamW for everything else, in one optimizer.

    For a parameter with gradient G, seen as a matrix (m, n), with r = min(m, n):

    - B <- mu B + (1 - mu) G, and M = mu B + (1 - mu) G (Nesterov) or B.
    - M = U diag(sigma) V^T, sigma_hat = sigma sqrt(r) / ||M||_F.
    - X = U diag(T(sigma_hat)) V^T with T(s) = s / (s^alpha + d), computed without an SVD (`spectral_transfer`).
    - W <- (1 - lr weight_decay) W - lr c X, with c = rms min(sqrt(m n) / ||X||_F, max_gain sqrt(max(m, n)) / ||X||_2):
      the entries of the step have root mean square lr rms, unless X is nearly of rank one.
    - rms = min(1, RMS(M) / sqrt(v)) is AdamW's size by matrix, v <- 0.999 v + 0.001 mean(G^2), both bias-corrected: 1
      where gradients agree, sqrt((1 - mu) / (1 + mu)) where they are noise. So a learning rate of AdamW's can be kept.

    alpha = 2 is curvature as the square of the gradient; alpha = 1 and d -> 0 the polar factor U V^T (Muon);
    alpha = 0 SGD with momentum and steps of one size.

    What is a matrix:

    - with `SpectralNewton.groups(model)`: Linear, convolution and attention weights, by kind of layer; embeddings and
      heads, tied ones too, go to AdamW; fused qkv projections are split; a grouped convolution is a matrix per group,
      a depthwise one goes to AdamW.
    - with `model.named_parameters()`: every parameter of two or more dimensions, flattened to (first, rest), whose
      name matches none of ``adamw_names``.
    - with `model.parameters()`, all that LightningCLI gives: every parameter of two or more dimensions. **Embeddings
      and heads then get the matrix update too**, since nothing tells them apart; it warns where shapes look like it.

    Parameters without groups fall into two, "spectral" and "adamw". An AdamW group's learning rate is its own ``lr``,
    so that one schedule scales both; schedulers that set absolute rates (OneCycleLR) take a list.

    With alpha = "probe" every matrix has an exponent of its own, an average of what a `SpectralProbe` in the same
    Trainer, or a call of `set_alpha`, measures: the first one, and then a <- mu a + (1 - mu) x with x clamped to
    ``alpha_range``, from fits to trust only. A step takes it to the nearest tenth. A
    matrix steps with alpha = 2 until it has one; where nothing measures, the first step warns. Parts of a fused
    projection that the probe measures apart (its ``fused_qkv``) have an exponent each, groups of a convolution share
    one. Averages are saved with the state. What is trained then depends on when it is measured: give the probe
    ``every_n_steps`` for runs that can be repeated.

    In distributed training:

    - DDP: each rank computes the updates of its share of the matrices of 64 rows and columns or more, and all get every
      update. The state is full and the same on all ranks, and loads on any number. By default this needs one
      DistributedDataParallel module that holds all of the optimizer's parameters, outside its `join`; elsewhere give
      ``process_group``. Every rank must then take every step, with the same gradients, as DDP gives them.
    - FSDP2 (`fully_shard`, Lightning's ModelParallelStrategy), with replicas too, and tensor parallelism: the state is
      split as the parameters are. Each matrix is put together on its owner, and its update sent back. Save and load
      the state with torch.distributed.checkpoint, as Lightning does.
    - A parameter whose gradient is missing or not finite on one rank is stepped on none.

    A gradient with NaN or infinite entries leaves its parameter and its state as they are; `skipped_updates` counts
    them. `p.grad` is never written.

    Args:
        params: parameters, (name, parameter) pairs, or groups. A group may hold any of the options below (AdamW's as
            ``adamw_lr`` and so on) and ``update="spectral"`` or ``"adamw"`` to decide for all of its parameters.
        lr: learning rate of the matrices, in units of AdamW's.
        alpha: exponent, at least 0; "auto": by kind of layer, 2 for convolutions and dense layers, 1 for
            transformer blocks (arXiv 2606.02596), for `SpectralNewton.groups` only; "probe": as measured, see above.
        damping: d > 0, in units of the root mean square singular value to the power alpha; "noise": rms^2
            above, of each matrix at each step, at least 0.01; "auto": 0.03 for transformer blocks known from
            `SpectralNewton.groups`, else "noise", or 0.1 with another update_rms. Smaller values lift weak directions
            more.
        momentum: mu. With a fixed update_rms, 0.95 in long runs.
        nesterov: whether M looks one step ahead.
        weight_decay: decoupled, times lr.
        update_rms: root mean square entry of an update before lr: "adam", by matrix as above; a number, such as 0.2,
            which AdamW's comes to late in long runs; null: X as it is.
        max_gain: how many times the spectral norm of a flat update of the same size an update may have.
        tolerance: relative error allowed to X, from 1e-7 to 0.1. With alpha = 2 it only decides when float64 is needed.
        adamw_lr: learning rate of AdamW; null: the group's lr.
        adamw_betas: decay rates of AdamW's two averages.
        adamw_eps: AdamW's epsilon.
        adamw_weight_decay: of the parameters that get AdamW; null: weight_decay.
        adamw_names: glob patterns of matrices that go to AdamW, given `model.named_parameters()`: those with a dot
            match the full name, others one of its last two parts (``head`` in ``decoder.head.weight``). Null: usual
            names of embeddings and heads.
        alpha_range: smallest and largest exponent that alpha="probe" takes from a measurement. Above 2 a step needs
            eigenvalues, at two to three times its cost.
        alpha_momentum: share of the old average in the new one, per measurement.
        process_group: of processes that share the matrices, if they are whole in each: "auto", those of DDP; "world",
            all; a group; null: none. It is not part of the state.

    Raises:
        ValueError: if an option is out of range, also at a step, of a group edited meanwhile; or a parameter is
            complex, not initialised, flattened (FSDP1, DeepSpeed), or split in two dimensions of a mesh.
        RuntimeError: at a step, if a gradient is sparse, or a matrix was flattened meanwhile.

    Source: arXiv 2606.02596 (T and its use), 2602.17080 (a scalar for AdamW's size); the normaliser, the cap and the
    way without an SVD are this library's.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> optimizer = SpectralNewton(SpectralNewton.groups(model), lr=1e-2)
    >>> [(group["name"], group["param_names"]) for group in optimizer.param_groups]
    [('dense', ['0.weight']), ('adamw', ['0.bias', '2.weight', '2.bias'])]
    """

    _alpha_expected = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        alpha: float | Literal["auto", "probe"] = 2.0,
        damping: float | Literal["auto", "noise"] = "auto",
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.01,
        update_rms: float | Literal["adam"] | None = "adam",
        max_gain: float = 4.0,
        tolerance: float = 1e-2,
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        adamw_names: Sequence[str] | None = None,
        alpha_range: tuple[float, float] = (0.5, 2.0),
        alpha_momentum: float = 0.5,
        process_group: Any = "auto",
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
            "alpha_range": tuple(alpha_range),
            "alpha_momentum": alpha_momentum,
        }
        if isinstance(params, nn.Module):
            raise TypeError("params is a module; pass SpectralNewton.groups(model)")
        check_process_group(process_group)
        self._sharing = Sharing(process_group)
        super().__init__(params, defaults)
        warn_of_look_ups(self.param_groups)
        if adamw_names is not None and not any("param_names" in group for group in self.param_groups):
            raise ValueError("adamw_names needs names: pass model.named_parameters() as params")

    @staticmethod
    def groups(
        model: nn.Module,
        *,
        kinds: Mapping[str, Kind] | None = None,
        fused_qkv: Sequence[str] | Mapping[str, Sequence[int]] | None = None,
    ) -> list[dict[str, Any]]:
        """Return named groups by kind of layer, the matrices of each marked; what is frozen now is left out.

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
        """Number of updates of single parameters left out since the start, for a gradient that was not finite."""
        return sum(int(state["skipped"]) for state in self.state.values())

    @property
    def sharing_processes(self) -> int:
        """Number of ranks that shared the last step's matrices, which each of them has in full; 1: none."""
        return self._sharing.processes

    @property
    def takes_alpha(self) -> bool:
        """True if a group has alpha="probe"."""
        return any(group.get("alpha") == "probe" for group in self.param_groups)

    def expect_alpha(self) -> None:
        """Expect a call of `set_alpha`, so that no step before it warns."""
        self._alpha_expected = True

    def set_alpha(self, measured: Mapping[Tensor, float | Sequence[MeasuredAlpha]]) -> None:
        """Take measured exponents into the averages of the groups with alpha="probe".

        Args:
            measured: parameter -> its exponent, or what was measured on some of its rows. NaN, and parameters of other
                groups and of other optimizers, are left out.

        Raises:
            ValueError: if no group has alpha="probe"; TypeError for a key that is no parameter.

        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = SpectralNewton(model.parameters(), alpha="probe")
        >>> optimizer.set_alpha({model[0].weight: 1.5})
        >>> optimizer.alpha_of(model[0].weight), optimizer.alpha_of(model[2].weight)
        (1.5, 2.0)
        """
        if not self.takes_alpha:
            raise ValueError("set_alpha needs alpha='probe', and no group has it; group['alpha'] holds their exponents")
        self.expect_alpha()
        if others := [p for p in measured if not isinstance(p, Tensor)]:
            raise TypeError(f"set_alpha takes parameters (model.get_parameter(name)) as keys, got {others[0]!r}")
        fits = {p: x if isinstance(x, Sequence) else [MeasuredAlpha(float(x))] for p, x in measured.items()}
        for group in self.param_groups:
            if group.get("alpha") == "probe":
                update_averages(fits, group)

    def alpha_of(self, parameter: Tensor, rows: tuple[int, int] | None = None) -> float | None:
        """Return the exponent that a parameter, or these rows of it, steps with: the mean of its matrices'.

        Args:
            parameter: of this optimizer; None is returned for any other, and for one with AdamW.
            rows: first and last-plus-one.

        Raises:
            ValueError: if none of its matrices has such rows.
        """
        for group in self.param_groups:
            for i, own in enumerate(group["params"]):
                if own is parameter and group["update"] == "spectral":
                    return mean_alpha_used(group, i, rows) if group["alpha"] == "probe" else float(group["alpha"])
        return None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, split into matrices and the rest unless the group has ``update``."""
        if not isinstance(param_group, dict):
            raise TypeError(f"a param group must be a dict, got {type(param_group).__name__}")
        parts = split_group(param_group, param_group.get("adamw_names", self.defaults["adamw_names"]))
        for group in [fill_group(part, self.defaults) for part in parts]:
            group["name"] = self._unused_name(group.get("name", group["update"]))
            super().add_param_group(group)
            drop_foreign(group)
        self._sharing.forget()

    def _unused_name(self, name: str) -> str:
        taken = {group["name"] for group in self.param_groups}
        return next(unused for unused in chain([name], (f"{name}_{i}" for i in count(2))) if unused not in taken)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; the closure, if any, is called first with gradients on, and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            check_group(group)
        if not self._alpha_expected and self.takes_alpha:
            self._warn_of_missing_alpha()
        full_scope = self._sharing.scope(self.param_groups)
        taken, skipped = agree_on_steps(
            [
                ParameterStep.of(parameter, group, i, mesh_scope(parameter) if is_dtensor(parameter) else full_scope)
                for group in self.param_groups
                for i, parameter in enumerate(group["params"])
            ]
        )
        complete_states((*taken, *skipped), self.state)
        for parameter_step in skipped:
            self.state[parameter_step.parameter]["skipped"] += 1
        update(taken, self.state)
        return loss

    @not_compiled
    def _warn_of_missing_alpha(self) -> None:
        self.expect_alpha()
        warnings.warn(
            f"alpha='probe', and nothing measures alpha: matrices step with alpha={INITIAL_ALPHA:g}, or what they had "
            "when saved; add SpectralProbe() to the Trainer's callbacks, call optimizer.set_alpha, or give alpha a "
            "number",
            SpectralWarning,
            stacklevel=3,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; a ValueError names the class if it is another optimizer's."""
        check_own_state(self.param_groups, state_dict["param_groups"], type(self).__name__)
        super().load_state_dict(state_dict)
        check_parts(self.state, type(self).__name__)
        self._sharing.forget()
        restore_numbers(self.state, self.param_groups, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # Of copies and pickles; what they are shared over is found again, but for a group given, which stays here.
        process_group = self._sharing.process_group
        kept = process_group if process_group in (None, "world") else "auto"
        return {**super().__getstate__(), "_sharing": Sharing(kept)}
