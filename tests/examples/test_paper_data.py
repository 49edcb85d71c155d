"""The paper's data sets: tiny archives in the published formats read back, and what is not right is refused."""

import io
import os
import pickle
import struct
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace
from hashlib import md5
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from examples.paper import archives, imagenet  # noqa: E402
from examples.paper.archives import Archive, ArchiveError, data_folder, fetch, read_batch, tar_members  # noqa: E402
from examples.paper.data import (  # noqa: E402
    CIFAR10,
    CIFAR10_SCALE,
    CIFAR100,
    Images,
    cifar10,
    cifar100,
    crop_and_flip,
    digits_parts,
    fixed_batch,
    loader,
    standardised,
)
from examples.paper.imagenet import (  # noqa: E402
    TINY_IMAGENET,
    TINY_IMAGENET_SCALE,
    imagenet_batch,
    middle,
    synthetic_batch,
    tiny_imagenet,
)
from examples.paper.text import GPT2_VOCABULARY, python_source, text_file, token_file  # noqa: E402

OWN_10, OWN_100, OWN_TINY = (replace(archive, digest=None) for archive in (CIFAR10, CIFAR100, TINY_IMAGENET))
"""As published, but for files that the tests make themselves."""


class Python2Pickler(pickle._Pickler):
    """Writes all strings as Python 2 wrote its own."""

    def save_string(self, value):
        data = value if isinstance(value, bytes) else value.encode()
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch: ClassVar = pickle._Pickler.dispatch | {bytes: save_string, str: save_string}


def pickled(value):
    """As the published batches: protocol 2, and numpy's module by its name of that time."""
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def batch(n, key, seed=0, order="C"):
    generator = np.random.default_rng(seed)
    data = np.array(generator.integers(256, size=(n, 3072), dtype=np.uint8), order=order)
    return {b"data": data, key: generator.integers(10, size=n).tolist(), b"filenames": [b"a.png"] * n}


