"""A plan beside the measurement that it is of: the same layers, method, products and columns."""

import pytest
import torch
from cases import CASES
from planned import K, gpt, resnet

from lightning_spectral import measure_spectra
from lightning_spectral.curvature import direction_graph, exact, sketch
from lightning_spectral.measurement import estimation
from lightning_spectral.plan.planner import plan_spectra

NETWORKS = {case.name: lambda case=case: (*case.build(torch.float32), case.loss) for case in CASES}
NETWORKS |= {"resnet": resnet, "gpt": gpt}
OPTIONS = {case.name: case.options for case in CASES}


@pytest.fixture
def counted(monkeypatch):
    """Products, columns of the output and pieces of what is measured."""
    counts = {"directions": 0, "products": 0, "columns": 0, "pieces": 0}

    def spy(owner, name, key, size=lambda *args: 1):
        function = getattr(owner, name)

        def noted(*args, **kwargs):
            counts[key] += size(*args)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    spy(exact, "_layer", "directions", lambda *args: len(args[3]))
    spy(sketch._Products, "_readings", "products")
    spy(direction_graph.DirectionGraph, "columns", "columns")
    # The batches are too small to be cut by themselves.
    monkeypatch.setattr(estimation, "SMALL_BYTES", 0)
    return counts


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
@pytest.mark.parametrize("method", ["auto", "exact", "ggn", "sketch"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_plan_counts_what_a_measurement_does(name, method, counted):
    torch.manual_seed(0)
    model, batch, loss = NETWORKS[name]()
    options = {"top_k": K, "curvature": method, **OPTIONS.get(name, {})}
    plan = plan_spectra(model, batch, loss, **options)
    assert plan.method in plan.costs
    report = measure_spectra(model, batch, loss, **options)
    assert list(plan.layers) == list(report.layers)
    assert dict(plan.skipped) == report.skipped
    if method == "auto":
        assert plan.why == report.chosen
    if options.get("mode") == "train":
        return
    cost = plan.costs[plan.method]
    measured = {layer.name: layer.method for layer in report.layers.values()}
    apart = sum(plan.directions[layer] for layer, used in measured.items() if used == "exact")
    checks = int(method == "auto" and plan.method == "ggn" and bool(cost.columns[1]))
    pieces = -(-plan.samples // report.micro_batch_size)
    assert cost.parts == pieces
    # The check is one of the products.
    assert counted["directions"] == (apart + checks) * pieces
    least, most = cost.columns
    # Of a softmax there is one less than of outputs, which values tell.
    least -= plan.method == "ggn"
    assert least * pieces <= counted["columns"] <= most * pieces
    least, most = (products - apart - checks for products in cost.products)
    assert least * pieces <= counted["products"] <= most * pieces
    assert plan.method == "sketch" or not most
    assert (most > 0) == bool(counted["products"])
