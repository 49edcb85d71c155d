"""Recurrent layers written out beside torch's own, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_spectral.isolation.interrupts import function_mode
from lightning_spectral.isolation.operations import MeasuredOperations

OPTIONS = {
    "one": {},
    "two_ways": {"bidirectional": True},
    "batch_first": {"num_layers": 2, "batch_first": True},
    "dropout": {"num_layers": 3, "bidirectional": True, "bias": False, "dropout": 0.3},
}
KINDS = {
    "lstm": nn.LSTM,
    "projected": lambda *args, **options: nn.LSTM(*args, proj_size=3, **options),
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *args, **options: nn.RNN(*args, nonlinearity="relu", **options),
}


def both(module, *inputs):
    """Outputs, states and gradients by torch's function, and written out, with the same random numbers."""
    results = []
    for mode in (None, MeasuredOperations()):
        torch.manual_seed(1)
        if mode is None:
            outputs = module(*inputs)
        else:
            with function_mode(mode):
                outputs = module(*inputs)
        tensors = leaves(outputs)
        loss = sum((tensor * torch.linspace(1, 2, tensor.numel()).view_as(tensor)).sum() for tensor in tensors)
        results.append([*tensors, *torch.autograd.grad(loss, list(module.parameters()))])
    return results


def leaves(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for part in outputs if part is not None for tensor in leaves(part)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_sequences(kind, options):
    torch.manual_seed(0)
    module = kind(4, 6, **options).double()
    fused, written_out = both(module, torch.randn(5, 3, 4, dtype=torch.float64))
    torch.testing.assert_close(written_out, fused, rtol=1e-10, atol=1e-12)
    assert written_out[0].stride() == fused[0].stride()


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [True, False])
def test_cells(kind, bias):
    torch.manual_seed(0)
    fused, written_out = both(kind(4, 6, bias=bias).double(), torch.randn(3, 4, dtype=torch.float64))
    torch.testing.assert_close(written_out, fused, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [OPTIONS["one"], OPTIONS["two_ways"], OPTIONS["dropout"]])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_packed_sequences(kind, options):
    torch.manual_seed(0)
    x = torch.randn(5, 4, 4, dtype=torch.float64)
    packed = pack_padded_sequence(x, torch.tensor([3, 5, 2, 3]), enforce_sorted=False)
    fused, written_out = both(kind(4, 6, **options).double(), packed)
    torch.testing.assert_close(written_out, fused, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["lstm_cell", "gru_cell", "rnn_tanh_cell"])
@pytest.mark.parametrize("bias", ["b_ih", "b_hh"])
def test_functions_are_called_with_one_bias_and_by_name(name, bias):
    torch.manual_seed(0)
    module = {"l": nn.LSTMCell, "g": nn.GRUCell, "r": nn.RNNCell}[name[0]](4, 6).double()
    h = torch.randn(3, 6, dtype=torch.float64)
    hx = (h, h) if name == "lstm_cell" else h
    weights = {"w_ih": module.weight_ih, "w_hh": module.weight_hh, bias: module.bias_ih}
    x = torch.randn(3, 4, dtype=torch.float64)
    fused = getattr(torch, name)(input=x, hx=hx, **weights)
    with function_mode(MeasuredOperations()):
        written_out = getattr(torch, name)(input=x, hx=hx, **weights)
    torch.testing.assert_close(written_out, fused, rtol=1e-10, atol=1e-12)


def test_a_sequence_is_given_by_name():
    torch.manual_seed(0)
    module, x, h = nn.GRU(4, 6).double(), torch.randn(5, 3, 4, dtype=torch.float64), torch.zeros(1, 3, 6).double()
    settings = {"has_biases": True, "num_layers": 1, "dropout": 0.0, "train": False, "bidirectional": False}
    weights = list(module.parameters())
    with function_mode(MeasuredOperations()):
        output, _ = torch.gru(batch_first=False, params=weights, input=x, hx=h, **settings)
    torch.testing.assert_close(output, module(x)[0], rtol=1e-10, atol=1e-12)
