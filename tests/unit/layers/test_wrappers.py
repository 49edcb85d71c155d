"""Layers behind wrappers: called, selected and measured as in the network inside."""

import pytest
import torch
import torch.nn.functional as F
from tiny import batch_of
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from lightning_spectral import directional_curvature, measure_spectra, top_singular_triplets
from lightning_spectral.layers import find_layers
from lightning_spectral.layers.names import plain_names, unwrapped

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def with_fabric(module, precision="32-true"):
    fabric = pytest.importorskip("pytorch_lightning").__name__ and pytest.importorskip("lightning_fabric")
    return fabric.Fabric(accelerator="cpu", devices=1, precision=precision).setup(module)


WRAPPERS = {
    "data_parallel": nn.DataParallel,
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "averaged": AveragedModel,
    "fabric": with_fabric,
    "fabric_bfloat16": lambda module: with_fabric(module, "bf16-mixed"),
    "fabric_of_compiled": lambda module: with_fabric(torch.compile(module, backend="eager")),
    "averaged_parallel": lambda module: AveragedModel(nn.DataParallel(module)),
}


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_network_is_measured_as_the_network(name):
    wrapped = WRAPPERS[name](net())
    expected = measure_spectra(net(), batch_of(), loss, top_k=4)
    measured = measure_spectra(wrapped, batch_of(), loss, top_k=4)
    assert list(measured.layers) == ["0.weight", "2.weight"]
    for layer, spectrum in expected.layers.items():
        assert torch.equal(measured.layers[layer].h.nan_to_num(), spectrum.h.nan_to_num())
    assert list(measure_spectra(wrapped, batch_of(), loss, top_k=4, layers=["0"]).layers) == ["0.weight"]


@pytest.mark.parametrize("name", ["data_parallel", "averaged", "fabric", "fabric_bfloat16"])
def test_a_loss_may_ask_a_wrapper_for_its_network(name):
    wrapped = WRAPPERS[name](net())
    through = lambda m, b: F.cross_entropy(m.module(b[0]), b[1])  # noqa: E731
    measured = measure_spectra(wrapped, batch_of(), through, top_k=4)
    assert measured.loss == pytest.approx(loss(net(), batch_of()).item(), rel=1e-5)
    triplets = {"0.weight": top_singular_triplets(wrapped.module[0].weight.detach(), 3)}
    h = directional_curvature(wrapped, batch_of(), triplets, through)["0.weight"]
    torch.testing.assert_close(h, directional_curvature(net(), batch_of(), triplets, loss)["0.weight"])


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_part_of_a_network_has_the_names_of_the_part(name):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.last = WRAPPERS[name](net()), nn.Linear(5, 5)

        def forward(self, x):
            return self.last(self.body(x).float())

    model = Whole()
    layers = find_layers(model, layers=["body.0.weight", "body.2"]).layers
    assert list(layers) == ["body.0.weight", "body.2.weight"]
    assert dict(model.named_parameters())[layers["body.0.weight"].parameter] is unwrapped(model.body)[0].weight
    report = measure_spectra(model, batch_of(), loss, top_k=4)
    assert list(report.layers) == ["body.0.weight", "body.2.weight", "last.weight"]


def test_checkpointed_blocks_have_the_names_of_the_blocks():
    model = net()
    model[0] = checkpoint_wrapper(model[0])
    assert list(find_layers(model).layers) == ["0.weight", "2.weight"]


class Adapter(nn.Module):
    __module__ = "peft.tuners.lora.layer"

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.lora_A = base, nn.ModuleDict({"default": nn.Linear(6, 3, bias=False)})


class Tuner(nn.Module):
    __module__ = "peft.tuners.lora.model"

    def __init__(self, model):
        super().__init__()
        self.model = model


class Adapted(nn.Module):
    __module__ = "peft.peft_model"

    def __init__(self, model):
        super().__init__()
        self.base_model = Tuner(model)


def test_layers_with_adapters_are_called_as_in_the_network_they_adapt():
    model = net()
    model[0] = Adapter(model[0])
    assert list(find_layers(Adapted(model)).layers) == ["0.weight", "0.lora_A.default.weight", "2.weight"]


def test_an_attribute_with_a_wrappers_name_is_none_and_names_stay_apart():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.model = nn.Linear(6, 5), nn.Linear(6, 5)

    assert list(find_layers(Plain()).layers) == ["module.weight", "model.weight"]
    twice = nn.ModuleDict({"a": nn.Module()})
    twice["a"].add_module("_orig_mod", nn.Linear(6, 5))
    twice["a"].weight = nn.Parameter(torch.ones(3, 3))
    names = ["a._orig_mod.weight", "a.weight"]
    assert plain_names(twice, names) == {name: name for name in names}
