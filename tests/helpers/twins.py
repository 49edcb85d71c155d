"""Slow and obvious versions of what the package computes: dense Hessians, one SVD per block."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_spectral.layers.matrices import MatrixLayer


class _WeightNorm(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch._weight_norm:
            v, g, dim = args
            others = [d for d in range(v.ndim) if d != dim % v.ndim]
            return v * g / v.square().sum(others, keepdim=True).sqrt()
        return func(*args, **(kwargs or {}))


@contextmanager
def two_derivatives() -> Iterator[None]:
    """Attention by the one kernel that has a second derivative, and weight norm, whose own is wrong, by its formula."""
    with sdpa_kernel([SDPBackend.MATH]), _WeightNorm():
        yield


def loss_of(model, batch, loss, parameter: str, *, train: bool = False):
    """The loss as a function of one parameter, wherever that is used, and the parameter's value."""
    model = copy.deepcopy(model).train(train)
    value = dict(model.named_parameters(remove_duplicate=False))[parameter].detach()
    owners = [(m, leaf) for m in model.modules() for leaf, p in m._parameters.items() if p is not None]
    places = [(m, leaf) for m, leaf in owners if m._parameters[leaf].data_ptr() == value.data_ptr()]

    def at(weight):
        for module, leaf in places:
            module._parameters.pop(leaf, None)
            setattr(module, leaf, weight)
        return loss(model, batch)

    return at, value


def dense_hessian(model, batch, loss, parameter: str, *, train: bool = False) -> torch.Tensor:
    """The Hessian block of one parameter, (numel, numel)."""
    at, value = loss_of(model, batch, loss, parameter, train=train)
    with two_derivatives():
        hessian = torch.autograd.functional.hessian(at, value)
    return hessian.reshape(value.numel(), value.numel())


def second_derivative(model, batch, loss, parameter: str, direction: torch.Tensor, *, train: bool = False) -> float:
    """d^2/dt^2 of the loss at W + t D, D in the parameter's shape."""
    at, value = loss_of(model, batch, loss, parameter, train=train)
    t = torch.zeros((), dtype=value.dtype, requires_grad=True)
    with two_derivatives():
        (first,) = torch.autograd.grad(at(value + t * direction), t, create_graph=True)
        return float(torch.autograd.grad(first, t)[0])


def gradient(model, batch, loss, parameter: str, *, train: bool = False) -> torch.Tensor:
    model = copy.deepcopy(model).train(train)
    leaf = dict(model.named_parameters(remove_duplicate=False))[parameter]
    return torch.autograd.grad(loss(model, batch), leaf)[0]


def matrix_entries(layer: MatrixLayer, shape: torch.Size) -> torch.Tensor:
    """For each entry of the layer's matrix (m, n), its position in the flattened parameter, by counting."""
    index = torch.arange(shape.numel()).reshape(shape)
    if layer.transposed:
        ins, outs = shape[0] // layer.groups, shape[1]
        rows = [index[g * ins : (g + 1) * ins, o].flatten() for g in range(layer.groups) for o in range(outs)]
        return torch.stack(rows)
    if layer.stack:
        return torch.cat(list(index))
    matrix = index.reshape(shape[0], -1)
    return matrix if layer.rows is None else matrix[layer.rows[0] : layer.rows[1]]


def block_triplets(matrix: torch.Tensor, groups: int, k: int):
    """(sigma, matrix direction) of the k leading triplets over all blocks of rows, each by its own SVD."""
    rows = matrix.shape[0] // groups
    found = []
    for g in range(groups):
        u, sigma, vh = torch.linalg.svd(matrix[g * rows : (g + 1) * rows], full_matrices=False)
        for i in range(len(sigma)):
            direction = torch.zeros_like(matrix)
            direction[g * rows : (g + 1) * rows] = torch.outer(u[:, i], vh[i])
            found.append((float(sigma[i]), direction))
    return sorted(found, key=lambda pair: -pair[0])[:k]


def z_scores(found, expected, rtol=1e-6):
    """Errors of h over their standard errors; what has none is as expected, to ``rtol`` of the largest of a layer."""
    scores = []
    for name, layer in expected.items():
        other = found[name]
        drawn, known = other.h_stderr > 0, layer.h.isfinite()
        certain = known & ~drawn
        atol = rtol * float(layer.h.abs().nan_to_num().max())
        torch.testing.assert_close(other.h[certain], layer.h[certain], rtol=rtol, atol=atol)
        scores.append(((other.h - layer.h) / other.h_stderr)[drawn & known])
    return torch.cat(scores)
