"""Metrics of one update equal the functions; of several, slow regressions; states survive what torchmetrics does."""

from __future__ import annotations

import copy
import math
import pickle

import matplotlib as mpl
import pytest
import torch
from metric_updates import four, numbers, spectrum
from modules import ConvNet, fit
from paper import needs_paper, paper_layers
from pytorch_lightning.loggers.logger import DummyLogger
from torchmetrics import Metric, MetricCollection

from lightning_spectral import (
    CurvatureDecay,
    CurvatureExponent,
    ParticipationRatio,
    RankDecay,
    SpectralWarning,
    fit_power_law,
    fit_rank_decay,
    participation_ratio,
)
from lightning_spectral.metrics import QUANTITIES

mpl.use("Agg")
NAMES = ("CurvatureExponent", "RankDecay", "CurvatureDecay", "ParticipationRatio")


def functional(sigma, h):
    fits = fit_power_law(sigma, h), fit_rank_decay(sigma), fit_rank_decay(h)
    return dict(zip(NAMES, [*(fitted.exponent for fitted in fits), participation_ratio(h)], strict=True))


def regression(points):
    """(slope, stderr, r2) of y on x with a column of ones for each update, by a dense least squares."""
    x, y = (torch.cat(values) for values in zip(*points, strict=True))
    ones = torch.block_diag(*(torch.ones(len(x_u), 1, dtype=torch.float64) for x_u, _ in points))
    design = torch.cat([x[:, None], ones], 1)
    solution = torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    rss = (y - design @ solution).square().sum()
    variance = rss / (len(y) - design.shape[1]) * torch.linalg.inv(design.T @ design)[0, 0]
    tss = sum((y_u - y_u.mean()).square().sum() for _, y_u in points)
    return dict(zip(QUANTITIES, [solution[0].item(), variance.sqrt().item(), 1 - (rss / tss).item()], strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_update_is_the_function_to_the_bit(dtype):
    sigma, h = (values.to(dtype) for values in spectrum(0))
    metrics = four()
    metrics.update(sigma=sigma, h=h)
    assert numbers(metrics.compute()) == functional(sigma, h)
    assert numbers(four()(sigma=sigma, h=h)) == functional(sigma, h)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_standard_error_and_r2_of_one_update_are_the_functions(quantity):
    sigma, h = spectrum(3)
    pairs = [
        (CurvatureExponent(quantity), (sigma, h), fit_power_law(sigma, h)),
        (RankDecay(quantity), (sigma,), fit_rank_decay(sigma)),
        (CurvatureDecay(quantity), (h,), fit_rank_decay(h)),
    ]
    for metric, inputs, fitted in pairs:
        assert metric(*inputs).item() == pytest.approx(getattr(fitted, quantity), rel=1e-11)


@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_several_updates_are_one_regression_with_an_intercept_each(quantity):
    alpha, gamma, s = CurvatureExponent(quantity), RankDecay(quantity), CurvatureDecay(quantity)
    pairs = [(alpha, []), (gamma, []), (s, [])]
    for seed, k in enumerate((20, 7, 3, 31)):
        sigma, h = spectrum(seed, k)
        alpha.update(sigma, h)
        gamma.update(sigma)
        s.update(h)
        positive = h[h > 0]
        rank = torch.arange(1, k + 1, dtype=torch.float64)
        pairs[1][1].append((-rank.log(), sigma.sort(descending=True).values.log()))
        if len(positive) > 2:
            pairs[0][1].append((sigma[h > 0].log(), positive.log()))
            pairs[2][1].append((-rank[: len(positive)].log(), positive.sort(descending=True).values.log()))
    for metric, points in pairs:
        assert metric.compute().item() == pytest.approx(regression(points)[quantity], rel=1e-10)
        assert (metric.points, metric.updates_used) == (sum(len(x) for x, _ in points), len(points))
    assert (alpha.updates_left_out, alpha.points_dropped, s.updates_left_out, gamma.updates_left_out) == (1, 6, 1, 0)


def test_several_updates_are_their_mean_where_all_know_the_same():
    gamma, pr = RankDecay(), ParticipationRatio()
    spectra = [spectrum(seed) for seed in range(4)]
    for sigma, h in spectra:
        gamma.update(sigma)
        pr.update(h)
    assert gamma.compute().item() == pytest.approx(sum(fit_rank_decay(sigma).exponent for sigma, _ in spectra) / 4)
    assert pr.compute().item() == pytest.approx(sum(participation_ratio(h) for _, h in spectra) / 4)


def test_order_and_forward_do_not_change_the_value_and_memory_stays():
    forwards, backwards, sizes = four(), four(), set()
    for seed in range(6):
        sigma, h = spectrum(seed)
        assert numbers(forwards(sigma=sigma, h=h)) == functional(sigma, h)
        sizes.add(sum(state.numel() for metric in forwards.values() for state in metric.metric_state.values()))
    for seed in reversed(range(6)):
        sigma, h = spectrum(seed)
        backwards.update(sigma=sigma, h=h)
    assert numbers(backwards.compute()) == pytest.approx(numbers(forwards.compute()), rel=1e-12)
    assert len(sizes) == 1


@pytest.mark.skipif(not hasattr(Metric, "merge_state"), reason="this torchmetrics has no Metric.merge_state")
def test_merged_states_are_those_of_all_updates():
    halves, whole = (CurvatureExponent(), CurvatureExponent()), CurvatureExponent()
    for seed in range(4):
        whole.update(*spectrum(seed))
        halves[seed % 2].update(*spectrum(seed))
    halves[0].merge_state(halves[1])
    assert halves[0].compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)
    assert halves[0].points == whole.points


def test_points_on_a_line_and_equal_ordinates():
    line, flat = ({quantity: CurvatureExponent(quantity) for quantity in QUANTITIES} for _ in range(2))
    for quantity in QUANTITIES:
        for scale in (1.0, 1e6):
            line[quantity].update([1.0, 2.0, 4.0, 8.0], [scale * x**1.7 for x in (1.0, 2.0, 4.0, 8.0)])
        flat[quantity].update([1.0, 2.0, 4.0, 8.0], [10.0] * 4)
    assert numbers({k: m.compute() for k, m in line.items()}) == pytest.approx(
        {"exponent": 1.7, "stderr": 0.0, "r2": 1.0}, abs=1e-7
    )
    assert flat["exponent"].compute().item() == pytest.approx(0.0, abs=1e-12)
    assert flat["stderr"].compute().item() == 0.0
    assert math.isnan(flat["r2"].compute().item())


def test_an_unknown_quantity():
    with pytest.raises(ValueError, match="quantity must be one of exponent, stderr, r2, got 'slope'"):
        CurvatureExponent("slope")


@pytest.mark.parametrize("inputs", [([1.0, 2.0], [1.0]), ([[1.0]], [[1.0]])])
def test_spectra_of_the_wrong_shape(inputs):
    with pytest.raises(ValueError, match=r"one length|one-dimensional"):
        CurvatureExponent().update(*inputs)


@pytest.mark.parametrize(
    ("metric", "inputs", "needs"),
    [
        (
            CurvatureExponent(),
            ([2.0, 1.0, float("nan"), 3.0], [1.0, 1.0, 1.0, -1.0]),
            "2 usable points, 1 not finite, 1",
        ),
        (CurvatureExponent(), ([2.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]), "3 points that differ, and got 5"),
        (RankDecay(), ([0.0, 0.0, 1.0],), "3 points that differ, and got 1 usable points, 2 not positive"),
        (CurvatureDecay(), ([],), "3 points that differ, and got 0"),
        (ParticipationRatio(), ([-1.0, float("inf")],), "a positive value, and got 0"),
    ],
)
def test_an_update_without_enough_points_is_counted_and_told_once(metric, inputs, needs):
    metric = copy.deepcopy(metric)
    with pytest.warns(SpectralWarning, match=needs):
        metric.update(*inputs)
    # A second warning would be an error here.
    assert math.isnan(metric(*inputs).item())
    assert math.isnan(metric.compute().item())
    assert (metric.updates_used, metric.updates_left_out) == (0, 2)
    assert (metric.points, metric.points_dropped) == (0, 2 * len(inputs[0]))
    sigma, h = spectrum(0)
    good = (sigma, h) if len(inputs) == 2 else (h,)
    alone = type(metric)()
    alone.update(*good)
    metric.update(*good)
    assert metric.compute().item() == alone.compute().item()


def test_without_an_update_the_value_is_nan_and_torchmetrics_says_so():
    for metric in (CurvatureExponent(), RankDecay("stderr"), CurvatureDecay("r2"), ParticipationRatio()):
        with pytest.warns(UserWarning, match="before the ``update`` method"):
            assert math.isnan(metric.compute().item())
        metric.update(*spectrum(0)[: 2 if isinstance(metric, CurvatureExponent) else 1])
        assert math.isfinite(metric.compute().item())
        metric.reset()
        assert (metric.points, metric.updates_used, metric.update_count) == (0, 0, 0)


CASTS = {
    "half": lambda metric: metric.half(),
    "bfloat16": lambda metric: metric.bfloat16(),
    "to": lambda metric: metric.to(torch.float16),
    "set_dtype": lambda metric: metric.set_dtype(torch.float16),
    "set_dtype by name": lambda metric: metric.set_dtype("torch.HalfTensor"),
    "module.half": lambda metric: torch.nn.ModuleList([metric]).half()[0],
    "module.to": lambda metric: torch.nn.ModuleList([metric]).to(torch.bfloat16)[0],
    "module.float": lambda metric: torch.nn.ModuleList([metric]).float()[0],
    "module.type": lambda metric: torch.nn.ModuleList([metric]).type(torch.float16)[0],
}


@pytest.mark.parametrize("name", CASTS)
def test_sums_stay_in_float64_when_cast(name):
    metric, plain = CurvatureExponent(), CurvatureExponent()
    for seed in range(3):
        batch = metric(*spectrum(seed))
        before = metric.compute()
        metric = CASTS[name](metric)
        assert metric.compute() == before
        assert metric._forward_cache == batch
        plain.update(*spectrum(seed))
    assert {state.dtype for state in metric.metric_state.values()} == {torch.float64, torch.int64}
    assert metric.compute().item() == plain.compute().item()
    metric.reset()
    assert {state.dtype for state in metric.metric_state.values()} == {torch.float64, torch.int64}


def test_states_move_to_a_device():
    metric = ParticipationRatio()
    metric.update([1.0, 1.0])
    metric.to("meta", torch.float16)
    assert {(state.device.type, state.dtype) for state in metric.metric_state.values()} == {
        ("meta", torch.float64), ("meta", torch.int64)
    }  # fmt: skip
    assert metric.device.type == "meta"


def test_sums_stay_where_they_are_if_the_device_has_no_float64():
    def to_device(tensor):
        if tensor.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return tensor.clone()

    metric = ParticipationRatio()
    metric.update([1.0, 1.0])
    assert metric._apply(to_device).compute().item() == 2.0

    def fails(tensor):
        raise TypeError("not a device")

    with pytest.raises(TypeError, match="not a device"):
        metric._apply(fails)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda metric: pickle.loads(pickle.dumps(metric))])
