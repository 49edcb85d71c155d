"""What the terminal's tables say below their rows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_spectral import measure_spectra
from lightning_spectral.report.terminal.tables import other_methods, print_report


class SquaredWeight(nn.Module):
    """A layer whose matrix is no factor of a product, beside two that are."""

    def __init__(self):
        super().__init__()
        self.first, self.squared, self.last = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 6)

    def forward(self, x):
        hidden = F.relu(self.first(x))
        return self.last(F.relu(hidden + hidden @ self.squared.weight.square()))


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
def test_the_caption_names_layers_that_another_method_measured():
    torch.manual_seed(0)
    batch = torch.randn(64, 8), torch.randint(0, 6, (64,))

    def loss(net, batch):
        return F.cross_entropy(net(batch[0]), batch[1])

    report = measure_spectra(SquaredWeight(), batch, loss, curvature="ggn", top_k=4)
    assert {name: layer.method for name, layer in report.layers.items()} == {
        "first.weight": "ggn", "squared.weight": "exact", "last.weight": "ggn"
    }  # fmt: skip
    assert other_methods(report) == "; squared: measured by exact"
    alone = measure_spectra(SquaredWeight(), batch, loss, curvature="exact", top_k=4)
    assert other_methods(alone) == ""


def test_what_is_no_report_is_told():
    with pytest.raises(TypeError, match="there is no report: the probe has not measured, and its warnings say why"):
        print_report(None)
    with pytest.raises(TypeError, match=r"need one SpectralReport, such as probe\.last_report, got list"):
        print_report([])
