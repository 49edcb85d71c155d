"""Tiny-ImageNet, read straight from its zip, and the validation images of ImageNet-1K. Both need Pillow.

tiny-imagenet-200.zip is looked for as `examples.paper.data` says, and downloaded. ImageNet-1K is not to be downloaded
without an account: get ILSVRC2012_img_val.tar from https://image-net.org and sort it into a folder per class.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.paper.archives import LARGEST_MEMBER, Archive, ArchiveError, data_folder, fetch
from examples.paper.data import Parts, Scale, fixed_order, image_parts, standardised

TINY_IMAGENET = Archive(
    "tiny-imagenet-200.zip",
    "https://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "md5:90528d7ca1a48142e341f4ef8d21d0de",
)
TINY_SIZE = 64
TINY_IMAGENET_SCALE = Scale((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821))

IMAGENET_SCALE = Scale((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Of torchvision's pretrained networks, with their sizes: `ResNet50_Weights.IMAGENET1K_V1.transforms()`."""
RESIZE, CROP = 256, 224
IMAGENET_CLASSES = 1000

ROOT = "tiny-imagenet-200/"
TRAINING_IMAGE = re.compile(re.escape(ROOT) + r"train/(n\d+)/images/[^/]+\.JPEG")
CLASS_FOLDER = re.compile(r"n\d{8}")


def tiny_imagenet(
    folder: str | Path | None = None, *, archive: Archive = TINY_IMAGENET, download: bool = True
) -> Parts:
    """Tiny-ImageNet: 90,000, 10,000 and 10,000 images (3, 64, 64) of 200 classes, in the order of their WordNet ids.

    Its test part is the published validation part, for the labels of the test images are not published. The images
    take 1.4 GB of memory.

    Raises:
        ArchiveError: if the file is absent or not the published one.
        ImportError: without Pillow.
    """
    _pillow()
    path = fetch(archive, folder, download=download)
    try:
        with zipfile.ZipFile(path) as file:
            classes = sorted(_member(file, f"{ROOT}wnids.txt").decode().split())
            index = {name: i for i, name in enumerate(classes)}
            training = [(m[0], index[m[1]]) for m in map(TRAINING_IMAGE.fullmatch, sorted(file.namelist())) if m]
            rows = _member(file, f"{ROOT}val/val_annotations.txt").decode().splitlines()
            held_out = [(f"{ROOT}val/images/{row.split()[0]}", index[row.split()[1]]) for row in rows]
            parts = [_read(file, images) for images in (training, held_out)]
    except (zipfile.BadZipFile, zlib.error, KeyError, IndexError, UnicodeDecodeError) as error:
        raise ArchiveError(f"{path} does not hold Tiny-ImageNet ({type(error).__name__}: {error})") from error
    return image_parts("tiny_imagenet", *parts, classes=len(classes), scale=TINY_IMAGENET_SCALE)


def _member(file: zipfile.ZipFile, name: str) -> bytes:
    # Read in memory: no name in the archive becomes a path on the disk.
    if file.getinfo(name).file_size > LARGEST_MEMBER:
        raise ArchiveError(f"{file.filename}: {name} has more than {LARGEST_MEMBER} bytes")
    return file.read(name)


def _read(file: zipfile.ZipFile, images: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
    def exact(image: Any) -> Any:
        if image.size != (TINY_SIZE, TINY_SIZE):
            raise ValueError(f"its size must be {TINY_SIZE} x {TINY_SIZE}, found {image.size}")
        return image

    encoded = ((f"{file.filename}: {name}", _member(file, name)) for name, _ in images)
    return decoded(encoded, len(images), TINY_SIZE, exact), torch.tensor([label for _, label in images])


def decoded(encoded: Iterable[tuple[str, bytes]], n: int, size: int, fit: Callable[[Any], Any]) -> Tensor:
    """n JPEGs as bytes (n, 3, size, size), grey ones in colour.

    Args:
        encoded: what an error names, and the file's content.
        n: how many.
        size: height and width.
        fit: makes an image of Pillow's that large. It is called before the pixels are decoded.

    Raises:
        ArchiveError: if one is no JPEG, or is refused by ``fit``.
    """
    image_module = _pillow()
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    for out, (name, data) in zip(images, encoded, strict=True):
        try:
            with image_module.open(io.BytesIO(data), formats=["JPEG"]) as image:
                pixels = fit(image).convert("RGB").tobytes()
        except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
            raise ArchiveError(f"{name} is not the image it should be ({error})") from error
        out.copy_(torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1))
    return images


def imagenet_batch(
    folder: str | Path | None = None, *, samples: int = 2048, classes: int = IMAGENET_CLASSES
) -> tuple[Tensor, Tensor]:
    """Validation images of ImageNet-1K (samples, 3, 224, 224), standardised, and labels: random ones, always the same.

    Resized, cut and numbered as torchvision's pretrained networks expect: 256 pixels for the shorter side, the middle
    224, classes in the order of their WordNet ids.

    Args:
        folder: holds a folder per class, `n01440764` and so on, with its images; None: `imagenet/val` in the data
            folder.
        samples: how many.
        classes: how many folders there must be.

    Raises:
        ArchiveError: if the folder is absent or is not so sorted, or holds fewer images.
        ImportError: without Pillow.
    """
    _pillow()
    root = data_folder() / "imagenet" / "val" if folder is None else Path(folder).expanduser()
    names = sorted(p.name for p in root.iterdir() if CLASS_FOLDER.fullmatch(p.name)) if root.is_dir() else []
    if len(names) != classes:
        raise ArchiveError(
            f"{root} must hold a folder per class of ImageNet-1K, {classes} named n01440764 and so on, found "
            f"{len(names)}; get ILSVRC2012_img_val.tar from https://image-net.org, sort its images by class, and name "
            "its folder imagenet/val in the data folder (--data)"
        )
    images = [(path, label) for label, name in enumerate(names) for path in sorted((root / name).iterdir())]
    if len(images) < samples:
        raise ArchiveError(f"samples: {samples} images were asked for, and {root} holds {len(images)}; take fewer")
    chosen = [images[i] for i in fixed_order(len(images))[:samples].tolist()]
    encoded = ((str(path), path.read_bytes()) for path, _ in chosen)
    pixels = decoded(encoded, samples, CROP, middle)
    return standardised(pixels, IMAGENET_SCALE), torch.tensor([label for _, label in chosen])


def middle(image: Any) -> Any:
    """The middle 224 x 224 pixels of an image of Pillow's whose shorter side is made 256 long."""
    width, height = image.size
    short = min(width, height)
    width, height = RESIZE * width // short, RESIZE * height // short
    left, top = round((width - CROP) / 2), round((height - CROP) / 2)
    image = image.convert("RGB").resize((width, height), _pillow().Resampling.BILINEAR)
    return image.crop((left, top, left + CROP, top + CROP))


def synthetic_batch(samples: int = 2048, *, classes: int = IMAGENET_CLASSES, size: int = CROP) -> tuple[Tensor, Tensor]:
    """Standard normal images (samples, 3, size, size) and uniform labels, always the same.

    The paper's measurement of the pretrained ResNet-50 was on synthetic images, says its file
    results_imagenet1k_pretrained.json, and not on which.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, size, size, generator=generator)
    return images, torch.randint(classes, (samples,), generator=generator)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('JPEG images need Pillow: pip install "lightning-spectral[paper]"') from error
    return Image