def tar(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def cifar_files(n=10, order="C"):
    """Both archives' members, and what is in them."""
    ten = {f"data_batch_{i}": batch(n, b"labels", i, order) for i in range(1, 6)}
    ten["test_batch"] = batch(n, b"labels", 6, order)
    hundred = {name: batch(5 * n, b"fine_labels", seed, order) for name, seed in (("train", 7), ("test", 8))}
    return {f"cifar-10-batches-py/{k}": v for k, v in ten.items()}, {
        f"cifar-100-python/{k}": v for k, v in hundred.items()
    }


@pytest.fixture
def cifar(tmp_path):
    files = cifar_files()
    for archive, members in zip((CIFAR10, CIFAR100), files, strict=True):
        tar(tmp_path / archive.name, {name: pickled(value) for name, value in members.items()})
    return tmp_path, files


# --- archives


@pytest.mark.parametrize(
    ("given", "variable", "expected"), [("x", "y", "x"), (None, "y", "y"), (None, "", "paper-data")]
)
def test_folder_of_the_data(given, variable, expected, monkeypatch):
    monkeypatch.setenv("LIGHTNING_SPECTRAL_DATA", variable)
    assert data_folder(given) == Path(expected)


def test_a_file_is_downloaded_once_and_checked(tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(b"content")
    archive = Archive("file.bin", source.as_uri(), f"md5:{md5(b'content').hexdigest()}")
    path = fetch(archive, tmp_path / "new" / "folder")
    assert path.read_bytes() == b"content"
    assert os.listdir(path.parent) == ["file.bin"]
    source.unlink()
    assert fetch(archive, path.parent) == path
    path.write_bytes(b"contend")
    with pytest.raises(ArchiveError) as refused:
        fetch(archive, path.parent)
    found = md5(b"contend").hexdigest()
    assert str(refused.value) == (
        f"{path} is not the published file: its md5 must be {md5(b'content').hexdigest()}, found {found} (7 bytes); "
        f"delete it and run again, or get it anew from {archive.url}"
    )
    assert fetch(replace(archive, digest=None), path.parent) == path


class Broken(BaseHTTPRequestHandler):
    """Promises 100 bytes and sends 10."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"0123456789")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def broken_server():
    server = HTTPServer(("127.0.0.1", 0), Broken)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/file.bin"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("case", ["absent", "not the published file", "10 of 100 bytes"])
def test_a_download_that_fails_leaves_nothing(case, tmp_path, broken_server):
    source = tmp_path / "source.bin"
    if case != "absent":
        source.write_bytes(b"content")
    url = broken_server if case.startswith("10") else source.as_uri()
    with pytest.raises(ArchiveError, match=case) as refused:
        fetch(Archive("file.bin", url, "md5:0"), tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())
    for part in (str(tmp_path / "data" / "file.bin"), url, "--data", "LIGHTNING_SPECTRAL_DATA"):
        assert part in str(refused.value)


def test_nothing_is_downloaded_where_that_is_forbidden(tmp_path):
    for load in (cifar10, cifar100, tiny_imagenet):
        with pytest.raises(ArchiveError, match=r"is absent; get http"):
            load(tmp_path, download=False)


def test_only_whole_plain_files_are_read_from_a_tar(tmp_path, monkeypatch):
    path = tmp_path / "a.tar.gz"
    with pytest.raises(ArchiveError, match="cannot be read"):
        tar_members(path, ["x"])
    path.write_bytes(b"no archive")
    with pytest.raises(ArchiveError, match=r"cannot be read as a \.tar\.gz"):
        tar_members(path, ["x"])
    tar(path, {"../../x": b"1", "/y": b"22", "z": b"333"})
    before = sorted(tmp_path.rglob("*"))
    assert tar_members(path, ["z", "../../x"]) == {"z": b"333", "../../x": b"1"}
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ArchiveError, match="holds no a, b;"):
        tar_members(path, ["b", "z", "a"])
    monkeypatch.setattr(archives, "LARGEST_MEMBER", 2)
    with pytest.raises(ArchiveError, match="z is no plain file of up to 2 bytes"):
        tar_members(path, ["z"])
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("z")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(ArchiveError, match="z is no plain file"):
        tar_members(path, ["z"])


def test_a_tar_that_breaks_off_is_refused(tmp_path):
    path = tmp_path / "a.tar.gz"
    tar(path, {"x": os.urandom(5000), "y": b"1"})
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ArchiveError, match="cannot be read"):
        tar_members(path, ["x"])


# --- pickles


class Calls:
    """A pickle of it calls a function with arguments."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("function", [os.system, eval, open, os.mkdir, np.load, getattr])
def test_a_pickle_that_calls_anything_is_refused(function, protocol, tmp_path):
    target = tmp_path / "made"
    arguments = {os.system: f"touch {target}", eval: f"open({str(target)!r}, 'w')", open: str(target)}
    data = pickle.dumps({b"data": Calls(function, arguments.get(function, str(target)), "w")}, protocol)
    with pytest.raises(ArchiveError, match=r"b is refused: it asks for \S+, .*do not trust it"):
        read_batch(data, b"labels", "b")
    assert not list(tmp_path.iterdir())


def test_a_pickle_that_asks_for_memory_is_refused():
    array = archives.PickledArray()
    array.__setstate__((1, (1 << 40,), archives.PickledDtype("u1"), False, 1 << 40))
    with pytest.raises(ValueError, match="not of unsigned bytes"):
        array.tensor()


def test_a_digest_is_checked_before_anything_is_read(tmp_path, monkeypatch):
    tar(tmp_path / CIFAR10.name, {})
    monkeypatch.setattr("examples.paper.data.tar_members", None)
    with pytest.raises(ArchiveError, match="its md5 must be c58f30108f718f92721af3b95e74349a, found"):
        cifar10(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "EOFError"),
        (pickled(batch(3, b"labels"))[:-50], "no batch of CIFAR"),
        (pickled([1]), "TypeError"),
        (pickled({b"data": [1]}), "AttributeError"),
        (pickled(batch(3, b"others")), "KeyError"),
        (pickled({b"data": np.zeros((2, 3072), np.float32), b"labels": [1, 2]}), "not of unsigned bytes"),
        (pickled({b"data": np.zeros((2, 3071), np.uint8), b"labels": [1, 2]}), "shape"),
        (pickled({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}), r"2 images and labels of shape \(1,\)"),
        (pickled({b"data": np.zeros((2, 3072), np.uint8), b"labels": [[1], [2]]}), r"shape \(2, 1\)"),
    ],
)
def test_what_is_no_batch_is_refused(content, message):
    with pytest.raises(ArchiveError, match=message):
        read_batch(content, b"labels", "b")


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_batch_is_what_numpy_reads(order):
    values = batch(7, b"labels", order=order)
    images, labels = read_batch(pickled(values), b"labels", "b")
    assert np.array_equal(images.numpy(), values[b"data"].reshape(7, 3, 32, 32))
    assert labels.tolist() == values[b"labels"]
    assert images.is_contiguous()


