"""CIFAR-10, CIFAR-100 and scikit-learn's digits in three parts that no seed changes, with the usual augmentation.

cifar-10-python.tar.gz and cifar-100-python.tar.gz are looked for in the folder given (--data), else in the one that
LIGHTNING_SPECTRAL_DATA names, else in ./paper-data, and downloaded there. The digits need scikit-learn and no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.paper.archives import Archive, fetch, read_batch, tar_members
from lightning_spectral.demo.networks import digits

# Digests: the CIFAR page, https://www.cs.toronto.edu/~kriz/cifar.html.
CIFAR10 = Archive(
    "cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "md5:c58f30108f718f92721af3b95e74349a",
)
CIFAR100 = Archive(
    "cifar-100-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    "md5:eb9058c3a382ffc7106e4002c42a8d85",
)
HELD_OUT = 0.1
"""Share of the published training part that is kept for validation."""

PADDING = 4
"""Pixels: the augmentation of He et al., arXiv 1512.03385, section 4.2."""


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of each channel over all pixels of a training part, as shares of 255."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


CIFAR10_SCALE = Scale((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100_SCALE = Scale((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def standardised(images: Tensor, scale: Scale | None) -> Tensor:
    """Images (N, C, H, W) of bytes, each channel with mean 0 and standard deviation 1; as they are without a scale."""
    if scale is None:
        return images
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (scale.mean, scale.std))
    return (images / 255 - mean) / std


def crop_and_flip(images: Tensor, *, padding: int, flip: bool, generator: torch.Generator | None = None) -> Tensor:
    """Shift each image by up to ``padding`` pixels in both directions, zeros coming in, and mirror half of them.

    Args:
        images: (N, C, H, W) of any type.
        padding: the largest shift.
        flip: whether to mirror.
        generator: of the CPU; None: torch's own.
    """
    n, channels, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, n, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, [padding] * 4).flatten(2)
    # One flat index for all channels: four times as fast as indexing four dimensions.
    pixels = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    return padded.gather(2, pixels.view(n, 1, -1).expand(-1, channels, -1)).view_as(images)


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels, fetched by whole batches: `loader` makes the DataLoader.

    Args:
        images: (N, C, H, W), bytes with a scale, else any.
        labels: (N,).
        rows: which of them; None: all.
        scale: to standardise by.
        padding: shift by up to so many pixels at random, with random numbers of torch's own.
        flip: mirror half of them at random.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        rows: Tensor | None = None,
        scale: Scale | None = None,
        *,
        padding: int = 0,
        flip: bool = False,
    ) -> None:
        self.images, self.labels, self.scale = images, labels, scale
        self.rows = torch.arange(len(labels)) if rows is None else rows
        self.padding, self.flip = padding, flip

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch, which DataLoader takes where it is offered."""
        rows = self.rows[torch.as_tensor(indices)]
        images = self.images[rows]
        if self.padding or self.flip:
            images = crop_and_flip(images, padding=self.padding, flip=self.flip)
        return standardised(images, self.scale), self.labels[rows]


@dataclass(frozen=True)
class Parts:
    """A data set in three parts.

    Attributes:
        name: of the data set.
        train: augmented, where that is usual.
        val: held out of the published training part.
        test: the published test part; where its labels are not published, the validation part.
        classes: how many; of text, the size of its vocabulary.
        plain: the training part without augmentation, to measure on.
    """

    name: str
    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    classes: int
    plain: Dataset[Any]


def image_parts(
    name: str,
    training: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    classes: int,
    scale: Scale | None,
    padding: int = PADDING,
    flip: bool = True,
) -> Parts:
    """The three parts, of which validation is a random tenth of ``training``, always the same."""
    n = len(training[1])
    order, held_out = fixed_order(n), round(HELD_OUT * n)
    train, val = order[held_out:], order[:held_out]
    return Parts(
        name,
        Images(*training, train, scale, padding=padding, flip=flip),
        Images(*training, val, scale),
        Images(*test, scale=scale),
        classes,
        Images(*training, train, scale),
    )


def fixed_order(n: int) -> Tensor:
    """A permutation of n that no seed of a run changes."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def cifar10(folder: str | Path | None = None, *, archive: Archive = CIFAR10, download: bool = True) -> Parts:
    """CIFAR-10: 45,000, 5,000 and 10,000 images (3, 32, 32) of 10 classes. Raises ArchiveError without the file."""
    folder_in = "cifar-10-batches-py"
    batches = [f"{folder_in}/data_batch_{i}" for i in range(1, 6)]
    training, test = _cifar(fetch(archive, folder, download=download), batches, f"{folder_in}/test_batch", b"labels")
    return image_parts("cifar10", training, test, classes=10, scale=CIFAR10_SCALE)


def cifar100(folder: str | Path | None = None, *, archive: Archive = CIFAR100, download: bool = True) -> Parts:
    """CIFAR-100, likewise, with its 100 fine labels."""
    folder_in = "cifar-100-python"
    path = fetch(archive, folder, download=download)
    training, test = _cifar(path, [f"{folder_in}/train"], f"{folder_in}/test", b"fine_labels")
    return image_parts("cifar100", training, test, classes=100, scale=CIFAR100_SCALE)


def _cifar(
    path: Path, training: Sequence[str], test: str, labels: bytes
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    members = tar_members(path, [*training, test])
    read = [read_batch(members[name], labels, f"{path}: {name}") for name in training]
    images, numbers = zip(*read, strict=True)
    return (torch.cat(images), torch.cat(numbers)), read_batch(members[test], labels, f"{path}: {test}")


def digits_parts() -> Parts:
    """scikit-learn's digits, images (1, 8, 8) of 10 classes: 1,294, 144 and 359. Not augmented."""
    images, labels = digits().tensors
    order = fixed_order(len(labels))
    images, labels, cut = images[order], labels[order], round(0.2 * len(labels))
    training, test = (images[cut:], labels[cut:]), (images[:cut], labels[:cut])
    return image_parts("digits", training, test, classes=10, scale=None, padding=0, flip=False)


def loader(dataset: Dataset[Any], batch_size: int, *, shuffle: bool = False, workers: int = 0) -> DataLoader[Any]:
    """Batches of a part; whole ones only where they are shuffled.

    Raises:
        ValueError: if shuffled samples do not fill one batch.
    """
    size = len(dataset)  # type: ignore[arg-type]
    if shuffle and size < batch_size:
        raise ValueError(f"batch_size: {batch_size} samples were asked for, and there are {size}; take fewer")
    return DataLoader(
        dataset,
        batch_size,
        shuffle=shuffle,
        drop_last=shuffle,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_as_it_is,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def fixed_batch(dataset: Dataset[Any], samples: int) -> DataLoader[Any]:
    """A loader of one batch of random samples, always the same: `SpectralProbe(batch=fixed_batch(parts.plain, 2048))`.

    Raises:
        ValueError: if there are fewer.
    """
    size = len(dataset)  # type: ignore[arg-type]
    if not 1 <= samples <= size:
        raise ValueError(f"samples: {samples} were asked for, and there are {size}; take 1 to {size}")
    indices = fixed_order(size)[:samples].tolist()
    return DataLoader(dataset, samples, sampler=indices, collate_fn=_as_it_is)
