"""Small networks and losses as other people write them: MLPs, CNNs, a U-Net and autoencoders.

Each function of `NETWORKS` returns a network after some steps of training, its batch, and the loss of both. Where
a loss has a name in torch, some of them use it and some write it by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_spectral.demo.networks import digits

Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch], Tensor]
Network = tuple[nn.Module, Batch, Loss]


ROWS = 1024
"""Batch of an MLP: of few rows its step is as short as what a measurement does once."""


def fitted(model: nn.Module, data: Batch, loss: Loss, samples: int, steps: int = 40, lr: float = 2e-3) -> Network:
    """Train on random batches of the rows of the data; return the network in eval mode and a batch of the first."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    model.train()
    for _ in range(steps):
        rows = torch.randperm(len(data[0]))[:samples]
        optimizer.zero_grad()
        loss(model, tuple(part[rows] for part in data)).backward()
        optimizer.step()
    return model.eval(), tuple(part[:samples].clone() for part in data), loss


def teacher(n_in: int, n_out: int, rows: int = 4 * ROWS) -> Batch:
    """Draw inputs, and what a random network with tanh makes of them, of about unit variance."""
    x = torch.randn(rows, n_in)
    hidden = torch.tanh(x @ torch.randn(n_in, 32) / n_in**0.5 * 2)
    return x, hidden @ torch.randn(32, n_out) / 32**0.5 * 1.5


def images(classes: int, rows: int, size: int = 16) -> Batch:
    """Draw noisy copies of a smooth random picture (3, size, size) per class, and the classes."""
    pictures = F.interpolate(torch.randn(classes, 3, 8, 8), size=size, mode="bilinear")
    labels = torch.randint(0, classes, (rows,))
    return pictures[labels] + 0.5 * torch.randn(rows, 3, size, size), labels


def digit_images() -> Batch:
    """Return the images (1, 8, 8) and labels of the digits, in random order."""
    order = torch.randperm(1797)
    return tuple(part[order] for part in digits().tensors)


def mlp(
    n_in: int, n_out: int, activation: type[nn.Module] = nn.ReLU, width: int = 128, depth: int = 3
) -> nn.Sequential:
    """Return linear layers with an activation between them."""
    sizes = [n_in, *[width] * depth]
    hidden = [part for m, n in pairwise(sizes) for part in (nn.Linear(m, n), activation())]
    return nn.Sequential(*hidden, nn.Linear(width, n_out))


def cnn(channels: int, classes: int, width: int = 32, norm: bool = True) -> nn.Sequential:
    """Return four convolutions with ReLU, two of them followed by max pooling, and a head."""
    layers: list[nn.Module] = []
    for i, (c_in, c_out) in enumerate([(channels, width), (width, width), (width, 2 * width), (2 * width, 2 * width)]):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out) if norm else nn.Identity(), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i % 2 else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes))


def cnn_nll() -> Network:
    """Train a CNN that ends in log_softmax on the negative log-likelihood."""
    model = nn.Sequential(cnn(1, 10, norm=False), nn.LogSoftmax(1))
    return fitted(model, digit_images(), lambda m, b: F.nll_loss(m(b[0]), b[1]), 128)


def mlp_bce() -> Network:
    """Train an MLP that ends in a sigmoid on the binary cross-entropy of 12 labels."""
    x, y = teacher(32, 12)
    model = nn.Sequential(mlp(32, 12), nn.Sigmoid())
    return fitted(model, (x, (y > 0).float()), lambda m, b: F.binary_cross_entropy(m(b[0]), b[1]), ROWS)


def mlp_binary() -> Network:
    """Train an MLP with one output that ends in a sigmoid, on a small batch."""
    x, y = teacher(32, 1)
    model = nn.Sequential(mlp(32, 1), nn.Sigmoid())
    return fitted(model, (x, (y[:, 0] > 0).float()), lambda m, b: F.binary_cross_entropy(m(b[0]).squeeze(1), b[1]), 128)


def mlp_huber() -> Network:
    """Train an MLP on Huber's loss."""
    return fitted(mlp(32, 12), teacher(32, 12), lambda m, b: F.huber_loss(m(b[0]), b[1], delta=0.5), ROWS)


def mlp_smooth_l1() -> Network:
    """Train an MLP on the smooth L1 loss."""
    return fitted(mlp(32, 12), teacher(32, 12), lambda m, b: F.smooth_l1_loss(m(b[0]), b[1]), ROWS)


def mlp_squares() -> Network:
    """Train an MLP on squares written by hand, with a penalty on the outputs."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        output = model(batch[0])
        return ((output - batch[1]) ** 2).sum(dim=1).mean() + 0.01 * output.pow(2).mean()

    return fitted(mlp(32, 12), teacher(32, 12), loss, ROWS)


class TwoHeads(nn.Module):
    """A ReLU trunk with a head for the mean and one for the log-variance."""

    def __init__(self, n_in: int, n_out: int, width: int = 128) -> None:
        super().__init__()
        self.trunk = nn.Sequential(mlp(n_in, width, width=width, depth=2), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(width, n_out), nn.Linear(width, n_out)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance."""
        hidden = self.trunk(x)
        return self.mean(hidden), self.log_variance(hidden)


def gaussian_nll() -> Network:
    """Train two heads on the Gaussian negative log-likelihood, of noise that grows with the first input."""
    x, y = teacher(32, 8)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        mean, log_variance = model(batch[0])
        return 0.5 * (log_variance + (batch[1] - mean) ** 2 * torch.exp(-log_variance)).mean()

    return fitted(TwoHeads(32, 8), (x, y + torch.randn_like(y) * x[:, :1].exp() / 3), loss, ROWS)


