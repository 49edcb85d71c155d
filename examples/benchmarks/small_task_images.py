"""Small tasks on pictures: scikit-learn's digits, and its two photographs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.ablation.tasks import ThreeParts, fixed
from examples.benchmarks.other_networks import Batch, UNet, cnn, mlp
from examples.benchmarks.other_pairs import VAE
from examples.benchmarks.other_sequences import ViT
from examples.benchmarks.train_runs import Task, classification
from lightning_spectral.demo.networks import digits


class Rows(ThreeParts):
    """Rows of tensors in three parts.

    Args:
        make: draws the tensors.
        batch_size: rows per training step.
        held_out: rows of the validation part, and of the test part.
    """

    def __init__(self, make: Callable[[], Batch], batch_size: int, held_out: int = 350) -> None:
        super().__init__(batch_size, held_out)
        self.make = make

    def samples(self) -> TensorDataset:
        """Return all rows, drawn alike in every run."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return TensorDataset(*self.make())


def noise(module: nn.Module, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Draw normal numbers: others at each training step, always the same ones in evaluation."""
    return torch.randn(shape, generator=None if module.training else fixed())


def noisy_digits(scale: float) -> Batch:
    """Return the digits with noise of this standard deviation on pixels whose own is 1, and the labels."""
    images, labels = digits().tensors
    return images + scale * torch.randn(images.shape), labels


def bright_digits() -> Tensor:
    """Return the digits' 64 pixels, from 0 to 1."""
    images = digits().tensors[0].flatten(1)
    return (images - images.min()) / (images.max() - images.min())


@functools.cache
def photographs() -> Tensor:
    """Return scikit-learn's two photographs (2, 3, 427, 640), from 0 to 1."""
    from sklearn.datasets import load_sample_images

    images = [torch.tensor(image) for image in load_sample_images().images]
    return torch.stack(images).permute(0, 3, 1, 2).float() / 255


def crops(size: int, rows: int) -> Tensor:
    """Return squares of the photographs, none of which overlap."""
    squares = photographs().unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    return squares[torch.randperm(len(squares))[:rows]]


class VariationalLoss(nn.Module):
    """A VAE whose draws are fixed in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = VAE()

    def forward(self, x: Tensor) -> Tensor:
        """Return the negative evidence lower bound per image, in nats."""
        hidden = self.vae.encoder(x)
        mean, log_variance = self.vae.mean(hidden), self.vae.log_variance(hidden)
        found = self.vae.decoder(mean + torch.exp(0.5 * log_variance) * noise(self, mean.shape))
        entropy = F.binary_cross_entropy(found, x, reduction="sum")
        divergence = -0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp())
        return (entropy + divergence) / len(x)


def scenes() -> Batch:
    """Return digits of twice their size on grey squares (1, 24, 24) of the photographs, and their strokes' masks."""
    strokes = F.interpolate(digits().tensors[0], size=16, mode="bilinear")[:800] > 0.5
    images, masks = crops(24, 800).mean(1, keepdim=True), torch.zeros(800, 1, 24, 24)
    for mask, stroke in zip(masks, strokes, strict=True):
        top, left = torch.randint(0, 9, (2,)).tolist()
        mask[:, top : top + 16, left : left + 16] = stroke
    light = 0.25 * torch.randn(800, 1, 1, 1)
    return 2 * (images + light * masks + 0.1 * torch.randn_like(images)) - 1, masks


def dice(module: nn.Module, batch: Batch) -> Tensor:
    """Return the soft dice loss and the binary cross-entropy together."""
    logits, masks = module(batch[0]), batch[1]
    found = torch.sigmoid(logits)
    both, either = (found * masks).sum((1, 2, 3)), (found + masks).sum((1, 2, 3))
    return (1 - (2 * both + 1) / (either + 1)).mean() + F.binary_cross_entropy_with_logits(logits, masks)


def info_nce(module: nn.Module, batch: Batch) -> Tensor:
    """Return InfoNCE of two noisy views of each image, one of them moved by a pixel."""
    images = batch[0]
    views = torch.cat([images, torch.roll(images, 1, dims=3)])
    z = F.normalize(module(views + 0.5 * noise(module, views.shape)), dim=1)
    n = len(images)
    similar = (z @ z.T / 0.2).masked_fill(torch.eye(2 * n, dtype=torch.bool), float("-inf"))
    return F.cross_entropy(similar, (torch.arange(2 * n) + n) % (2 * n))


def real_and_false() -> Batch:
    """Return the digits' pixels, and draws from a normal distribution with their mean and covariance."""
    real = digits().tensors[0].flatten(1)
    covariance = torch.cov(real.T) + 1e-3 * torch.eye(64)
    return real, real.mean(0) + torch.randn(real.shape) @ torch.linalg.cholesky(covariance).T


def critic_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Return the Wasserstein critic's loss with gradient penalty (arXiv 1704.00028)."""
    real, false = batch
    share = torch.rand(len(real), 1, generator=None if module.training else fixed())
    with torch.enable_grad():
        between = (share * real + (1 - share) * false).requires_grad_()
        (slope,) = torch.autograd.grad(module(between).sum(), between, create_graph=module.training)
    penalty = (slope.norm(dim=1) - 1).square().mean()
    return module(false).mean() - module(real).mean() + 10 * penalty


class Denoiser(nn.Module):
    """Predict the noise in 64 pixels at a time from 0 to 1."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.net = mlp(64 + 16, 64, nn.SiLU, width)
        self.register_buffer("frequencies", 2.0 ** torch.arange(8))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return the noise of each row of x at its time (N, 1)."""
        phases = time * self.frequencies
        return self.net(torch.cat([x, phases.sin(), phases.cos()], dim=1))  # type: ignore[no-any-return]


def diffusion_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Return the squared error of the predicted noise, on a cosine schedule (arXiv 2102.09672)."""
    x = batch[0]
    time = torch.rand(len(x), 1, generator=None if module.training else fixed())
    added = noise(module, x.shape)
    angle = time * torch.pi / 2
    return F.mse_loss(module(angle.cos() * x + angle.sin() * added, time), added)


def digits_of(labels: range, scale: float) -> Batch:
    """Return the noisy digits with one of these labels, counted from 0."""
    images, found = noisy_digits(scale)
    chosen = (found >= labels.start) & (found < labels.stop)
    return images[chosen], found[chosen] - labels.start


@functools.cache
def trained_on_low_digits() -> nn.Module:
    """Return a CNN after 100 steps on the digits 0 to 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        (images, labels), network = digits_of(range(5), 1.0), cnn(1, 5, width=16)
        optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
        for _ in range(100):
            rows = torch.randint(len(labels), (32,))
            optimizer.zero_grad()
            classification(network, (images[rows], labels[rows])).backward()
            optimizer.step()
    return network


def fine_tuned() -> nn.Module:
    """Return that CNN with a new head."""
    network = copy.deepcopy(trained_on_low_digits())
    network[-1] = nn.Linear(32, 5)  # type: ignore[operator]
    return network


class NoiseLeft(nn.Module):
    """Three convolutions that take noise of a tenth off photographs."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(m, n, 3, padding=1) for m, n in ((3, width), (width, width), (width, 3))]
        self.net = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x: Tensor) -> Tensor:
        """Return the share of the noise's variance that is left."""
        noisy = x + 0.1 * noise(self, x.shape)
        return F.mse_loss(noisy - 0.1 * self.net(noisy - 0.5), x) / 0.01


class Coordinates(nn.Module):
    """From a place in a picture to its colour, by Fourier features (arXiv 2006.10739)."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.register_buffer("frequencies", 6 * torch.randn(2, 32, generator=fixed()))
        self.net = mlp(64, 3, width=width)

    def forward(self, places: Tensor) -> Tensor:
        """Return colours (N, 3) of places (N, 2)."""
        phases = places @ self.frequencies
        return self.net(torch.cat([phases.sin(), phases.cos()], dim=1))  # type: ignore[no-any-return]


def places_and_colours(size: int = 80) -> Batch:
    """Return the places of a part of a photograph, from -1 to 1, and their colours, standardised."""
    part = F.interpolate(photographs()[1:, :, :320, :320], size=size, mode="area")[0]
    line = torch.linspace(-1, 1, size)
    places = torch.cartesian_prod(line, line)
    return places, ((part - part.mean()) / part.std()).flatten(1).T


def squared_error(module: nn.Module, batch: Batch) -> Tensor:
    """Return the mean squared error of the second tensor."""
    return F.mse_loss(module(batch[0]), batch[1])


def own_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Return what the module returns, a loss of its own."""
    return module(batch[0])  # type: ignore[no-any-return]


def encoder() -> nn.Module:
    """Return a CNN and a projection to 32 numbers."""
    return nn.Sequential(cnn(1, 64, width=12, norm=False), nn.ReLU(), nn.Linear(64, 32))


TASKS: dict[str, Task] = {
    "images": Task(
        lambda: cnn(1, 10, width=12), lambda: Rows(lambda: noisy_digits(1.0), 32), classification, steps=150
    ),
    "vision transformer": Task(ViT, lambda: Rows(lambda: noisy_digits(0.5), 32), classification, steps=120),
    "autoencoder": Task(VariationalLoss, lambda: Rows(lambda: (bright_digits(),), 64), own_loss, steps=300),
    "segmentation": Task(lambda: UNet(8), lambda: Rows(scenes, 16, 200), dice, steps=120),
    "contrastive": Task(encoder, lambda: Rows(lambda: (digits().tensors[0],), 64, 256), info_nce, steps=150),
    "critic of a GAN": Task(lambda: mlp(64, 1, nn.SiLU), lambda: Rows(real_and_false, 64), critic_loss, steps=300),
    "diffusion": Task(Denoiser, lambda: Rows(lambda: (digits().tensors[0].flatten(1),), 64), diffusion_loss, steps=300),
    "fine-tuning": Task(
        fine_tuned, lambda: Rows(lambda: digits_of(range(5, 10), 1.0), 32, 200), classification, steps=100
    ),
    "denoising": Task(NoiseLeft, lambda: Rows(lambda: (crops(16, 1500),), 16, 300), own_loss, steps=200),
    "coordinates": Task(Coordinates, lambda: Rows(places_and_colours, 128, 1000), squared_error, steps=300),
}
"""Kind -> task."""
