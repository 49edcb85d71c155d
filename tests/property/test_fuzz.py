"""Random small networks, losses and options: nothing is raised but what is documented, no trace is left, and all that
is measured agrees with dense matrices in float64.

`make fuzz` runs it with new examples each time.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
import re
from functools import partial
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
from identical import assert_identical
from modules import fit
from torch.utils.data import DataLoader, TensorDataset

from lightning_spectral import MeasurementError, SpectralProbe, SpectralReport, measure_spectra
from lightning_spectral.curvature import selection as select
from lightning_spectral.curvature.gauss_newton import GGNCurvature
from lightning_spectral.curvature.sketch import SketchCurvature
from lightning_spectral.layers.matrices import find_layers
from lightning_spectral.measurement import estimation, pipeline

pytest.importorskip("hypothesis")

from fuzz_cases import HOPELESS, cases, loss_of
from fuzz_twins import Comparison, sampling_error, traces
from hypothesis import event, given, settings

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))


def to_measure(case, batch):
    """What is passed to measure_spectra, the parts that it then measures, and its options."""
    options = dict(case.options)
    n = options.get("n_batches", 1)
    size = math.ceil(len(batch[0]) / n)
    parts = [tuple(t[i : i + size] for t in batch) for i in range(0, len(batch[0]), size)]
    options["n_batches"] = len(parts)
    most = options.get("max_samples")
    return (
        DataLoader(TensorDataset(*batch), size) if n > 1 else batch,
        [tuple(t[:most] for t in p) for p in parts],
        options,
    )


def runs(case, net, parts):
    """Whether the network by itself can be trained on the batches in this mode."""
    state = torch.get_rng_state()
    try:
        for part in parts:
            twin = copy.deepcopy(net).train(case.options["mode"] == "train")
            loss = loss_of(twin, tuple(t.clone() for t in part))
            if loss is not None and loss.requires_grad:
                loss.sum().backward()
    except Exception:
        return False
    finally:
        torch.set_rng_state(state)
    return True


def measured(net, given, options):
    """Return the report, and the triplets it is of."""
    measurements, measure = [], pipeline.measure

    def keep(*args, **kwargs):
        measurements.append(measure(*args, **kwargs))
        return measurements[-1]

    with mock.patch.object(pipeline, "measure", keep):
        report = measure_spectra(net, given, loss_of, **options)
    return report, measurements[-1].directions.triplets


def check_fits(layer):
    """Finite, or NaN with a note."""
    assert layer.sigma.isfinite().all()
    assert (layer.sigma >= 0).all()
    assert layer.h_stderr.isfinite().all()
    above = layer.sigma > layer.noise_floor
    assert layer.h[above].isfinite().all() or layer.note, layer
    assert not layer.h.isinf().any()
    assert math.isfinite(layer.alpha.exponent) or layer.note, layer
    for name, value in layer.scalars().items():
        assert not math.isinf(value) or name.startswith(("zeta_bound", "noise_scale")), name
        if math.isfinite(layer.alpha.exponent) and name in ("gamma", "s", "pr_curvature", "pr_gradient"):
            assert math.isfinite(value), name


@settings(max_examples=EXAMPLES)
@given(case=cases())
def test_a_measurement_is_right_or_says_why_not(case):
    try:
        net, batch = case.build()
    except ValueError:
        # Norms of a single value.
        event("the network does not run")
        return
    given, parts, options = to_measure(case, batch)
    if not runs(case, net, parts):
        event("the network does not run")
        return
    before = traces(net)
    raised = None
    try:
        report, triplets = measured(net, given, options)
    except (ValueError, MeasurementError) as error:
        event(f"raised: {type(error).__name__}: {str(error)[:70]}")
        raised = str(error)
    except RuntimeError as error:
        # The math kernel of attention gives a view, which such a checkpoint lets nothing write on.
        if "CheckpointFunction is a view and is being modified inplace" not in str(error):
            raise
        event("written on behind a reentrant checkpoint")
        return
    assert_identical(before, traces(net))
    if raised is not None:
        assert says_what_to_look_at(raised, net)
        return
    # A loss per sample is a scalar where there is one sample; a loss of zero has a gradient, of zeros.
    measurable = ("vector", "zero", *(("constant", "detached") if case.loss.decay else ()))
    assert case.loss.kind not in HOPELESS or case.loss.kind in measurable
    assert SpectralReport.from_json(report.to_json()).to_json() == report.to_json()
    for name, layer in report.layers.items():
        check_fits(layer)
        assert not layer.note or says_what_to_look_at(layer.note, net), (name, layer.note)
    if not case.casts:
        check_values(case, net, given, parts, options, report, triplets)


def check_values(case, net, given, parts, options, report, triplets):
    """Hold what was measured against dense matrices."""
    in_pieces = report.micro_batch_size != max(len(part[0]) for part in parts)
    twins = Comparison(case, net, parts, in_pieces=in_pieces, loss=report.loss)
    layers = find_layers(net).layers
    for name in triplets:
        layer = report.layers[name]
        event(f"{options['curvature']}: by {layer.method}")
        assert twins.sigma_error(layers[name], layer) <= 1, name
        # Pieces may be measured by different methods.
        if "+" in layer.method:
            continue
        gauss_newton = options["curvature"] == layer.method == "ggn"
        off = twins.h_error(layers[name], layer, triplets[name], gauss_newton)
        if off > 1 and layer.h_stderr.any():
            event("estimates by more seeds")
            expected = twins.expected(layers[name], triplets[name], gauss_newton)
            off = sampling_error(*by_seed(name, net, given, options), expected[layer.h.isfinite()])
        assert off <= 1, name


def by_seed(name, net, given, options, seeds=40):
    """(seeds, K) estimates of a layer's h, and their stated errors."""
    found = []
    for seed in range(1, seeds + 1):
        sketch, ggn = partial(SketchCurvature, seed=seed), partial(GGNCurvature, seed=seed)
        checked = partial(select.CheckedGGN, seed=seed)
        with (
            mock.patch.dict(select.METHODS, sketch=sketch, ggn=ggn),
            mock.patch.dict(estimation.CHOICES, sketch=sketch, ggn=checked),
        ):
            layer = measured(net, given, options)[0].layers[name]
        found.append(torch.stack([layer.h, layer.h_stderr])[:, layer.h.isfinite()])
    return torch.stack(found, 1)


