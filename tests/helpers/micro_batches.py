"""Networks and losses that are measured in micro-batches: in float64, on vectors with labels."""

import torch
import torch.nn.functional as F
from torch import nn

SAMPLES = 48


def relu_mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))


def gelu_mlp():
    sizes = (6, 8, 8, 8, 5)
    layers = [part for i in range(4) for part in (nn.Linear(sizes[i], sizes[i + 1]), nn.GELU())]
    return nn.Sequential(*layers[:-1])


def batch_of(samples=SAMPLES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 5, (samples,), generator=generator)


def summed(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def ignoring(model, batch):
    """A mean over the targets that count, of which pieces hold different numbers."""
    return F.cross_entropy(model(batch[0]), batch[2])
