"""Small networks as other people write them, applied to two views of a sample or more, or with noise in the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.benchmarks.other_networks import ROWS, Batch, Network, cnn, digit_images, fitted, mlp
from examples.benchmarks.other_sequences import ViT


def two_views() -> Batch:
    """Return the digits twice, each moved by up to a pixel and with noise of its own."""

    def view(x: Tensor) -> Tensor:
        moved = [torch.roll(row, tuple(torch.randint(-1, 2, (2,)).tolist()), (1, 2)) for row in x]
        return torch.stack(moved) + 0.3 * torch.randn_like(x)

    x, _ = digit_images()
    return view(x), view(x)


def info_nce(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of telling the two views of an image from all others."""
    z = F.normalize(model(torch.cat([batch[0], batch[1]])), dim=1)
    n = len(batch[0])
    similar = (z @ z.T / 0.5).masked_fill(torch.eye(2 * n, dtype=torch.bool), float("-inf"))
    return F.cross_entropy(similar, (torch.arange(2 * n) + n) % (2 * n))


def simclr() -> Network:
    """Train a CNN by InfoNCE."""
    model = nn.Sequential(cnn(1, 64, norm=False), nn.ReLU(), nn.Linear(64, 32))
    return fitted(model, two_views(), info_nce, 64)


def simclr_vit() -> Network:
    """Train a vision transformer by InfoNCE."""
    return fitted(ViT(32), two_views(), info_nce, 64, steps=60)


class Siamese(nn.Module):
    """An encoder and a predictor, as in SimSiam; with a frozen teacher, as in BYOL."""

    def __init__(self, teacher: bool) -> None:
        super().__init__()
        self.encoder, self.predictor = mlp(64, 32, depth=2), mlp(32, 32, depth=1)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False) if teacher else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prediction and, without gradient, the target."""
        z = self.encoder(x)
        return self.predictor(z), (z if self.teacher is None else self.teacher(x)).detach()


def cosine(model: nn.Module, batch: Batch) -> Tensor:
    """Return two minus two cosines of each view's prediction and the other's target."""
    (p1, z1), (p2, z2) = model(batch[0].flatten(1)), model(batch[1].flatten(1))
    p1, p2, z1, z2 = (F.normalize(part, dim=-1) for part in (p1, p2, z1, z2))
    return (4 - 2 * (p1 * z2).sum(-1) - 2 * (p2 * z1).sum(-1)).mean()


def simsiam() -> Network:
    """Train SimSiam: an encoder called once per view."""
    return fitted(Siamese(teacher=False), two_views(), cosine, ROWS)


def byol() -> Network:
    """Train BYOL with the teacher held still."""
    return fitted(Siamese(teacher=True), two_views(), cosine, ROWS)


def barlow_twins() -> Network:
    """Train a CNN towards the identity as cross-correlation of its two views' outputs."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        z1, z2 = (model(view) for view in batch)
        z1, z2 = ((z - z.mean(0)) / (z.std(0) + 1e-5) for z in (z1, z2))
        correlation = z1.T @ z2 / len(z1)
        diagonal = torch.diagonal(correlation)
        return (diagonal - 1).pow(2).sum() + 5e-3 * (correlation.pow(2).sum() - diagonal.pow(2).sum())

    return fitted(nn.Sequential(cnn(1, 64), nn.ReLU(), nn.Linear(64, 48)), two_views(), loss, 128)


def partners(labels: Tensor, same: bool) -> Tensor:
    """Draw for each label the index of another sample of the same label, or of a different one."""
    equal = labels[:, None] == labels
    return torch.multinomial((equal if same else ~equal).float(), 1).squeeze(1)


def contrastive() -> Network:
    """Train an MLP to bring digits of one label together and hold others a margin apart."""
    x, labels = digit_images()
    x = x.flatten(1)
    same = torch.rand(len(x)) < 0.5
    other = torch.where(same, partners(labels, same=True), partners(labels, same=False))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        distance = F.pairwise_distance(model(batch[0]), model(batch[1]))
        same = batch[2]
        return (same * distance.pow(2) + (1 - same) * F.relu(2.0 - distance).pow(2)).mean()

    return fitted(mlp(64, 16), (x, x[other], same.float()), loss, ROWS)


def triplet() -> Network:
    """Train a CNN on triplets: a digit, one of the same label, one of another."""
    x, labels = digit_images()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        anchor, positive, negative = (model(part) for part in batch)
        return F.triplet_margin_loss(anchor, positive, negative, margin=1.0)

    data = x, x[partners(labels, same=True)], x[partners(labels, same=False)]
    return fitted(cnn(1, 32, norm=False), data, loss, 128, lr=5e-4)


class VAE(nn.Module):
    """An encoder to mean and log-variance, and a decoder to probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 96), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(96, 16), nn.Linear(96, 16)
        self.decoder = nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 64), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reconstruction, mean and log-variance."""
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return self.decoder(z), mean, log_variance


def vae() -> Network:
    """Train a variational autoencoder of the digits."""
    x = digit_images()[0].flatten(1)
    x = (x - x.min()) / (x.max() - x.min())

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        found, mean, log_variance = model(batch[0])
        entropy = F.binary_cross_entropy(found, batch[0], reduction="sum")
        divergence = -0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp())
        return (entropy + divergence) / len(batch[0])

    return fitted(VAE(), (x,), loss, ROWS)


NETWORKS: dict[str, Callable[[], Network]] = {
    function.__name__: function
    for function in (simclr, simclr_vit, simsiam, byol, barlow_twins, contrastive, triplet, vae)
}