def test_a_copy_goes_on_by_itself(make):
    metrics = four()
    sigma, h = spectrum(0)
    metrics.update(sigma=sigma, h=h)
    copied = make(metrics)
    sigma, h = spectrum(1)
    copied.update(sigma=sigma, h=h)
    assert {metric.updates_used for metric in copied.values()} == {2}
    assert {metric.updates_used for metric in metrics.values()} == {1}
    metrics.update(sigma=sigma, h=h)
    assert numbers(metrics.compute()) == numbers(copied.compute())


def test_persistent_states_are_saved_and_loaded():
    metric = CurvatureExponent()
    assert not metric.state_dict()
    metric.persistent(True)
    metric.update(*spectrum(0))
    loaded = CurvatureExponent()
    loaded.persistent(True)
    loaded.load_state_dict(pickle.loads(pickle.dumps(metric.state_dict())))
    for each in (metric, loaded):
        each.update(*spectrum(1))
    assert loaded.compute().item() == metric.compute().item()
    assert loaded.updates_used == 2


def test_inputs_keep_no_graph():
    sigma, h = (values.requires_grad_() for values in spectrum(0))
    metrics = four()
    assert not any(value.requires_grad for value in metrics(sigma=sigma, h=h).values())
    assert not any(metric.is_differentiable or metric.full_state_update for metric in metrics.values())


