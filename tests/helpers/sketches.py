"""Networks that a sketch draws for, and its estimates over many seeds."""

from __future__ import annotations

import torch
from cases import CASES, Attention, Case, Frames, TiedLM, cross_entropy, frames, token_loss
from torch import nn

from lightning_spectral import measure_spectra
from lightning_spectral import options as options_module
from lightning_spectral.curvature import selection as select
from lightning_spectral.curvature import sketch as sketch_module
from lightning_spectral.curvature.sketch import SketchCurvature
from lightning_spectral.distributed.process_group import SINGLE_PROCESS
from lightning_spectral.layers.matrices import find_layers
from lightning_spectral.measurement.directions import leading_directions
from lightning_spectral.measurement.gradients import sum_gradients
from lightning_spectral.measurement.setup import isolated_copy, set_up_objective
from lightning_spectral.options import Options


def with_method(monkeypatch, method):
    monkeypatch.setitem(select.METHODS, "test", lambda: method)
    monkeypatch.setattr(options_module, "METHODS", (*options_module.METHODS, "test"))


def gpt_like():
    model = TiedLM()
    model.head = nn.Linear(8, 11, bias=False)
    return model


SKETCHED = [
    Case("gpt", gpt_like, lambda: (torch.randint(0, 11, (32, 7)), torch.randint(0, 11, (32, 7))), token_loss,
         {"fused_qkv": ["*.qkv"]}),
    Case("attention", Attention, lambda: (torch.randn(32, 4, 8), torch.randint(0, 5, (32,))), cross_entropy),
    Case("cnn", CASES[5].model, lambda: (torch.randn(32, 4, 5, 5), torch.randint(0, 5, (32,))), cross_entropy),
    Case("frames", lambda: Frames(nn.GELU()), frames(32), cross_entropy),
]  # fmt: skip


def sketched(model, batch, top_k, seeds):
    """Estimates and errors (seeds, directions) by seed, and what double backward finds."""
    layers = find_layers(model).layers
    expected = measure_spectra(model, batch, cross_entropy, curvature="exact", top_k=max(top_k, 3))
    with isolated_copy(model, "eval", "float32", SINGLE_PROCESS) as copy:
        objective = set_up_objective(copy, cross_entropy, [batch], layers, Options(), SINGLE_PROCESS)
        gradients = sum_gradients(objective, objective.full_batches())
        triplets = leading_directions(gradients, [], objective, Options(top_k=max(top_k, 3))).triplets
        directions = {name: t.first(top_k) for name, t in triplets.items()}
        found = [SketchCurvature(seed=seed)(gradients.first, directions) for seed in seeds]
    h = torch.stack([torch.cat([f.h[name] for name in layers]) for f in found])
    nothing = torch.zeros(top_k, dtype=torch.float64)
    stderr = torch.stack([torch.cat([f.stderr.get(name, nothing) for name in layers]) for f in found])
    return h, stderr, torch.cat([layer.h[:top_k] for layer in expected.layers.values()])


def without_limit(monkeypatch):
    """As many draws as are asked for, whatever products they take."""
    monkeypatch.setattr(sketch_module, "PRODUCTS", 10**6)


def many(n=48):
    return lambda: (torch.randn(n, 6), torch.randint(0, 5, (n,)))