# --- CIFAR


def rows_of(dataset):
    return dataset.images[dataset.rows], dataset.labels[dataset.rows]


def same_samples(dataset, others, key):
    """Whether the parts hold these batches' samples, in any order."""
    data = torch.cat([torch.from_numpy(other[b"data"]) for other in others])
    labels = torch.tensor([label for other in others for label in other[key]])
    images, numbers = (torch.cat(tensors) for tensors in zip(*map(rows_of, dataset), strict=True))
    found, expected = (
        torch.cat([x.flatten(1), y[:, None]], 1).tolist() for x, y in ((images, numbers), (data, labels))
    )
    return sorted(found) == sorted(expected)


def test_cifar_is_read_back_in_three_parts(cifar):
    folder, (ten, hundred) = cifar
    for load, archive, members, key in (
        (cifar10, OWN_10, ten, b"labels"),
        (cifar100, OWN_100, hundred, b"fine_labels"),
    ):
        parts, again = load(folder, archive=archive), load(folder, archive=archive)
        *training, test = members.values()
        assert (len(parts.train), len(parts.val)) == (45, 5)
        assert same_samples((parts.train, parts.val), training, key)
        assert same_samples((parts.test,), [test], key)
        assert torch.equal(parts.train.rows, again.train.rows)
        assert torch.equal(parts.train.rows, parts.plain.rows)
        assert (parts.train.padding, parts.train.flip, parts.plain.padding, parts.val.flip) == (4, True, 0, False)
    assert (cifar10(folder, archive=OWN_10).classes, cifar100(folder, archive=OWN_100).classes) == (10, 100)


def test_standardised_is_by_channel():
    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    made = standardised(images, CIFAR10_SCALE)
    for i, (mean, std) in enumerate(zip(CIFAR10_SCALE.mean, CIFAR10_SCALE.std, strict=True)):
        assert torch.allclose(made[:, i], (images[:, i].double() / 255 - mean).div(std).float(), atol=1e-6)
    assert standardised(images, None) is images


def slow_crop_and_flip(images, padding, flip, generator):
    n, _, height, width = images.shape
    shifts = torch.randint(2 * padding + 1, (2, n, 1), generator=generator)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5 if flip else torch.zeros(n, 1, dtype=torch.bool)
    made = torch.zeros_like(images)
    for i in range(n):
        for y in range(height):
            for x in range(width):
                source_y = y + int(shifts[0, i]) - padding
                source_x = (width - 1 - x if mirrored[i] else x) + int(shifts[1, i]) - padding
                if 0 <= source_y < height and 0 <= source_x < width:
                    made[i, :, y, x] = images[i, :, source_y, source_x]
    return made


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_those_of_the_slow_twin(padding, flip):
    images = torch.randint(1, 256, (12, 3, 5, 6), dtype=torch.uint8)
    fast, slow, other = (torch.Generator().manual_seed(seed) for seed in (3, 3, 4))
    made = crop_and_flip(images, padding=padding, flip=flip, generator=fast)
    assert made.dtype == torch.uint8
    assert torch.equal(made, slow_crop_and_flip(images, padding, flip, slow))
    differs = not torch.equal(made, crop_and_flip(images, padding=padding, flip=flip, generator=other))
    assert differs == (padding > 0 or flip)