# h proportional to sigma has the sums of sigma; too few points give the counts of all.
@pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")
@pytest.mark.parametrize(
    "h", [[4.0, 2.0, 1.0], [-1.0] * 3, [float("nan")] * 3], ids=["proportional", "negative", "nan"]
)
def test_a_collection_keeps_metrics_of_different_quantities_apart(h):
    metrics = MetricCollection({
        "alpha": CurvatureExponent(), "alpha_stderr": CurvatureExponent("stderr"), "r2_alpha": CurvatureExponent("r2"),
        "gamma": RankDecay(), "s": CurvatureDecay(), "pr": ParticipationRatio(),
    })  # fmt: skip
    alone = {name: copy.deepcopy(metric) for name, metric in metrics.items()}
    sigma = [8.0, 4.0, 2.0] if h[0] > 0 else [float("nan")] * 3
    for sigma_k, h_k in ((sigma, h), spectrum(1), spectrum(2)):
        metrics.update(sigma=sigma_k, h=h_k)
        for metric in alone.values():
            metric.update(**metric._filter_kwargs(sigma=sigma_k, h=h_k))
    groups = sorted(sorted(group) for group in metrics.compute_groups.values())
    assert groups == [["alpha", "alpha_stderr", "r2_alpha"], ["gamma"], ["pr"], ["s"]]
    assert numbers(metrics.compute()) == {name: metric.compute().item() for name, metric in alone.items()}
    metrics.reset()
    assert {metric.points for metric in metrics.values()} == {0}


