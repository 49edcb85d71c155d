"""Traces by Hutchinson's estimator over many draws: without bias, and as far from the truth as their errors say."""

import pytest
import torch
from cases import CASES, Case, cross_entropy, mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from traces import blocks, measured

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_product_for_all_layers_is_unbiased_and_its_errors_are_calibrated(case: Case):
    model, batch = case.build()
    report = measured(case, model, batch, 200)
    z = []
    for name, (layer, block) in blocks(case, model, batch).items():
        spectrum, fraction = report.layers[name], report.layers[name].fraction
        z.append((fraction.trace - float(block.trace())) / fraction.trace_stderr)
        h = spectrum.h[~spectrum.h.isnan()]
        assert (fraction.n_draws, fraction.n_directions) == (200, len(h))
        assert fraction.value == pytest.approx(float(h.sum()) / fraction.trace)
        random = fraction.trace / (layer.shape[0] * layer.shape[1])
        assert fraction.over_random == pytest.approx(float(h.mean()) / random)
        assert fraction.stderr == pytest.approx(abs(fraction.value / fraction.trace) * fraction.trace_stderr)
    z = torch.tensor(z)
    assert z.abs().max() < 4
    assert z.square().mean() < 4


def test_standard_errors_are_calibrated_over_networks():
    z = []
    for seed in range(8):
        torch.manual_seed(seed)
        case = Case("mlp", mlp, lambda: None, cross_entropy)
        model, batch = mlp().double(), (torch.randn(24, 6).double(), torch.randint(0, 5, (24,)))
        report = measured(case, model, batch, 40)
        for name, (_, block) in blocks(case, model, batch).items():
            fraction = report.layers[name].fraction
            z.append((fraction.trace - float(block.trace())) / fraction.trace_stderr)
    z = torch.tensor(z)
    assert 0.4 < z.square().mean() < 2.0
    assert z.mean().abs() < 4 / len(z) ** 0.5


@pytest.mark.parametrize("size", [7, 24])
@pytest.mark.parametrize("method", ["exact", "ggn", "sketch", "auto"])
def test_pieces_and_batches_have_the_trace_of_the_mean_loss(size, method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 5))
    model, x, y = model.double(), torch.randn(40, 6).double(), torch.randint(0, 5, (40,))
    case = Case("relu", None, None, cross_entropy)
    loader = DataLoader(TensorDataset(x, y), 16)
    z = []
    for options in ({"micro_batch_size": size}, {"n_batches": 3}, {}):
        batch = loader if "n_batches" in options else (x, y)
        report = measured(case, model, batch, 20, curvature=method, **options)
        for name, (_, block) in blocks(case, model, (x, y)).items():
            fraction = report.layers[name].fraction
            z.append((fraction.trace - float(block.trace())) / fraction.trace_stderr)
    z = torch.tensor(z)
    assert z.abs().max() < 4.5
    assert z.square().mean() < 3


def test_pieces_where_samples_have_one_z_differ_in_it():
    case = next(case for case in CASES if case.name == "gpt_block_tied")
    model, batch = case.build()
    report = measured(case, model, batch, 60, micro_batch_size=2)
    for name, (_, block) in blocks(case, model, batch).items():
        fraction = report.layers[name].fraction
        assert abs(fraction.trace - float(block.trace())) < 4.5 * fraction.trace_stderr
