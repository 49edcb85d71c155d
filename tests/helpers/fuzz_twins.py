"""What the fuzz test compares with: dense blocks row by row, and everything that a measurement could leave behind."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fuzz_cases import DTYPES, Case, Net, criterion, loss_of
from torch.autograd.graph import saved_tensors_hooks
from twins import block_triplets, matrix_entries, two_derivatives
from twins import loss_of as as_function

from lightning_spectral import LayerSpectrum, SingularTriplets
from lightning_spectral.layers.matrices import MatrixLayer

ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3}
"""What sigma and h may be off by, in units of the gradient's and the block's spectral norm."""

APART = {torch.float64: 1e-3, torch.float32: math.inf}
"""The same where pieces of a loss that is no sum over samples add up to `ADDS_UP`, which bounds no curvature."""

MOST_ENTRIES = 150
"""Of the blocks that are computed row by row."""

STDERRS = 6.0
"""What a sampled h may be off by, in its stated standard errors."""

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)  # fmt: skip


def traces(net: torch.nn.Module) -> dict[str, Any]:
    """All that a measurement has to leave as it was; compare with `assert_identical`."""
    named = list(net.named_parameters(remove_duplicate=False))
    return {
        "parameters": [(n, id(p), p.requires_grad, p.detach().clone()) for n, p in named],
        "grad": [(n, id(p.grad), None if p.grad is None else p.grad.clone()) for n, p in named],
        "tensor_hooks": [(n, p._backward_hooks is None, p._post_accumulate_grad_hooks is None) for n, p in named],
        "buffers": [(n, id(b), b.clone()) for n, b in net.named_buffers(remove_duplicate=False)],
        "modes": [m.training for m in net.modules()],
        "hooks": [[len(m.__dict__[h]) for h in HOOKS] for m in net.modules()],
        "attributes": [(id(m), type(m), sorted(m.__dict__)) for m in net.modules()],
        "random": (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),
        "globals": (
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision(),
            torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.mkldnn.enabled, torch._C._len_torch_function_stack(),
        ),
        "functions": [id(f) for f in (F.linear, torch.autocast.__enter__, saved_tensors_hooks.__enter__)],
    }  # fmt: skip


class Twin:
    """The case in a precision of its own, differentiated in one parameter by autograd's dense functions.

    Args:
        case, net: what is measured.
        parts: the batches, cut as they are measured.
        dtype: to compute in.
        nudged: with weights that differ in their last digits, to see what rounding makes of them.
    """

    def __init__(
        self, case: Case, net: Net, parts: list[tuple[torch.Tensor, ...]], dtype: torch.dtype, *, nudged: bool = False
    ) -> None:
        self.case, self.train = case, case.options["mode"] == "train"
        self.net = copy.deepcopy(net).to(dtype)
        for module in self.net.modules():
            if hasattr(module, "plain"):
                module.plain = True
        if nudged:
            with torch.no_grad():
                for parameter in self.net.parameters():
                    signs = torch.randint(0, 2, parameter.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
                    parameter.mul_(1 + 2 * torch.finfo(dtype).eps * signs.to(dtype))
        self.parts = [tuple(t.to(dtype) if t.is_floating_point() else t for t in part) for part in parts]
        total = sum(len(part[0]) for part in parts)
        self.weights = [len(part[0]) / total for part in parts]
        self.random = torch.get_rng_state()

    def gradient(self, parameter: str) -> torch.Tensor:
        """dL/dW; zeros where the loss does not depend on it."""
        total = 0.0
        for part, weight in zip(self.parts, self.weights, strict=True):
            at, value = as_function(self.net, part, self._loss, parameter, train=self.train)
            value.requires_grad_()
            (found,) = torch.autograd.grad(at(value), value, allow_unused=True)
            total = total + weight * (torch.zeros_like(value) if found is None else found)
        return total

    def hessian(self, parameter: str) -> torch.Tensor:
        """The Hessian block (numel, numel)."""
        return self._sum(lambda part: self._hessian(parameter, part))

    def gauss_newton(self, parameter: str) -> torch.Tensor:
        """J^T (d2L / dz2) J of the output z: the Hessian where the network is piecewise linear in the parameter."""
        return self._sum(lambda part: self._gauss_newton(parameter, part))

    def _sum(self, of_part: Any) -> torch.Tensor:
        return sum(weight * of_part(part) for part, weight in zip(self.parts, self.weights, strict=True))

    def _hessian(self, parameter: str, part: tuple[torch.Tensor, ...]) -> torch.Tensor:
        at, value = as_function(self.net, part, self._loss, parameter, train=self.train)
        with two_derivatives():
            return torch.autograd.functional.hessian(at, value).reshape(value.numel(), value.numel())

    def _gauss_newton(self, parameter: str, part: tuple[torch.Tensor, ...]) -> torch.Tensor:
        at, value = as_function(self.net, part, self._output, parameter, train=self.train)
        jacobian = torch.autograd.functional.jacobian(at, value).reshape(-1, value.numel())
        z = at(value).detach().requires_grad_()
        (g,) = torch.autograd.grad(criterion(self.case.loss, z, *part[1:]), z, create_graph=True)
        # Column by column: a dense Hessian of many outputs takes gigabytes.
        columns = [column.reshape(z.shape) for column in jacobian.T]
        bent = [torch.autograd.grad(g, z, x, retain_graph=True)[0] if g.requires_grad else 0 * x for x in columns]
        return jacobian.T @ torch.stack(bent).flatten(1).T

    def _loss(self, net: Net, part: tuple[torch.Tensor, ...]) -> torch.Tensor:
        torch.set_rng_state(self.random)
        # Activations in place may write on what they are given.
        return loss_of(net, tuple(t.clone() for t in part))

    def _output(self, net: Net, part: tuple[torch.Tensor, ...]) -> torch.Tensor:
        torch.set_rng_state(self.random)
        return net(part[0].clone())


class Comparison:
    """What is measured of a case against its twins: in float64, and as rounded in the precision measured in.

    Args:
        case, net, parts: as of `Twin`.
        in_pieces: whether the samples were measured a few at a time.
        loss: its value; derivatives that are nothing beside it are the rounding of terms that cancel.
    """

    def __init__(
        self, case: Case, net: Net, parts: list[tuple[torch.Tensor, ...]], *, in_pieces: bool, loss: float
    ) -> None:
        precision = {"float32": torch.float32, "float64": torch.float64}[case.options["precision"]]
        dtype = torch.promote_types(DTYPES[case.dtype], precision)
        narrow = any(gene.wrap == "half" for gene in (*case.genes, *case.back)) and precision == torch.float32
        self.dtype = torch.float32 if narrow else dtype
        self.rounding = (APART if in_pieces and not case.adds_up else ROUNDING)[self.dtype]
        self.loss = torch.finfo(self.dtype).eps * abs(loss)
        self.exact = Twin(case, net, parts, torch.float64)
        self.rounded = Twin(case, net, parts, self.dtype, nudged=True)

    def sigma_error(self, layer: MatrixLayer, found: LayerSpectrum) -> float:
        """The largest error of sigma, in what is allowed."""
        if not len(found.sigma) or math.isinf(self.rounding):
            return 0.0
        gradient = self.exact.gradient(layer.parameter)
        entries = matrix_entries(layer, gradient.shape)
        expected = block_triplets(gradient.flatten()[entries], layer.groups, len(found.sigma))
        difference = (found.sigma - torch.tensor([sigma for sigma, _ in expected], dtype=torch.float64)).abs().max()
        allowed = self.rounding * expected[0][0]
        if difference > allowed:
            # That of a network whose output does not depend on the layer is rounding, and may be zero in both twins.
            allowed += self.loss + 20 * float((self.rounded.gradient(layer.parameter).double() - gradient).norm())
        return float(difference) / allowed if difference else 0.0

    def h_error(
        self, layer: MatrixLayer, found: LayerSpectrum, triplets: SingularTriplets, gauss_newton: bool
    ) -> float:
        """The largest error of the finite h, in what is allowed."""
        known = found.h.isfinite()
        if not known.any() or math.isinf(self.rounding) or not self.can_be_dense(layer):
            return 0.0
        hessian = self._block(self.exact, layer, gauss_newton)
        difference = (found.h - self.expected(layer, triplets, gauss_newton))[known].abs()
        allowed = self.rounding * torch.linalg.matrix_norm(hessian, 2) + STDERRS * found.h_stderr[known]
        if bool((difference > allowed).any()):
            rounded = self._block(self.rounded, layer, gauss_newton)
            size = dict(self.exact.net.named_parameters(remove_duplicate=False))[layer.parameter].detach().norm()
            allowed = allowed + 20 * torch.linalg.matrix_norm(rounded - hessian, 2) + self.loss / size.square()
        return float((difference / allowed).nan_to_num(0.0).max())

    def expected(self, layer: MatrixLayer, triplets: SingularTriplets, gauss_newton: bool) -> torch.Tensor:
        """(K,) the h along these directions."""
        shape = dict(self.exact.net.named_parameters(remove_duplicate=False))[layer.parameter].shape
        directions = directions_of(layer, shape, triplets.u, triplets.v)
        return ((directions @ self._block(self.exact, layer, gauss_newton)) * directions).sum(1)

    @staticmethod
    def can_be_dense(layer: MatrixLayer) -> bool:
        """Whether its block is small enough."""
        return layer.shape[0] * layer.shape[1] <= MOST_ENTRIES

    @staticmethod
    def _block(twin: Twin, layer: MatrixLayer, gauss_newton: bool) -> torch.Tensor:
        return (twin.gauss_newton if gauss_newton else twin.hessian)(layer.parameter).double()


def sampling_error(h: torch.Tensor, stderr: torch.Tensor, expected: torch.Tensor) -> float:
    """How far estimates (seeds, K) are from unbiased with errors as stated, 1 or below where nothing speaks against it.

    A single one may lie far off: the errors are of two or three draws each, and few samples have few signs.
    """
    error = h - expected
    bias = error.mean(0).abs() / (error.std(0) / math.sqrt(len(h)) + 1e-8 * expected.abs())
    missed = (error.abs() > 3 * stderr + 1e-8 * expected.abs()).double().mean(0)
    return float(torch.maximum(bias / 5, missed / 0.4).nan_to_num(0.0).max())


def directions_of(layer: Any, shape: torch.Size, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(K, numel) the u_k v_k^T as flattened parameters, in float64."""
    entries = matrix_entries(layer, shape).flatten()
    found = torch.zeros(u.shape[1], shape.numel(), dtype=torch.float64)
    found[:, entries] = torch.einsum("mk,nk->kmn", u.double(), v.double()).flatten(1)
    return found