def poisson_nll() -> Network:
    """Train an MLP on counts."""
    x, y = teacher(32, 12)
    counts = torch.poisson(y.clamp(max=3).exp())
    return fitted(mlp(32, 12), (x, counts), lambda m, b: F.poisson_nll_loss(m(b[0]), b[1], log_input=True), ROWS)


def focal() -> Network:
    """Train a CNN on the focal loss of the digits, one label against the rest each."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits, labels = model(batch[0]), F.one_hot(batch[1], 10).float()
        entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        right = torch.exp(-entropy)
        return ((0.25 * labels + 0.75 * (1 - labels)) * (1 - right) ** 2 * entropy).sum(1).mean()

    return fitted(cnn(1, 10), digit_images(), loss, 128)


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy over the last dimension of the output."""
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def cnn_100() -> Network:
    """Train a CNN on 100 classes."""
    return fitted(cnn(3, 100, norm=True), images(100, 1024), cross_entropy, 64)


def cnn_1000() -> Network:
    """Train a CNN on 1,000 classes."""
    return fitted(cnn(3, 1000, norm=True), images(1000, 2048), cross_entropy, 64)


class UNet(nn.Module):
    """Two resolutions with a skip between them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down = self._twice(1, width)
        self.middle = self._twice(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge = self._twice(2 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    @staticmethod
    def _twice(c_in: int, c_out: int) -> nn.Sequential:
        convolutions = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1)
        return nn.Sequential(
            convolutions[0], nn.BatchNorm2d(c_out), nn.ReLU(), convolutions[1], nn.BatchNorm2d(c_out), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a logit per pixel."""
        fine = self.down(x)
        coarse = self.up(self.middle(F.max_pool2d(fine, 2)))
        return self.head(self.merge(torch.cat([fine, coarse], dim=1)))  # type: ignore[no-any-return]


def unet() -> Network:
    """Train a U-Net on the bright half of blurred noise (64, 64), with dice and binary cross-entropy."""
    smooth = F.interpolate(torch.randn(256, 1, 8, 8), size=64, mode="bicubic")

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch[0])
        found = torch.sigmoid(logits)
        both, either = (found * batch[1]).sum((1, 2, 3)), (found + batch[1]).sum((1, 2, 3))
        dice = 1 - (2 * both + 1) / (either + 1)
        return dice.mean() + F.binary_cross_entropy_with_logits(logits, batch[1])

    return fitted(UNet(), (smooth + torch.randn_like(smooth), (smooth > 0).float()), loss, 32, steps=30)


def pinball(model: nn.Module, batch: Batch) -> Tensor:
    """Return the quantile loss of 10, 50 and 90 %."""
    found = model(batch[0]).unflatten(1, (3, -1))
    levels = torch.tensor([0.1, 0.5, 0.9])[:, None]
    missing = batch[1][:, None] - found
    return torch.maximum(levels * missing, (levels - 1) * missing).mean()


def pinball_tanh() -> Network:
    """Train an MLP with tanh on three quantiles."""
    return fitted(mlp(32, 36, nn.Tanh), teacher(32, 12), pinball, ROWS)


def pinball_gelu() -> Network:
    """Train an MLP with GELU on three quantiles."""
    return fitted(mlp(32, 36, nn.GELU), teacher(32, 12), pinball, ROWS)


def autoencoder() -> Network:
    """Train a ReLU autoencoder of the digits, with 64 outputs."""
    flat = digit_images()[0].flatten(1)
    model = nn.Sequential(mlp(64, 16, depth=2), nn.ReLU(), mlp(16, 64, depth=2))
    return fitted(model, (flat,), lambda m, b: F.mse_loss(m(b[0]), b[0]), ROWS)


def autoencoder_196() -> Network:
    """Train a ReLU autoencoder of larger digits, with 196 outputs."""
    flat = F.interpolate(digit_images()[0], size=14, mode="bilinear").flatten(1)
    model = nn.Sequential(mlp(196, 24, depth=2), nn.ReLU(), mlp(24, 196, depth=2))
    return fitted(model, (flat,), lambda m, b: F.mse_loss(m(b[0]), b[0]), ROWS)


def lora() -> Network:
    """Train low-rank additions to the frozen layers of an MLP with GELU, for the digits upside down."""
    x, labels = digit_images()
    base = fitted(mlp(64, 10, nn.GELU), (x.flatten(1), labels), cross_entropy, ROWS)[0]
    base.requires_grad_(False)
    model = nn.Sequential(*[LowRank(part) if isinstance(part, nn.Linear) else part for part in base.children()])
    return fitted(model, (x.flip(2).flatten(1), labels), cross_entropy, ROWS, lr=5e-3)


class LowRank(nn.Module):
    """A frozen linear layer and a trained product of rank 8 beside it."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base
        self.lora_a, self.lora_b = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both."""
        return self.base(x) + 2.0 * self.lora_b(self.lora_a(x))  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[], Network]] = {
    function.__name__: function
    for function in (
        cnn_nll,
        mlp_bce,
        mlp_binary,
        mlp_huber,
        mlp_smooth_l1,
        mlp_squares,
        gaussian_nll,
        poisson_nll,
        focal,
        cnn_100,
        cnn_1000,
        unet,
        pinball_tanh,
        pinball_gelu,
        autoencoder,
        autoencoder_196,
        lora,
    )
}
