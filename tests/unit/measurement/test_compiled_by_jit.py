"""Networks that torch.jit has compiled are measured, with a note that second derivatives may be wrong there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_spectral import SpectralNewton, measure_spectra

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning"),
]


def measured(model):
    torch.manual_seed(1)
    batch = torch.randn(20, 6, dtype=torch.float64), torch.randint(0, 5, (20,))
    return measure_spectra(
        model, batch, lambda m, b: F.cross_entropy(m(b[0]), b[1]), top_k=3, curvature="exact", precision="float64"
    )


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_network_is_measured_with_a_note(whole):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    expected = measured(model)
    compiled = torch.jit.script(model) if whole else nn.Sequential(torch.jit.script(model[:2]), model[2])
    report = measured(compiled)
    h, h_expected = (torch.stack([layer.h for layer in of.layers.values()]) for of in (report, expected))
    torch.testing.assert_close(h, h_expected, rtol=1e-8, atol=1e-12)
    name = "the network" if whole else "0"
    assert any(f"{name} is compiled by torch.jit" in note for note in report.warnings)
    assert not any("torch.jit" in note for note in expected.warnings)


def test_groups_of_a_compiled_network():
    model = torch.jit.script(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)))
    names = [name for group in SpectralNewton.groups(model) for name in group["param_names"]]
    assert sorted(names) == ["0.bias", "0.weight", "2.bias", "2.weight"]
