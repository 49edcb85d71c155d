"""Products in full float32, whichever of torch's two sets of switches the user took, and takes meanwhile."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_spectral import measure_spectra
from lightning_spectral.numerics import matmul_precision
from lightning_spectral.numerics.matmul_precision import exact_products, full_float32

B = torch.backends
pytestmark = pytest.mark.skipif(not hasattr(B, "fp32_precision"), reason="torch before 2.9 has one set of switches")

SETTINGS = {
    "as_installed": {},
    "all_tf32": {"fp32_precision": "tf32"},
    "all_ieee": {"fp32_precision": "ieee"},
    "older_matmul": {"matmul_precision": "high"},
    "older_bfloat16": {"matmul_precision": "medium"},
    "older_both": {"matmul_precision": "high", "cudnn.allow_tf32": False},
    "newer_conv": {"cudnn.conv.fp32_precision": "ieee"},
    "newer_cudnn": {"cudnn.fp32_precision": "ieee"},
    "newer_matmul": {"cuda.matmul.fp32_precision": "tf32", "mkldnn.matmul.fp32_precision": "bf16"},
}

PARTS = (
    "cuda.matmul", "cudnn", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn",
)  # fmt: skip


def holder_of(path):
    holder = B
    for name in path.split(".")[:-1]:
        holder = getattr(holder, name)
    return holder, path.rpartition(".")[2]


def switches():
    values = [B.fp32_precision, *(getattr(*holder_of(f"{part}.fp32_precision")) for part in PARTS)]
    for read in (torch.get_float32_matmul_precision, lambda: B.cudnn.allow_tf32, lambda: B.cuda.matmul.allow_tf32):
        try:
            values.append(read())
        except RuntimeError:
            values.append("mixed")
    return values


@pytest.fixture
def settings(request):
    torch.set_float32_matmul_precision("highest")
    for path, value in SETTINGS[request.param].items():
        if path == "matmul_precision":
            torch.set_float32_matmul_precision(value)
        else:
            setattr(*holder_of(path), value)
    yield
    # A switch of cuDNN's two parts once set stays so, for the life of the process.
    B.fp32_precision = "none"
    B.cudnn.fp32_precision = B.cuda.matmul.fp32_precision = "none"
    B.mkldnn.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    B.cudnn.allow_tf32 = True


@pytest.mark.parametrize("settings", SETTINGS, indirect=True)
def test_both_sets_of_switches_can_be_used_inside_and_are_as_they_were_after(settings):
    before = switches()
    with full_float32():
        with B.cudnn.flags(enabled=False, allow_tf32=True):
            assert B.cudnn.conv.fp32_precision == "ieee"
        torch.get_float32_matmul_precision()
        B.cudnn.allow_tf32 = True
        assert not B.cudnn.allow_tf32
        assert not B.cuda.matmul.allow_tf32
        assert {getattr(*holder_of(f"{part}.fp32_precision")) for part in PARTS} == {"ieee"}
    assert switches() == before


@pytest.mark.parametrize("settings", SETTINGS, indirect=True)
def test_exact_products_need_no_switch_that_is_as_wanted(settings, monkeypatch):
    before = switches()
    entered = []
    monkeypatch.setattr(matmul_precision, "full_float32", lambda: entered.append(1) or full_float32())
    with torch.autocast("cpu", dtype=torch.bfloat16), exact_products("cpu"):
        assert {B.cuda.matmul.fp32_precision, B.mkldnn.matmul.fp32_precision} <= {"ieee", "none"}
        assert not B.cuda.matmul.allow_tf32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
    assert switches() == before
    assert bool(entered) == any(x in ("tf32", "bf16") for x in (before[0], before[1], before[5]))


def test_what_follows_the_common_switch_still_follows_it():
    before = B.fp32_precision
    parts = [part for part in PARTS if part not in ("cudnn.conv", "cudnn.rnn")]
    try:
        with full_float32(), B.cudnn.flags(enabled=False):
            pass
        for value in ("tf32", "ieee"):
            B.fp32_precision = value
            values = {part: getattr(*holder_of(f"{part}.fp32_precision")) for part in parts}
            assert set(values.values()) - {"ieee"} <= {value}, values
    finally:
        B.fp32_precision = before


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
@pytest.mark.parametrize("settings", ["as_installed", "older_matmul", "newer_conv"], indirect=True)
def test_a_loss_that_sets_cudnn_flags_is_measured_as_without(settings):
    torch.manual_seed(0)
    model, batch = (
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)),
        (torch.randn(32, 6), torch.arange(32) % 5),
    )

    def plain(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    def flagged(model, batch):
        with B.cudnn.flags(enabled=False):
            return plain(model, batch)

    expected = measure_spectra(model, batch, plain, top_k=4)
    measured = measure_spectra(model, batch, flagged, top_k=4)
    for name, layer in expected.layers.items():
        assert torch.equal(measured.layers[name].h, layer.h)
