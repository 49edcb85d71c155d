"""A plan tells what a measurement then does: layers, method, products, pieces; and takes no memory for the network."""

import json
import re
import sys
import warnings

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchmetrics
from cases import cross_entropy, mlp, token_loss, vectors
from planned import K, gpt, resnet
from torch import nn

from lightning_spectral import MeasurementError
from lightning_spectral.cli.commands import main
from lightning_spectral.cli.measure_command import shaped_batch
from lightning_spectral.layers.matrices import MatrixLayer, find_layers
from lightning_spectral.measurement import estimation
from lightning_spectral.plan.cost_model import OVERHEAD, STEP_FLOPS, direction_count, part_count, sketch_products
from lightning_spectral.plan.fake_run import LARGE_BUFFER, trace_loss, weightless
from lightning_spectral.plan.planner import plan_spectra


def test_a_plan_in_one_line():
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    plan = plan_spectra(model, torch.zeros(64, 8), lambda m, x: torch.nn.functional.mse_loss(m(x), x), top_k=5)
    assert re.fullmatch(
        r"Plan\(Sequential, 2 matrices, curvature by ggn, [\d.]+( to [\d.]+)? training steps, [\d.]+ kB\)", repr(plan)
    )
    assert repr(plan_spectra(model)) == "Plan(Sequential, 2 matrices, method unknown)"


def test_the_time_of_a_measurement_is_the_sum_of_its_passes():
    plan = plan_spectra(*gpt()[:2], token_loss, max_samples=24, n_batches=2, alignment=True, curvature_fraction=4)
    cost = plan.costs[plan.method]
    assert cost.share == 2 * 24 / 48
    gradients = cost.passes["gradient"]
    rest = {kind: counts for kind, counts in cost.passes.items() if kind != "gradient"}
    least, most = (
        gradients[end] + OVERHEAD * sum(STEP_FLOPS[kind] * counts[end] for kind, counts in rest.items())
        for end in (0, 1)
    )
    assert cost.steps == pytest.approx((cost.extra + least, cost.extra + most), rel=1e-12)
    assert cost.extra > plan_spectra(*gpt()[:2], token_loss).costs["sketch"].extra > 0
    plain = plan_spectra(*gpt()[:2], token_loss, max_samples=24, n_batches=2).costs[plan.method]
    assert cost.products == tuple(n + 4 + 2 for n in plain.products)
    assert cost.memory.factors > 0


def test_memory_is_the_formulas(monkeypatch):
    monkeypatch.setattr(estimation, "SMALL_BYTES", 0)
    model, batch, loss = gpt()
    plan = plan_spectra(model, batch, loss, top_k=K, curvature="sketch")
    memory, parameters = plan.costs["sketch"].memory, sum(p.numel() for p in model.parameters())
    assert memory.weights == 4 * parameters
    assert memory.directions == 4 * K * sum(sum(layer.shape) for layer in plan.layers.values())
    assert memory.gradients == 4 * sum(m * n for m, n in (layer.shape for layer in plan.layers.values()))
    assert memory.curvature_graph == round(7.5 * plan.activations * 16 / 48)
    pieces = plan_spectra(model, batch, loss, top_k=K, micro_batch_size=8).costs["sketch"]
    assert (pieces.parts, pieces.memory.gradient_graph) == (6, round(plan.activations / 6))
    assert pieces.memory.gradients == 2 * memory.gradients
    double = plan_spectra(model, batch, loss, top_k=K, precision="float64").costs["sketch"].memory
    assert (double.weights, double.directions) == (2 * memory.weights, 2 * memory.directions)


def test_activations_are_what_the_graph_saves():
    """Against the tensors that autograd saves of the network itself."""
    model, batch, loss = resnet()
    model.eval()
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(model, batch)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    trace = trace_loss(model, batch, loss, find_layers(model).layers)
    assert value.requires_grad
    # The fake loss keeps copies of buffers and labels that the real one shares.
    assert trace.activations == pytest.approx(sum(s.nbytes() for k, s in saved.items() if k not in own), rel=0.02)


def test_processes_share_the_samples_and_sum_the_gradients(monkeypatch):
    monkeypatch.setattr(estimation, "SMALL_BYTES", 0)
    model, batch, loss = gpt()
    one, four = (plan_spectra(model, batch, loss, world_size=n) for n in (1, 4))
    assert (one.sent, four.samples) == (0, 48)
    memory = one.costs["exact"].memory
    curvatures = 16 * sum(one.directions.values())
    assert four.sent == round(3 / 4 * (memory.gradients + memory.directions) + 3 * curvatures)
    assert four.costs["sketch"].extra == one.costs["sketch"].extra
    assert four.costs["sketch"].memory.gradient_graph == one.costs["sketch"].memory.gradient_graph / 4
    assert (four.costs["sketch"].share, four.costs["sketch"].parts) == (1, 3)
    few = plan_spectra(model, batch, loss, world_size=4, max_samples=6)
    assert (few.samples, few.costs["sketch"].share) == (24, 0.5)
    assert four.costs["sketch"].passes == one.costs["sketch"].passes