@pytest.mark.parametrize("metric", [CurvatureExponent(), RankDecay(), CurvatureDecay(), ParticipationRatio()])
def test_plots(metric):
    metric = copy.deepcopy(metric)
    series = [metric(*spectrum(seed)[: 2 if isinstance(metric, CurvatureExponent) else 1]) for seed in range(3)]
    figure, axes = metric.plot()
    assert axes.lines[0].get_ydata()[0] == pytest.approx(metric.compute().item())
    assert axes.get_ylabel() == type(metric).__name__
    _, axes = metric.plot([*series, torch.tensor(float("nan"))], ax=figure.add_subplot())
    assert axes.lines[0].get_ydata()[:3] == pytest.approx([value.item() for value in series])
    if metric.plot_lower_bound is not None:
        assert axes.get_ylim()[0] < metric.plot_lower_bound <= min(series).item()
    mpl.pyplot.close(figure)


class Rows(DummyLogger):
    """A logger that keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)


class RawMeasurement(ConvNet):
    """A module that logs metrics of made-up spectra, one per batch."""

    def __init__(self):
        super().__init__()
        self.alpha, self.pr = CurvatureExponent(), ParticipationRatio()

    def training_step(self, batch, batch_idx):
        sigma, h = spectrum(batch_idx)
        self.alpha(sigma, h)
        self.pr.update(h)
        self.log("alpha", self.alpha, on_step=True, on_epoch=True)
        self.log("pr", self.pr, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_module_logs_steps_and_epochs(precision):
    logger = Rows()
    fit(RawMeasurement(), logger=logger, steps=6, batch_size=32, precision=precision)
    spectra = [spectrum(seed) for seed in range(3)]
    steps = [row["alpha_step"] for row in logger.rows if "alpha_step" in row]
    assert steps == pytest.approx([fit_power_law(*each).exponent for each in spectra] * 2, rel=1e-6)
    epochs = [row for row in logger.rows if "pr" in row]
    pooled = CurvatureExponent()
    for each in spectra:
        pooled.update(*each)
    assert [row["alpha_epoch"] for row in epochs] == pytest.approx([pooled.compute().item()] * 2, rel=1e-6)
    mean = sum(participation_ratio(h) for _, h in spectra) / 3
    assert [row["pr"] for row in epochs] == pytest.approx([mean] * 2, rel=1e-6)


@needs_paper
def test_metrics_reproduce_the_paper():
    metrics = four()
    layers = [layer for _, layer, _ in paper_layers()]
    assert len(layers) == 24
    for layer in layers:
        sigma, h = (torch.tensor(layer[key], dtype=torch.float64) for key in ("sigma", "h_exact"))
        batch = numbers(metrics(sigma=sigma, h=h))
        expected = {
            "CurvatureExponent": layer["alpha"],
            "RankDecay": layer["gamma"],
            "CurvatureDecay": layer["s_hessian"],
        }
        assert {name: batch[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert {metric.updates_used for metric in metrics.values()} == {24}