def test_loaders_give_whole_batches_and_the_seed_decides_them():
    images, labels = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8), torch.arange(20)
    augmented = Images(images, labels, torch.arange(4, 20), CIFAR10_SCALE, padding=2, flip=True)

    def batches(seed):
        torch.manual_seed(seed)
        return list(loader(augmented, 6, shuffle=True))

    first, again, other = batches(0), batches(0), batches(1)
    assert [len(x) for x, _ in first] == [6, 6]
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    plain = Images(images, labels, torch.arange(4, 20), CIFAR10_SCALE)
    (x, y), *_ = loader(plain, 16)
    assert torch.equal(x, standardised(images[4:], CIFAR10_SCALE))
    assert y.tolist() == list(range(4, 20))
    assert torch.equal(plain[3][0], x[3])
    with pytest.raises(ValueError, match="batch_size: 17 samples were asked for, and there are 16"):
        loader(plain, 17, shuffle=True)


def test_a_fixed_batch_is_always_the_same():
    plain = digits_parts().plain
    (first,), (again,) = fixed_batch(plain, 64), fixed_batch(plain, 64)
    assert first[0].shape == (64, 1, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(set(first[1].tolist())) == 10
    for samples in (0, len(plain) + 1):
        with pytest.raises(ValueError, match=f"samples: {samples} were asked for, and there are {len(plain)}"):
            fixed_batch(plain, samples)


def test_digits_are_in_three_parts():
    parts = digits_parts()
    assert (len(parts.train), len(parts.val), len(parts.test)) == (1294, 144, 359)
    seen = [tuple(i.flatten().tolist()) for part in (parts.train, parts.val, parts.test) for i in rows_of(part)[0]]
    assert len(seen) == len(set(seen)) == 1797


# --- ImageNet


def jpeg(colour, size=(64, 64), mode="RGB", kind="JPEG"):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind)
    return file.getvalue()


COLOURS = {"n00000002": (200, 30, 60), "n00000001": (10, 90, 250)}


def tiny_files(**changes):
    root = "tiny-imagenet-200"
    files = {f"{root}/wnids.txt": "\n".join(COLOURS) + "\n"}
    for name, colour in COLOURS.items():
        files[f"{root}/train/{name}/{name}_boxes.txt"] = "no image"
        for i in range(5):
            files[f"{root}/train/{name}/images/{name}_{i}.JPEG"] = jpeg(colour)
    rows = [f"val_{i}.JPEG\t{name}\t0\t0\t62\t62\n" for i, name in enumerate(COLOURS)]
    files[f"{root}/val/val_annotations.txt"] = "".join(rows)
    for i, colour in enumerate(COLOURS.values()):
        files[f"{root}/val/images/val_{i}.JPEG"] = jpeg(colour)
    files[f"{root}/test/images/test_0.JPEG"] = "not looked at"
    files["../../outside.JPEG"] = "nor this"
    return files | {f"{root}/{name}": value for name, value in changes.items()}


def tiny_zip(folder, files):
    with zipfile.ZipFile(folder / OWN_TINY.name, "w") as archive:
        for name, data in files.items():
            if data is not None:
                archive.writestr(name, data)
    return folder


