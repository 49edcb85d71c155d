"""Networks as trees of named linear layers, and the kinds of their layers."""

import re

import torch
from torch import nn

from lightning_spectral.layers.kinds import infer_kinds
from lightning_spectral.layers.matrices import find_layers


def linear(out, ins):
    return nn.Linear(ins, out)


class Conv1D(nn.Module):
    """As Hugging Face's GPT-2 stores its projections."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))


class Tree(nn.Module):
    """A network of named linear layers: {"attn": {"q_proj": (out, in)}, ...}."""

    def __init__(self, tree, linear=linear):
        super().__init__()
        for name, part in tree.items():
            child = Tree(part, linear) if isinstance(part, dict) else linear(*part)
            self.add_module(name, child)


def kinds_of(model, **options):
    """Kinds of all but embeddings, of whatever rank."""
    layers = find_layers(model, layers=lambda layer: layer.kind != "embedding", **options).layers
    return {name: layer.kind for name, layer in layers.items()}


def wrong_kinds(model, expected):
    """Return the parameters with another kind than the first pattern in their names says, and how many there are."""
    wrong, count = {}, 0
    for name, kind in infer_kinds(model).items():
        pattern = next((pattern for pattern in expected if re.search(pattern, name)), "")
        if pattern and expected[pattern] is None:
            continue
        count += 1
        if kind != expected.get(pattern):
            wrong[name] = kind
    return wrong, count
