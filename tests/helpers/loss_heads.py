"""Losses of an output, each with the head of it and its dense Hessian."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lightning_spectral.curvature.autograd_graph import Dependence, find_cut
from lightning_spectral.curvature.head import Head

Y = torch.tensor([0, 2, 4, 1, 3, 0])
Z = torch.randn(6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
CLASSES = torch.tensor([0.5, 1.0, 2.0, 0.1, 1.5], dtype=torch.float64)
SOFT = torch.rand(6, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64).softmax(1)
PIXELS = torch.randn(3, 5, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
LABELS = torch.randint(0, 5, (3, 2, 2), generator=torch.Generator().manual_seed(5))
IMAGE = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
MASK = (torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(8)) > 0.5).double()
MANY = torch.randn(4, 30, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def loss_call(function, target, **options):
    """A weighted sum of the values of a loss, each with a weight of its own."""

    def loss(z):
        value = function(z, target, **options)
        weights = torch.rand(value.shape, generator=torch.Generator().manual_seed(0), dtype=z.dtype) + 0.1
        return (weights * value).sum()

    return loss


def focal(z):
    log_p = z.log_softmax(1).gather(1, Y[:, None])[:, 0]
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


def dice(z):
    p = z.sigmoid()
    return (1 - 2 * (p * MASK).sum((1, 2, 3)) / (p + MASK).sum((1, 2, 3))).mean()


def gaussian_nll(z):
    return F.gaussian_nll_loss(z[:, :2], SOFT[:, :2], z[:, 2:4].exp())


# name: input, loss of it
LOSSES = {
    "hard": (Z, loss_call(F.cross_entropy, Y)),
    "sum": (Z, loss_call(F.cross_entropy, Y, reduction="sum")),
    "none": (Z, loss_call(F.cross_entropy, Y, reduction="none")),
    "weighted": (Z, loss_call(F.cross_entropy, Y, weight=CLASSES)),
    "ignored": (Z, loss_call(F.cross_entropy, Y, ignore_index=4, weight=CLASSES)),
    "smoothed": (Z, loss_call(F.cross_entropy, Y, label_smoothing=0.2, weight=CLASSES, ignore_index=0)),
    "soft": (Z, loss_call(F.cross_entropy, SOFT)),
    "soft_weighted_smoothed": (Z, loss_call(F.cross_entropy, SOFT, weight=CLASSES, label_smoothing=0.1)),
    "pixels": (PIXELS, loss_call(F.cross_entropy, LABELS, ignore_index=1)),
    "pixels_none": (PIXELS, loss_call(F.cross_entropy, LABELS, reduction="none", weight=CLASSES)),
    "many_classes": (MANY, loss_call(F.cross_entropy, Y[:4])),
    "bce": (Z, loss_call(F.binary_cross_entropy_with_logits, SOFT)),
    "bce_weighted": (
        Z,
        loss_call(
            F.binary_cross_entropy_with_logits, SOFT, weight=SOFT + 1, pos_weight=CLASSES, reduction="sum"
        ),
    ),
    "bce_none": (Z, loss_call(F.binary_cross_entropy_with_logits, SOFT, reduction="none")),
    "mse": (Z, loss_call(F.mse_loss, SOFT)),
    "mse_sum": (PIXELS, loss_call(F.mse_loss, PIXELS.flip(0), reduction="sum")),
    "mse_none": (Z, loss_call(F.mse_loss, SOFT, reduction="none")),
    "mse_old": (Z, loss_call(F.mse_loss, SOFT, reduce=True)),
    "mse_broadcast": (Z, loss_call(F.mse_loss, SOFT[:1])),
    "mse_of_itself": (Z, lambda z: F.mse_loss(z, z.flip(1) ** 2)),
    "negative": (Z, lambda z: -F.mse_loss(z, SOFT, reduction="none").sum(1) @ torch.linspace(-1, 1, 6).double()),
    "nll": (Z, lambda z: F.nll_loss(z.log_softmax(1), Y, weight=CLASSES)),
    "bce_of_sigmoid": (Z, lambda z: F.binary_cross_entropy(z.sigmoid(), SOFT)),
    "huber": (Z, lambda z: F.huber_loss(z, SOFT, delta=0.5)),
    "smooth_l1": (Z, lambda z: F.smooth_l1_loss(z, SOFT)),
    "kl": (Z, lambda z: F.kl_div(z.log_softmax(1), SOFT, reduction="batchmean")),
    "gaussian_nll": (Z, gaussian_nll),
    "poisson_nll": (Z, lambda z: F.poisson_nll_loss(z, SOFT)),
    "focal": (Z, focal),
    "dice": (IMAGE, dice),
    "squares": (Z, lambda z: ((z - SOFT) ** 2).mean()),
    "two": (Z, lambda z: F.cross_entropy(z, Y) + 0.5 * F.mse_loss(z, SOFT) / 3),
    "nested": (Z, lambda z: ((z - SOFT) ** 2).mean() + z.pow(4).mean()),
    "squared": (Z[:1], lambda z: F.cross_entropy(z, Y[:1]) ** 2),
}  # fmt: skip


def head_of(name):
    """(the head of the loss, a column in the loss's input by one in its tensors at the cut, the dense Hessian)."""
    z, loss = LOSSES[name]
    dense = torch.autograd.functional.hessian(loss, z).reshape(z.numel(), z.numel())
    leaf = z.clone().requires_grad_()
    output = 1.0 * leaf
    value = loss(output)
    head = Head(value, find_cut(Dependence(value.grad_fn, {id(leaf)}), {"": [output.grad_fn]}), len(z))
    assert head.cut.inside == {""}

    def at_input(x):
        return torch.autograd.grad(head.edges, leaf, x, retain_graph=True)[0].flatten()

    return head, at_input, dense