def test_without_a_batch_it_tells_what_the_network_tells():
    model = gpt()[0]
    plan = plan_spectra(model)
    assert (plan.method, plan.samples, plan.step_flops) == ("", None, None)
    assert "for a batch" not in plan.why
    assert any("piecewise linear" in text for text in plan.unknown)
    assert plan.costs["exact"].products == (4 * 16 + 11,) * 2
    assert plan.costs["sketch"].products == (4, 12)
    assert plan.costs["ggn"].columns == (3, 42)
    assert plan_spectra(model, curvature="exact").method == "exact"


class Logged(nn.Module):
    """Reads its loss, counts with a metric, and leaves one layer out."""

    def __init__(self):
        super().__init__()
        self.net, self.unused = mlp(), nn.Linear(3, 3)
        self.metric = torchmetrics.classification.MulticlassAccuracy(5)
        self.metrics = torchmetrics.MetricCollection([torchmetrics.classification.MulticlassF1Score(5)])

    def spectral_loss(self, batch):
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.metric(logits, batch[1])
        self.metrics.update(logits, batch[1])
        if loss.item() > 1e9:
            raise ValueError
        return loss


def test_a_loss_that_reads_values_is_traced_and_said_so():
    plan = plan_spectra(Logged(), vectors())
    assert plan.unreached == ("unused.weight",)
    assert "unused.weight" not in plan.directions
    assert any("1 values that it reads" in text for text in plan.unknown)
    assert plan.method == "exact"


def test_a_network_that_moves_tensors_is_traced_where_it_is():
    def loss(model, batch):
        x = batch[0].cuda().to("cuda:1", torch.float64).to(torch.float32)
        return F.mse_loss(model(x + torch.ones(6)), torch.zeros(24, 5).to("mps"))

    assert plan_spectra(mlp(), vectors(), loss).batch_samples == 24


@pytest.mark.filterwarnings("ignore:.*")
def test_a_module_in_a_trainer_is_planned_as_it_is():
    module, batch, _ = resnet()
    alone = plan_spectra(module, batch)
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert plan_spectra(module, batch).to_dict() == alone.to_dict()
    assert alone.method == "ggn"
    assert module.trainer.lightning_module is None
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_loss_whose_shapes_depend_on_values_is_planned_without_its_graph():
    def masked(model, batch):
        return F.cross_entropy(model(batch[0])[batch[1] > 0], batch[1][batch[1] > 0])

    plan = plan_spectra(mlp(), vectors(), masked)
    assert plan.method == ""
    assert "cannot be traced without values (DynamicOutputShapeException" in plan.unknown[0]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"world_size": 0}, ValueError, "world_size must be a whole number"),
        ({"n_batches": 0}, ValueError, "n_batches must be a whole number"),
        ({"layers": lambda layer: False}, ValueError, "no layer is left"),
        ({"top_k": 0}, ValueError, "top_k must be"),
        ({"loss_fn": lambda m, b: m(b[0])}, MeasurementError, "loss_fn must return a scalar"),
        ({"loss_fn": lambda m, b: m(b[1])}, RuntimeError, "same reduction dim"),
    ],
)
def test_what_is_wrong_is_said(options, error, match):
    with pytest.raises(error, match=match):
        plan_spectra(mlp(), vectors(), **{"loss_fn": cross_entropy, **options})


def test_a_method_that_refuses_the_loss_is_not_costed():
    def loss(model, batch):
        return model(batch[0]).square().mean()

    plan = plan_spectra(mlp(), (torch.randn(24, 6), torch.randn(5)), loss, curvature="ggn")
    assert "would fail: the tensors of the batch share no leading dimension" in plan.why
    assert "ggn" not in plan.costs
    assert not plan.savings


def test_any_loss_is_costed():
    plan = plan_spectra(mlp(), vectors(), lambda m, b: m(b[0]).square().mean(), curvature="ggn")
    assert plan.why == "ggn: as asked for"
    assert plan.costs["ggn"].columns[1] > 1


def test_numbers_of_pieces_and_products():
    layer = MatrixLayer("w", "w", "", "conv", (8, 9), groups=8)
    assert [direction_count(layer, k, rows) for k, rows in ((20, None), (5, None), (20, 0))] == [8, 5, 0]
    assert [part_count(7.5, n, size, cut) for n, size, cut in ((96, None, True), (96, 10, True), (96, 10, False))] == [
        3, 10, 1,
    ]  # fmt: skip
    assert [part_count(2.7, 96, None, True), part_count(7.5, None, None, True), part_count(7.5, 2, None, True)] == [
        1,
        3,
        2,
    ]
    assert [sketch_products([20], n) for n in (None, 8, 1000)] == [(4, 12)] * 3
    assert [sketch_products([20] * 20, n) for n in (None, 16, 64, 1000)] == [(4, 12), (20, 20), (6, 12), (4, 12)]