def says_what_to_look_at(text, net):
    """Whether an error names a layer, an option, what to do, or what of the loss is wrong: no bare message of torch."""
    options = inspect.signature(measure_spectra).parameters.keys() - {"model", "batch"}
    words = "|".join(map(re.escape, [*options, *dict(net.named_parameters(remove_duplicate=False))]))
    remedies = "use|give|pass|set|reduce|measure|needs"
    return bool(re.search(rf"\b({words})\b|\b({remedies}) |^the loss |its gradient is (zero$|rounding: )", text))


class Trained(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return loss_of(self.net, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def trained(case, callbacks):
    """Everything after two steps, or what training raised."""
    net, batch = case.build()
    module = Trained(net)
    torch.manual_seed(case.seed)
    try:
        fit(module, callbacks, steps=2, data=TensorDataset(*batch), batch_size=max(len(batch[0]) // 2, 1))
    except Exception as error:
        return type(error), str(error)
    left = traces(net)
    kept = {key: left[key] for key in ("modes", "hooks", "random", "globals", "functions")}
    kept["weights"] = dict(net.state_dict())
    return kept | {"requires_grad": [parameter.requires_grad for parameter in net.parameters()]}


@settings(max_examples=max(EXAMPLES // 3, 1))
@given(case=cases())
def test_a_probe_never_raises_and_training_is_as_without_it(case):
    try:
        case.build()
    except ValueError:
        return
    probe = SpectralProbe(every_n_steps=1, **case.options)
    plain, probed = trained(case, []), trained(case, [probe])
    event(f"{probe.probes} probes, {probe.failed_probes} failed")
    assert_identical(plain, probed)
