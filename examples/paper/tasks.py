"""What config files may name: data sets and networks; with two tasks made of data that is at hand."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.paper.archives import data_folder
from examples.paper.attention import GPT, ViT
from examples.paper.data import Images, Parts, cifar10, cifar100, digits_parts, fixed_order, image_parts
from examples.paper.imagenet import imagenet_batch, synthetic_batch, tiny_imagenet
from examples.paper.networks import VGG11, mlp, pretrained_resnet50, resnet18, resnet50
from examples.paper.text import python_source, text_file, token_file
from lightning_spectral.demo.networks import CHARACTERS, digits

PAIRS = 4000
MODULES = 10


def digit_pairs(pairs: int = PAIRS) -> Parts:
    """Two digits side by side, images (1, 8, 16) of 100 classes: the output's size without another kind of image.

    No digit is in two parts.
    """
    images, labels = digits().tensors
    order = fixed_order(len(labels))
    cut = round(0.2 * len(labels))
    test, training = order[:cut], order[cut:]

    def drawn(rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        left, right = rows[torch.randint(len(rows), (2, n), generator=generator)]
        return torch.cat([images[left], images[right]], 3), 10 * labels[left] + labels[right]

    return image_parts(
        "digit_pairs", drawn(training, pairs), drawn(test, pairs // 5), classes=100, scale=None, padding=0, flip=False
    )


def python_modules(length: int = 64) -> Parts:
    """Windows of the standard library's longest modules, to be told apart: a classification of the LM's text.

    Windows (length,) of characters; the classes are the ten longest files.
    """
    index = {character: i for i, character in enumerate(CHARACTERS)}
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"), key=lambda path: (-path.stat().st_size, path))
    windows, labels = [], []
    for label, path in enumerate(files[:MODULES]):
        text = path.read_text(encoding="utf-8", errors="replace")
        codes = torch.tensor([index[character] for character in text if character in index])
        windows.append(codes[: len(codes) // length * length].view(-1, length))
        labels.append(torch.full((len(windows[-1]),), label))
    inputs, targets = torch.cat(windows), torch.cat(labels)
    order = fixed_order(len(targets))
    cut = round(0.2 * len(targets))
    test, training = ((inputs[rows], targets[rows]) for rows in (order[:cut], order[cut:]))
    return image_parts("python_modules", training, test, classes=MODULES, scale=None, padding=0, flip=False)


def batch_parts(batch: tuple[Tensor, Tensor], classes: int) -> Parts:
    """One batch as a data set, for networks that are measured and not trained."""
    part = Images(*batch)
    return Parts("batch", part, part, part, classes, part)


class GPTClassifier(nn.Module):
    """A GPT that classifies a window by the mean of its logits over positions.

    Args:
        classes: how many.
        vocabulary: number of tokens.
        options: of `GPT`, untied.
    """

    def __init__(self, classes: int, vocabulary: int = len(CHARACTERS), **options: Any) -> None:
        super().__init__()
        self.gpt = GPT(vocabulary, **options, tied=False)
        self.gpt.head = nn.Linear(self.gpt.head.in_features, classes, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T) -> logits (N, classes)."""
        return self.gpt(tokens).mean(1)  # type: ignore[no-any-return]


def without_layer_norm(network: nn.Module) -> None:
    """Put the identity in the place of every LayerNorm."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, nn.Identity())


DATA: Mapping[str, Callable[..., Parts]] = {
    "digits": digits_parts,
    "digit_pairs": digit_pairs,
    "python_source": python_source,
    "python_modules": python_modules,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "tiny_imagenet": tiny_imagenet,
    "text_file": lambda path, **options: text_file(data_folder() / path, **options),
    "token_file": lambda path, **options: token_file(data_folder() / path, **options),
    "imagenet": lambda **options: batch_parts(imagenet_batch(**options), 1000),
    "synthetic": lambda **options: batch_parts(synthetic_batch(**options), 1000),
}
"""Name -> (arguments) -> the data set. Archives and texts lie in `archives.data_folder()`."""

TEXT = ("python_source", "text_file", "token_file")
"""Data to be predicted token by token."""

NETWORKS: Mapping[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "vgg11": VGG11,
    "vit": ViT,
    "mlp": lambda classes, inputs, **options: mlp(inputs, classes, **options),
    "gpt": GPT,
    "gpt_classifier": GPTClassifier,
    "pretrained_resnet50": lambda _: pretrained_resnet50(),
}
"""Name -> (number of classes or tokens, arguments) -> the network."""