def test_weights_are_never_there():
    def moved():
        rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]
        net = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7, bias=False), nn.Dropout(rates[1]))
        net[1].weight = net[0].weight
        net[1].load_state_dict({"weight": torch.zeros(7, 5)})
        net.register_buffer("mask", torch.ones(300, 300))
        net.register_buffer("scale", torch.ones(3))
        shared = nn.Parameter(torch.zeros(2, 2))
        shared.tag = "kept"
        net[0].extra = net[1].extra = shared
        return net.to("cpu").bfloat16().to(torch.zeros(1, dtype=torch.float64))

    with weightless():
        net = moved()
    assert net[0].weight is net[1].weight
    assert net[0].extra is net[1].extra
    assert net[0].extra.tag == "kept"
    assert net[0].weight.is_meta
    assert net[0].weight.dtype is torch.float64
    assert net.mask.is_meta
    assert net.scale.sum() == 3
    assert not nn.Linear(2, 2).weight.is_meta


NETS = """
import torch
from torch import nn

def small():
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))

def odd():
    net = nn.ModuleDict({"[red]": nn.Linear(5, 4)})
    net.forward = net["[red]"].forward
    return net

def reading():
    net = small()
    net.scale = float(net[0].weight.detach().std())
    return net

pair = torch.zeros(48, 5), torch.zeros(48, dtype=torch.long)
"""
BASE = ["plan", "--model=planned_nets:small", "--loss=cross_entropy"]


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "planned_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "planned_nets", raising=False)
    yield
    sys.modules.pop("planned_nets", None)


def test_the_command_prints_the_plan_and_writes_json(nets, capsys):
    shapes = ["--batch-shape", "48x5", "48:int64"]
    assert main([*BASE, *shapes, "--json=plan.json", "--top-k=4", "--world-size=2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Sequential: 64 parameters, 2 matrices to measure" in printed
    assert "curvature by ggn: every operation after the layers is piecewise linear" in printed
    assert "ggn * 1 6 1" in printed
    assert (
        "over 2 processes each measures 1/2 of the samples and takes the singular triplets of 1/2 of the layers"
        in printed
    )
    with open("plan.json") as file:
        found = json.load(file)
    assert (found["method"], found["samples"]) == ("ggn", 48)
    assert found["costs"]["ggn"]["columns"] == [6, 6]
    assert found["costs"]["exact"]["products"] == [8, 8]
    assert main([*BASE, "--data=planned_nets:pair", "--all", "--top-k=4"]) == 0
    printed = capsys.readouterr().out
    assert "0.weight" in printed
    assert main([*BASE]) == 0
    assert "cannot be told: which method" in capsys.readouterr().out


def test_names_are_printed_as_they_are(nets, capsys):
    assert main(["plan", "--model=planned_nets:odd", "--batch-shape", "48x5", "48:int64", *BASE[2:], "--all"]) == 0
    assert "[red].weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batch-shape", "3xx"], "--batch-shape must be as 64x3x32x32"),
        (["--batch-shape", "3x5:float17"], "--batch-shape must be as 64x3x32x32"),
        (["--batch-shape", "3x5:nn"], "--batch-shape must be as 64x3x32x32"),
        (["--batch-shape=3x5", "--data=planned_nets:pair"], "--data and --batch-shape: give one of them"),
        (["--batch-shape", "4x7", "4:int64"], "RuntimeError"),
        (["--world-size=0"], "--world-size must be a whole number"),
        (["--json=missing/plan.json"], "FileNotFoundError"),
    ],
)
def test_errors_are_one_line(nets, capsys, arguments, told):
    assert main([*BASE, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lightning-spectral plan: ")
    assert told in error
    assert error.count("\n") == 1


READS_WEIGHTS = "makes the model without its weights, whose values it seems to read"


@pytest.mark.parametrize(("model", "told"), [("planned_nets", READS_WEIGHTS), ("nowhere", "No module")])
def test_a_model_that_reads_its_weights_is_told(nets, capsys, model, told):
    assert main(["plan", f"--model={model}:reading"]) == 2
    assert told in capsys.readouterr().err


def test_a_batch_of_one_shape_is_a_tensor():
    assert shaped_batch(["8x64:int64"]).shape == (8, 64)
    assert shaped_batch(["8x64:int64"]).is_meta


def test_an_exception_leaves_no_hook_and_no_mode_behind(nets):
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("mask", torch.ones(LARGE_BUFFER))

    def fail_without_weights():
        with weightless():
            assert Large().weight.is_meta
            assert Large().mask.is_meta
            assert torch.ones(2, device="meta").to("cpu").is_meta
            raise KeyError("lost")

    filters = list(warnings.filters)
    with pytest.raises(KeyError, match="lost"):
        fail_without_weights()
    assert main(["plan", "--model=planned_nets:reading"]) == 2
    assert warnings.filters == filters
    assert torch.equal(Large().weight, torch.ones(2))
    assert torch.equal(Large().mask, torch.ones(LARGE_BUFFER))
    with pytest.raises(NotImplementedError):
        torch.ones(2, device="meta").to("cpu")


def test_a_loader_is_planned_by_its_first_batch():
    x, y = torch.randn(50, 5), torch.randint(0, 3, (50,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    assert plan_spectra(model, loader, cross_entropy) == plan_spectra(model, (x[:16], y[:16]), cross_entropy)