def test_tiny_imagenet_is_read_from_its_zip(tmp_path):
    grey = {"train/n00000001/images/n00000001_4.JPEG": jpeg(77, mode="L")}
    parts = tiny_imagenet(tiny_zip(tmp_path, tiny_files(**grey)), archive=OWN_TINY)
    assert (len(parts.train), len(parts.val), len(parts.test), parts.classes) == (9, 1, 2, 2)
    assert parts.test.labels.tolist() == [1, 0]
    images, labels = parts.train.images, parts.train.labels
    assert images.shape == (10, 3, 64, 64)
    assert labels.tolist() == [0] * 5 + [1] * 5
    for i in (0, 9):
        colour = torch.tensor(COLOURS[f"n0000000{labels[i] + 1}"]).view(3, 1, 1)
        assert (images[i].int() - colour).abs().max() <= 3
    assert (images[4].int() - 77).abs().max() <= 1
    assert parts.train.scale == TINY_IMAGENET_SCALE
    assert os.listdir(tmp_path) == [OWN_TINY.name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wnids.txt": None}, "does not hold Tiny-ImageNet"),
        ({"val/images/val_0.JPEG": None}, "val_0.JPEG"),
        ({"val/val_annotations.txt": "val_0.JPEG"}, "IndexError"),
        ({"val/val_annotations.txt": "val_0.JPEG\tn9"}, "n9"),
        ({"val/images/val_1.JPEG": jpeg(1, (65, 64))}, r"val_1.JPEG is not .* must be 64 x 64, found \(65, 64\)"),
        ({"val/images/val_1.JPEG": jpeg((1, 2, 3), kind="PNG")}, "val_1.JPEG is not the image"),
        ({"val/images/val_1.JPEG": jpeg((1, 2, 3))[:-200]}, "Truncated File Read"),
        ({"val/images/val_1.JPEG": jpeg((1, 2, 3))[:-20]}, "image file is truncated"),
    ],
)
def test_what_is_not_tiny_imagenet_is_refused(changes, message, tmp_path):
    with pytest.raises(ArchiveError, match=message):
        tiny_imagenet(tiny_zip(tmp_path, tiny_files(**changes)), archive=OWN_TINY)


def test_a_zip_is_read_within_bounds(tmp_path, monkeypatch):
    with pytest.raises(ArchiveError, match="its md5 must be 90528d7ca1a48142e341f4ef8d21d0de"):
        tiny_imagenet(tiny_zip(tmp_path, tiny_files()))
    monkeypatch.setattr(imagenet, "LARGEST_MEMBER", 10)
    with pytest.raises(ArchiveError, match=r"wnids\.txt has more than 10 bytes"):
        tiny_imagenet(tmp_path, archive=OWN_TINY)
    (tmp_path / OWN_TINY.name).write_bytes(b"no zip")
    with pytest.raises(ArchiveError, match="BadZipFile"):
        tiny_imagenet(tmp_path, archive=OWN_TINY)


def test_imagenet_is_cut_as_its_networks_expect(tmp_path, monkeypatch):
    for name, colour in COLOURS.items():
        (tmp_path / "imagenet" / "val" / name).mkdir(parents=True)
        for i, size in enumerate(((300, 260), (200, 400))):
            (tmp_path / "imagenet" / "val" / name / f"{i}.JPEG").write_bytes(jpeg(colour, size))
    monkeypatch.setenv("LIGHTNING_SPECTRAL_DATA", str(tmp_path))
    images, labels = imagenet_batch(samples=4, classes=2)
    assert images.shape == (4, 3, 224, 224)
    assert sorted(labels.tolist()) == [0, 0, 1, 1]
    for image, label in zip(images, labels, strict=True):
        colour = torch.tensor(COLOURS[f"n0000000{label + 1}"]).view(3, 1, 1) / 255
        expected = (colour - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
            [0.229, 0.224, 0.225]
        ).view(3, 1, 1)
        assert (image - expected).abs().max() < 0.06
    assert torch.equal(imagenet_batch(tmp_path / "imagenet" / "val", samples=2, classes=2)[0], images[:2])
    with pytest.raises(ArchiveError, match=r"samples: 5 images were asked for, and .* holds 4"):
        imagenet_batch(samples=5, classes=2)
    for folder in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(ArchiveError, match=r"a folder per class .* 1000 named .* found (2|0); .*--data"):
            imagenet_batch(folder)


@pytest.mark.parametrize(("size", "box"), [((512, 256), (144, 16, 368, 240)), ((256, 301), (16, 38, 240, 262))])
def test_the_middle_of_an_image(size, box):
    pixels = np.random.default_rng(0).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert np.array_equal(np.asarray(middle(image)), np.asarray(image.crop(box)))
    assert middle(image.resize((50, 80))).size == (224, 224)


