"""The scripts that users copy from run at a tiny size, with what they say they need and no more."""

import hashlib
import io
import pickle
import re
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from lightning_spectral.report import read_reports

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from examples import cifar10, gpt  # noqa: E402


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def published(tmp_path_factory, monkeypatch):
    """An archive laid out as the official one, of ten images in each batch, and its digest in place of the official."""
    path = tmp_path_factory.mktemp("published") / "cifar-10-python.tar.gz"
    random = np.random.default_rng(0)
    with tarfile.open(path, "w:gz") as tar:
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
            images = random.integers(0, 256, (10, 3072), dtype=np.uint8)
            content = pickle.dumps({b"data": images, b"labels": list(range(10))}, protocol=2)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(cifar10, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.mark.parametrize("script", [cifar10, gpt])
def test_scripts_are_short_and_use_public_names_alone(script):
    source = Path(script.__file__).read_text()
    assert len(source.splitlines()) < 120
    assert re.findall(r"^.*import.*lightning_spectral.*|^from lightning_spectral.*", source, re.MULTILINE) == [
        "from lightning_spectral import SpectralNewton, SpectralProbe"
    ]


@pytest.mark.filterwarnings("ignore:.*")
def test_cifar10_downloads_what_is_not_there_trains_and_logs(published, in_folder, monkeypatch, capsys):
    asked = []

    def urlretrieve(url, target):
        asked.append(url)
        shutil.copy(published, target)
        return target, None

    monkeypatch.setattr(cifar10, "urlretrieve", urlretrieve)
    tiny = ["--data", "data", "--width", "4", "--batch-size", "25", "--epochs", "1"]
    cifar10.main(tiny)
    assert asked == ["https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"]
    assert [path.name for path in (in_folder / "data").iterdir()] == ["cifar-10-python.tar.gz"]
    assert "layers" in capsys.readouterr().out
    log = (in_folder / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert {"val_accuracy", "spectral/alpha_median"} <= set(log.splitlines()[0].split(","))
    (first, *_) = read_reports(in_folder / "lightning_logs" / "version_0" / "spectra.jsonl")
    assert first.layers["stem.weight"].kind == "conv"
    assert len(first.layers) == 21
    train, test = cifar10.cifar10("data")
    assert (len(train), len(test), len(asked)) == (50, 10, 1)
    assert tuple(train[0][0].shape) == (3, 32, 32)
    images, labels = cifar10.augmented([train[i] for i in range(6)])
    assert tuple(images.shape) == (6, 3, 32, 32)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5]


def test_an_archive_that_is_not_the_official_one_is_refused_before_it_is_read(published, in_folder, monkeypatch):
    monkeypatch.setattr(cifar10, "SHA256", "0" * 64)
    monkeypatch.setattr(cifar10.pickle, "load", None)
    with pytest.raises(SystemExit, match=r"is not the official archive: its SHA-256 is .*; delete it and run again"):
        cifar10.cifar10(published.parent)


@pytest.mark.filterwarnings("ignore:.*")
def test_gpt_trains_with_spectral_newton_and_logs_to_wandb(in_folder, capsys):
    (in_folder / "text").mkdir()
    (in_folder / "text" / "one.py").write_text("def double(x):\n    return 2 * x\n" * 40)
    tiny = ["--width", "8", "--depth", "1", "--length", "8", "--batch-size", "16", "--steps", "2"]
    gpt.main([*tiny, "--text", "text", "--optimizer", "spectral-newton", "--wandb"])
    assert "layers" in capsys.readouterr().out
    (kept,) = (in_folder / "wandb").glob("offline-run-*/files/spectra.jsonl")
    (first, *_) = read_reports(kept)
    assert {"blocks.0.qkv.weight.q", "blocks.0.up.weight", "head.weight"} <= set(first.layers)
    windows = gpt.Windows("ab\u00e9cdefg", 3)
    assert [windows[i].tolist() for i in range(len(windows))] == [[66, 67, 68, 69], [69, 70, 71, 72]]
