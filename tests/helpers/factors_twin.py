"""Kronecker factors by loops: the inputs and output gradients of each product of a network, one row at a time."""

from __future__ import annotations

import copy
import itertools

import torch
import torch.nn.functional as F
from cases import Attention
from torch import nn

from lightning_spectral.layers.matrices import MatrixLayer

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def naive_patches(module, x):
    """(g, B * P, n): what the kernel lies on at each output position, entry by entry."""
    kernel, stride, padding, dilation = module.kernel_size, module.stride, module.padding, module.dilation
    g, (b, c) = module.groups, x.shape[:2]
    rows = []
    for position in itertools.product(*(range(size) for size in module(x).shape[2:])):
        patch = x.new_zeros(b, c, *kernel)
        for place in itertools.product(*(range(k) for k in kernel)):
            if isinstance(module, TRANSPOSED):
                steps = [
                    divmod(q + p - i * d, s)
                    for q, p, i, d, s in zip(position, padding, place, dilation, stride, strict=True)
                ]
                at = [whole if rest == 0 else -1 for whole, rest in steps]
            else:
                at = [
                    q * s - p + i * d for q, s, p, i, d in zip(position, stride, padding, place, dilation, strict=True)
                ]
            if all(0 <= i < size for i, size in zip(at, x.shape[2:], strict=True)):
                patch[(slice(None), slice(None), *place)] = x[(slice(None), slice(None), *at)]
        rows.append(patch.reshape(b, g, -1))
    return torch.stack(rows, 1).permute(2, 0, 1, 3).flatten(1, 2)


def rows_of(model, batch, loss, layer: MatrixLayer, *, train=False):
    """(a (g, R, n), dL / dz (g, R, m / g)) of the one product with a layer."""
    model = copy.deepcopy(model).train(train)
    if isinstance(model, Attention) and layer.module.startswith("attn"):
        a, delta = attention_rows(model, batch, loss, layer)
        return a[None], delta[None]
    seen = {}
    module = model.get_submodule(layer.module)

    def note(_, inputs, output):
        seen["a"] = inputs[0].detach()
        seen["z"] = output
        output.retain_grad()

    with torch.enable_grad():
        handle = module.register_forward_hook(note)
        loss(model, batch).backward()
        handle.remove()
    a, delta = seen["a"], seen["z"].grad
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        g = layer.groups
        return naive_patches(module, a), delta.flatten(2).unflatten(1, (g, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    delta = delta.flatten(0, -2)
    delta = delta if layer.rows is None else delta[:, slice(*layer.rows)]
    return a.flatten(0, -2)[None], delta[None]


def attention_rows(model, batch, loss, layer):
    """The same inside nn.MultiheadAttention, written out; batch first."""
    attn, (x, labels) = model.attn, batch
    b, t, d = x.shape
    z = (x @ attn.in_proj_weight.T + attn.in_proj_bias).detach().requires_grad_()
    q, k, v = z.reshape(b, t, 3, attn.num_heads, d // attn.num_heads).permute(2, 0, 3, 1, 4)
    y = ((q @ k.mT / (d // attn.num_heads) ** 0.5).softmax(-1) @ v).transpose(1, 2).reshape(b, t, d)
    out = y @ attn.out_proj.weight.T + attn.out_proj.bias
    out.retain_grad()
    value = F.cross_entropy(model.head(out.mean(1)), labels)
    torch.testing.assert_close(value, loss(model, batch))
    value.backward()
    if "out_proj" in layer.parameter:
        return y.detach().flatten(0, 1), out.grad.flatten(0, 1)
    return x.flatten(0, 1), z.grad.flatten(0, 1)[:, slice(*layer.rows)]


def second_moment(rows):
    """E[x x^T], one row at a time."""
    total = rows.new_zeros(rows.shape[1], rows.shape[1])
    for x in rows:
        total += torch.outer(x, x)
    return total / len(rows)