def test_synthetic_images_are_always_the_same():
    images, labels = synthetic_batch(40, classes=7, size=8)
    assert images.shape == (40, 3, 8, 8)
    assert set(labels.tolist()) == set(range(7))
    assert torch.equal(images, synthetic_batch(40, classes=7, size=8)[0])


def test_without_pillow(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "PIL", None)
    for load in (tiny_imagenet, imagenet_batch):
        with pytest.raises(ImportError, match=r"need Pillow: pip install .lightning-spectral\[paper\]"):
            load(tmp_path)


# --- text


def test_python_source_is_in_three_neighbouring_parts():
    parts = python_source(32, limit=20_000)
    lengths = [len(part.tokens) for part in (parts.train, parts.val, parts.test)]
    assert lengths == [18_000, 1000, 1000]
    assert (parts.classes, len(parts.train), len(parts.val)) == (96, 562, 31)
    (batch,) = fixed_batch(parts.plain, 8)
    assert batch.shape == (8, 33)
    assert batch.dtype == torch.long
    assert all(torch.equal(parts.train[i][-1], parts.train[i + 1][0]) for i in range(10))


def test_a_text_file_is_read_by_bytes_or_tokens(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("héllo wörld " * 100, encoding="utf-8")
    parts = text_file(path, 8)
    parts_of = (parts.train, parts.val, parts.test)
    assert b"".join(bytes(part.tokens.tolist()) for part in parts_of) == path.read_bytes()
    assert parts.classes == 256
    asked = []
    encoding = SimpleNamespace(encode_ordinary=lambda text: [50256 if c == "h" else ord(c) for c in text])
    fake = SimpleNamespace(get_encoding=lambda name: asked.append(name) or encoding)
    monkeypatch.setitem(sys.modules, "tiktoken", fake)
    parts = text_file(path, 8, tokenizer="gpt2")
    assert asked == ["gpt2"]
    assert (parts.classes, int(parts.train[0][0])) == (GPT2_VOCABULARY, 50256)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ImportError, match="pip install tiktoken; or take 'bytes'"):
        text_file(path, 8, tokenizer="gpt2")
    with pytest.raises(ValueError, match="tokenizer must be 'bytes' or 'gpt2', got 'bpe'"):
        text_file(path, 8, tokenizer="bpe")


def test_a_file_of_tokens_is_read(tmp_path):
    path = tmp_path / "train.bin"
    tokens = np.random.default_rng(0).integers(50257, size=2000).astype(np.uint16)
    tokens[7] = 50256
    tokens.tofile(path)
    parts = token_file(path, 16)
    starts = torch.cat([part.tokens.long() for part in (parts.train, parts.val, parts.test)])
    assert np.array_equal(starts.numpy(), tokens)
    assert torch.equal(parts.train[3], torch.from_numpy(tokens[48:65].astype(np.int64)))
    with pytest.raises(ArchiveError, match="holds the token 50256, outside a vocabulary of 50256"):
        token_file(path, 16, vocabulary=50256)
    path.write_bytes(b"123")
    with pytest.raises(ArchiveError, match="two bytes each, found 3 bytes"):
        token_file(path, 1)


@pytest.mark.parametrize("load", [text_file, token_file])
def test_text_that_is_absent_empty_or_short_is_refused(load, tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(ArchiveError, match="is no file; name the text"):
        load(path, 8)
    path.write_bytes(b"")
    with pytest.raises(ArchiveError, match="is empty; name the text"):
        load(path, 8)
    path.write_bytes(b"ab" * 40)
    with pytest.raises(ValueError, match=r"length: of the \d+ tokens of a.txt, \d are for validation"):
        load(path, 8)


def test_windows_overlap_in_one_token(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(range(256)) * 4)
    windows = [text_file(path, 5).train[i].tolist() for i in range(9)]
    assert all(a[-1] == b[0] and len(a) == 6 for a, b in pairwise(windows))
