"""The paper's convolutional networks and its MLP in plain PyTorch, with a width: small ones run on small images.

Names of layers and initial weights of the convolutions are torchvision's, whose pretrained weights load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.paper.archives import Archive, fetch

RESNET50_WEIGHTS = Archive(
    "resnet50-0676ba61.pth",
    "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "sha256:0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
)
"""torchvision's `ResNet50_Weights.IMAGENET1K_V1`."""

Stem = Literal["cifar", "imagenet"]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around a skip connection. He et al., arXiv 1512.03385, figure 5 left."""

    expansion = 1

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _skip(channels_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) -> (N, channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """Convolutions 1 x 1, 3 x 3, 1 x 1 around a skip connection, figure 5 right; the second one has the stride."""

    expansion = 4

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        channels_out = self.expansion * channels
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.downsample = _skip(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) -> (N, 4 channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _skip(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    if stride == 1 and channels_in == channels_out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out))


class ResNet(nn.Module):
    """A ResNet of four stages.

    Args:
        block: of which kind its blocks are.
        depths: how many blocks each stage has.
        classes: how many.
        width: channels of the first stage's 3 x 3 convolutions; each later stage has twice as many.
        channels: of the images.
        stem: "cifar", one 3 x 3 convolution; "imagenet", 7 x 7 and pooling, which shrink the image fourfold.

    Raises:
        ValueError: for another stem, or not four depths.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        classes: int,
        *,
        width: int = 64,
        channels: int = 3,
        stem: Stem = "imagenet",
    ) -> None:
        super().__init__()
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem must be 'cifar' or 'imagenet', got {stem!r}")
        if len(depths) != 4:
            raise ValueError(f"depths must be the numbers of blocks of four stages, got {list(depths)}")
        small = stem == "cifar"
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False) if small else _large_stem(channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        features = width
        for i, depth in enumerate(depths):
            blocks: list[nn.Module] = []
            for j in range(depth):
                blocks.append(block(features, width << i, stride=2 if i and not j else 1))
                features = block.expansion * (width << i)
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(features, classes)
        _initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, channels, H, W) -> logits (N, classes)."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def _large_stem(channels: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 7, 2, 3, bias=False)


def _initialise_convolutions(model: nn.Module) -> None:
    """He et al., arXiv 1502.01852, in the backward form, as torchvision does."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def resnet18(
    classes: int = 10,
    *,
    width: int = 64,
    depths: Sequence[int] = (2, 2, 2, 2),
    channels: int = 3,
    stem: Stem = "cifar",
) -> ResNet:
    """ResNet-18; for CIFAR-10 with 11,173,962 parameters."""
    return ResNet(BasicBlock, depths, classes, width=width, channels=channels, stem=stem)


def resnet50(
    classes: int = 200,
    *,
    width: int = 64,
    depths: Sequence[int] = (3, 4, 6, 3),
    channels: int = 3,
    stem: Stem = "imagenet",
) -> ResNet:
    """ResNet-50; for Tiny-ImageNet's 200 classes with ImageNet's stem, as the paper has it."""
    return ResNet(Bottleneck, depths, classes, width=width, channels=channels, stem=stem)


def pretrained_resnet50(
    folder: str | Path | None = None, *, archive: Archive = RESNET50_WEIGHTS, download: bool = True
) -> ResNet:
    """ResNet-50 with torchvision's weights for ImageNet-1K, found or downloaded as `examples.paper.data` says.

    Raises:
        ArchiveError: if the file is absent or not the published one.
    """
    model = resnet50(1000)
    weights = torch.load(fetch(archive, folder, download=download), map_location="cpu", weights_only=True)
    model.load_state_dict(weights)
    return model


class VGG11(nn.Module):
    """VGG-11 without normalisation, and a head of two layers: the paper's, for CIFAR-10 with 9,354,378 parameters.

    Simonyan and Zisserman, arXiv 1409.1556, table 1, column A.

    Args:
        classes: how many.
        width: channels of the first convolution, 1/8 of the last one's.
        channels: of the images.
        dropout: in the head.
    """

    def __init__(self, classes: int = 10, *, width: int = 64, channels: int = 3, dropout: float = 0.5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage in ((width,), (2 * width,), (4 * width,) * 2, (8 * width,) * 2, (8 * width,) * 2):
            for features in stage:
                layers += [nn.Conv2d(channels, features, 3, padding=1), nn.ReLU()]
                channels = features
            # Sizes that are powers of two are halved; a single pixel, where images are small, stays one.
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(8 * width, 4 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4 * width, classes)
        )
        _initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, channels, H, W) -> logits (N, classes)."""
        return self.classifier(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


def mlp(inputs: int, classes: int, *, width: int = 512, depth: int = 1) -> nn.Sequential:
    """ReLU layers on flattened images.

    Args:
        inputs: entries of an image.
        classes: how many.
        width: of each hidden layer.
        depth: hidden layers.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))
