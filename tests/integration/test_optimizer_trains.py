"""Spectral Newton trains every network of the case table."""

import pytest
import torch
from cases import CASES

from lightning_spectral import SpectralNewton


@pytest.mark.filterwarnings("ignore:.*look like embeddings or heads:lightning_spectral.errors.SpectralWarning")
@pytest.mark.parametrize("make", [lambda m: m.parameters(), lambda m: m.named_parameters(), SpectralNewton.groups])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_network_trains(case, make):
    model, batch = case.build(torch.float32)
    optimizer = SpectralNewton(make(model), lr=5e-3)
    before = case.loss(model, batch).item()
    for _ in range(40):
        optimizer.zero_grad()
        case.loss(model, batch).backward()
        optimizer.step()
    assert case.loss(model, batch).item() < 0.97 * before
    assert optimizer.skipped_updates == 0
