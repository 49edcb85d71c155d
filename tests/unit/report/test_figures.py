"""Figures show the report's numbers, fit into their width, and leave matplotlib's settings alone."""

import itertools
import math
import pickle
import re
import statistics
import sys
from dataclasses import replace
from functools import cache

import pytest
import reports
import synthetic
import torch
from figure_table import ALL, ONE, REPORTS, SEVERAL, broken, deep, network

from lightning_spectral import fit_rank_models, spectral_transfer, zeta_bound
from lightning_spectral.analysis import trusted
from lightning_spectral.layers.kinds import KINDS
from lightning_spectral.layers.names import shortened
from lightning_spectral.numerics.gradient_noise import GradientNoise
from lightning_spectral.report import figures
from lightning_spectral.report.figures.by_direction import MISSING, NEGATIVE, heat, sigma_hat
from lightning_spectral.report.figures.confidence_band import line_and_band, student_quantile
from lightning_spectral.report.figures.panels import MAX_PANELS, choose_layers, model_curve, rank_values
from lightning_spectral.report.figures.ticks import NAME_LENGTH, log_ticks
from lightning_spectral.report.palette import KIND_STYLE, MODEL_STYLE, MOST_RUNS, OTHER_STYLE, RUN_DASHES, RUN_STYLE

matplotlib = pytest.importorskip("matplotlib")


@cache
def of_network(name):
    """A figure for tests that look at it alone."""
    return ALL[name](network())


def lines(axes, label):
    return [line for line in axes.lines if line.get_label() == label]


def xy(line):
    return torch.tensor(line.get_xdata(), dtype=torch.float64), torch.tensor(line.get_ydata(), dtype=torch.float64)


def words(figure):
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def hollow(line):
    return line.get_markerfacecolor() == "white"


def close(actual, expected):
    torch.testing.assert_close(torch.as_tensor(actual, dtype=torch.float64), torch.as_tensor(expected).double())


# --- what all have in common


@pytest.mark.parametrize("name", ALL)
def test_names_are_public(name):
    assert getattr(figures, f"plot_{name}") is ALL[name]
    assert sorted(figures.__all__) == sorted(f"plot_{name}" for name in ALL)


@pytest.mark.parametrize("name", ALL)
def test_titles_say_step_and_method(name):
    report = synthetic.report([synthetic.spectrum("a")], step=7, curvature="auto", chosen="ggn: equal to the Hessian")
    title = ALL[name](report)._suptitle.get_text()
    assert "step 7" in title
    assert "curvature by ggn" in title
    assert "eval mode" in title
    assert "step" not in ALL[name](synthetic.report([synthetic.spectrum("a")]))._suptitle.get_text()
    if name in SEVERAL:
        assert "steps 0 to 160, 5 reports" in ALL[name](synthetic.history())._suptitle.get_text()


@pytest.mark.parametrize("name", ALL)
def test_white_and_opaque_or_dark(name):
    white, dark = of_network(name), ALL[name](network(), dark=True)
    assert white.get_facecolor() == (1, 1, 1, 1)
    assert sum(dark.get_facecolor()[:3]) < 0.5
    assert dark.get_facecolor()[3] == 1
    assert all(sum(axes.get_facecolor()[:3]) < 0.5 for axes in dark.axes)
    assert sum(matplotlib.colors.to_rgb(dark._suptitle.get_color())) > 2.5


def test_a_notebook_shows_a_picture_in_the_figures_colours(tmp_path):
    figure = figures.plot_alpha_by_depth(network(), dark=True)
    (tmp_path / "shown.png").write_bytes(figure._repr_png_())
    shown = matplotlib.image.imread(tmp_path / "shown.png")
    width, height = figure.get_size_inches() * figure.dpi
    assert shown.shape[:2] == pytest.approx((height, width), abs=1)
    assert shown[0, 0, :3].tolist() == pytest.approx(figure.get_facecolor()[:3], abs=0.01)
    assert pickle.loads(pickle.dumps(figure))._repr_png_().startswith(b"\x89PNG")


def panels_for(name, figure):
    """What `ax` takes: two axes for the scales, one for all others."""
    return figure.subplots(2) if name == "scale_over_training" else figure.subplots(1, 2)[0]


@pytest.mark.parametrize("name", ALL)
def test_the_callers_axes_are_drawn_on_and_returned_and_the_figure_is_as_it_was(name):
    figure = matplotlib.figure.Figure(figsize=(7, 3), layout="constrained")
    ax = panels_for(name, figure)
    of = {"layers": "block.conv"} if name in ("power_law", "rank_profiles") else {}
    assert ALL[name](network(), ax=ax, **of) is ax
    first = ax if isinstance(ax, matplotlib.axes.Axes) else ax[0]
    assert first.has_data()
    assert first.get_legend() is not None or name == "spectrum_heatmap"
    assert first.get_title(loc="left") or first.get_title().startswith("block.conv\n") or name == "rank_profiles"
    assert figure._suptitle is None
    assert not figure.legends
    assert tuple(figure.get_size_inches()) == (7, 3)
    labels = [{line.get_label() for line in axes.lines} for axes in (first, of_network(name).axes[0])]
    assert labels[0] == labels[1]
    assert first.get_xlabel() or name in ("alpha_by_depth", "scale_over_training")
    assert first.get_ylabel() or name == "spectrum_heatmap"


@pytest.mark.parametrize("name", ALL)
def test_a_title_can_be_left_out_and_a_callers_own_stays(name):
    figure = matplotlib.figure.Figure(figsize=(7, 3))
    ax = panels_for(name, figure)
    of = {"layers": "block.conv"} if name in ("power_law", "rank_profiles") else {}
    first = ax if isinstance(ax, matplotlib.axes.Axes) else ax[0]
    first.set_title("mine")
    ALL[name](network(), ax=ax, title=False, **of)
    assert first.get_title() == "mine"
    assert not first.get_title(loc="left")


def test_a_figure_without_a_title_keeps_the_headings_of_its_panels():
    figure = figures.plot_power_law(network(), ["*.conv", "*.head"], title=False)
    assert figure._suptitle is None
    assert [axes.get_title().splitlines()[0] for axes in figure.axes] == ["block.conv", "block.head"]
    assert figures.plot_alpha_by_depth(network(), title=False)._suptitle is None


def test_axes_that_cannot_be_drawn_on_are_refused():
    several = matplotlib.figure.Figure().subplots(1, 2)
    with pytest.raises(TypeError, match=r"ax must be one Axes of matplotlib, .* got ndarray of 2$"):
        figures.plot_alpha_by_depth(network(), ax=several)
    with pytest.raises(TypeError, match=r"one Axes of matplotlib, .* got Figure$"):
        figures.plot_alpha_by_depth(network(), ax=several[0].figure)
    with pytest.raises(
        TypeError, match=r"a sequence of 2 Axes of matplotlib, such as plt.subplots\(\) makes, got Axes$"
    ):
        figures.plot_scale_over_training(network(), ax=several[0])
    with pytest.raises(ValueError, match="ax has room for one layer, got 8: name it in layers"):
        figures.plot_power_law(network(), ax=several[0])


def test_a_subfigures_axes_leave_room_for_as_many_names_as_fit():
    figure = matplotlib.figure.Figure(figsize=(12, 4))
    left, right = figure.subfigures(1, 2)
    shown = []
    for part, columns in ((left, 1), (right, 3)):
        axes = part.subplots(1, columns, squeeze=False)[0, 0]
        shown.append(len(figures.plot_alpha_by_depth(deep(), ax=axes).get_xticklabels()))
    assert shown[0] > 2 * shown[1] > 0


@pytest.mark.parametrize("settings", [{}, {"savefig.bbox": "tight", "pdf.fonttype": 3, "savefig.dpi": 20}])
def test_a_figure_is_saved_at_its_size_for_print_whatever_the_settings(settings, tmp_path):
    figure = figures.plot_alpha_by_depth(network(), width=3.25)
    with matplotlib.rc_context(settings):
        figure.savefig(tmp_path / "alpha.pdf")
        figure.savefig(tmp_path / "alpha.png")
    pdf = (tmp_path / "alpha.pdf").read_bytes()
    box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", pdf)
    assert [float(side) / 72 for side in box.groups()] == pytest.approx(figure.get_size_inches(), abs=1e-3)
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert matplotlib.image.imread(tmp_path / "alpha.png").shape[1] == 975


@pytest.mark.parametrize("name", ALL)
def test_without_matplotlib_the_extra_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-spectral\[plot\]"'):
        ALL[name](network())


@pytest.mark.parametrize("name", ALL)
def test_reports_without_layers(name):
    empty = synthetic.report([])
    with pytest.raises(ValueError, match=r"the report holds no layers to draw$"):
        ALL[name](empty)
    with pytest.raises(ValueError, match=r"no layers to draw \(w: frozen\)"):
        ALL[name](synthetic.report([], skipped={"w": "frozen"}))


@pytest.mark.parametrize("name", SEVERAL)
def test_empty_history(name):
    with pytest.raises(ValueError, match=r"no reports to draw: probe\.history is empty until the first probe"):
        ALL[name]([])


@pytest.mark.parametrize("name", sorted(SEVERAL.keys() - {"alpha_over_training"}))
@pytest.mark.parametrize("wrong", [lambda: {"a": network()}, lambda: network().layers, lambda: "last", lambda: None])
def test_what_is_no_reports_is_named(name, wrong):
    with pytest.raises(
        TypeError, match=r"need one SpectralReport, or several as in probe\.history, got \w+; of several"
    ):
        ALL[name](wrong())


@pytest.mark.parametrize("name", ONE)
def test_a_list_where_one_report_is_drawn(name):
    with pytest.raises(TypeError, match=r"need one SpectralReport, such as probe\.last_report, got list"):
        ALL[name](synthetic.history())


@pytest.mark.parametrize("width", [1.0, 3.0, math.nan, math.inf])
def test_too_narrow(width):
    with pytest.raises(ValueError, match=r"width must be at least 3\.25 inches"):
        figures.plot_alpha_by_depth(network(), width=width)


def test_every_kind_and_model_has_a_look_of_its_own():
    assert set(KIND_STYLE) == set(KINDS)
    looks = [*KIND_STYLE.values(), OTHER_STYLE]
    for colours_or_markers in zip(*looks, strict=True):
        assert len(set(colours_or_markers)) == len(looks)
    for look in zip(*MODEL_STYLE.values(), strict=True):
        assert len(set(look)) == len(MODEL_STYLE)
    assert set(MODEL_STYLE) == set(fit_rank_models([3.0, 2.0, 1.0]).fits)


def test_a_kind_looks_the_same_in_every_figure():
    for name in ("power_law", "alpha_by_depth", "transfer_identity", "participation_ratio", "rank_profiles"):
        keys = {handle.get_label(): handle for handle in of_network(name).legends[0].legend_handles}
        for kind, (colour, marker) in KIND_STYLE.items():
            key = keys[kind.replace("_", " ")]
            assert key.get_color() == ("black" if colour == "ink" else colour)
            assert key.get_marker() == marker


def test_short_names():
    assert shortened("a.weight", NAME_LENGTH) == "a"
    long = shortened("model.decoder.layers.17.self_attention.query_key_value_projection.weight", NAME_LENGTH)
    assert long.startswith("m.d.l.17.s.q")
    assert len(long) == 25
    assert shortened("x" * 20 + "y" * 20, NAME_LENGTH) == "x" * 12 + "…" + "y" * 12


@pytest.mark.parametrize("decades", [1e-3, 0.02, 0.1, 0.3, 0.6, 1.0, 1.75, 3.0, 8.0, 40.0])
@pytest.mark.parametrize("low", [1.3e-7, 0.011, 2.0])
def test_logarithmic_ticks(low, decades):
    axis = matplotlib.figure.Figure().subplots().xaxis
    axis.axes.set_xscale("log")
    high = low * 10**decades
    log_ticks(axis, low, high, gap=0.25)
    ticks = list(axis.get_majorticklocs())
    assert len(ticks) <= 5
    assert decades < 0.1 or len(ticks) >= 2
    assert all(low <= tick <= high for tick in ticks)
    assert all(math.log10(b / a) >= 0.25 * decades * (1 - 1e-9) for a, b in itertools.pairwise(ticks))


# --- panels


def test_power_law_panels():
    report = network()
    figure = of_network("power_law")
    assert len(figure.axes) == len(report.layers)
    for axes, layer in zip(figure.axes, report.layers.values(), strict=True):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        name, fitted, *more = axes.get_title().splitlines()
        assert name == layer.name.removesuffix(".weight")
        assert more == [f"{layer.n_negative} of {layer.n_usable} h < 0"] * (layer.n_negative > 0)
        (fit,), (points,) = lines(axes, "fit"), lines(axes, "fitted")
        x, y = xy(fit)
        close(y, math.exp(layer.alpha.intercept) * x**layer.alpha.exponent)
        used = layer.h > 0
        close(x[[0, -1]], layer.sigma[used][[-1, 0]])
        close(torch.stack(xy(points)), torch.stack([layer.sigma[used], layer.h[used]]))
        assert not hollow(points)
        negative = lines(axes, "negative")
        assert len(negative) == (layer.n_negative > 0)
        for marks in negative:
            close(torch.stack(xy(marks)), torch.stack([layer.sigma[~used], torch.zeros(layer.n_negative)]))
            assert marks.get_transform() == axes.get_xaxis_transform()
        assert fitted == f"α = {layer.alpha.exponent:.2f} ± {layer.alpha.stderr:.2f}, r² = {layer.alpha.r2:.2f}"
        assert not axes.texts
        bars = [c for c in axes.collections if isinstance(c, matplotlib.collections.LineCollection)]
        assert len(bars) == (layer.method == "sketch")
    assert "loss per squared unit of weight" in words(figure)
    assert "loss per unit of weight" in words(figure)


def test_points_that_are_left_out_are_hollow():
    report = broken()
    axes = dict(zip(report.layers, figures.plot_power_law(report).axes, strict=True))
    (marks,) = lines(axes["rounding"], "off")
    assert hollow(marks)
    assert marks.get_xdata() == pytest.approx(axes["rounding"].get_xlim()[0])
    (zero,) = lines(axes["rounding"], "left out")
    assert hollow(zero)
    assert zero.get_xdata() == pytest.approx(0.02)
    (points,) = lines(axes["short"], "left out")
    assert hollow(points)
    assert len(points.get_xdata()) == 2
    assert len(lines(axes["dead"], "left out")[0].get_xdata()) == 20
    assert axes["negative"].get_title().endswith("no fit\n20 of 20 h < 0")
    for name in ("dead", "negative", "short", "empty", "zero", "flat"):
        assert not lines(axes[name], "fit")


def test_grids_hold_twelve_layers_evenly_over_depth_and_say_so():
    report = deep()
    for plot in (figures.plot_power_law, figures.plot_rank_profiles):
        figure = plot(report)
        assert len(figure.axes) == MAX_PANELS
        assert "12 of 160 layers, evenly over depth" in figure._suptitle.get_text()
    shown = [layer.name for layer in choose_layers(report, None)[0]]
    assert shown[0] == next(iter(report.layers))
    assert shown[-1] == list(report.layers)[-1]


def test_a_panel_that_a_band_would_fill_says_so_and_few_layers_without_a_panel_are_named():
    wide = [reports.layer(f"n.{i}.qkv.weight.q", noise=2.0, negative=15, seed=i) for i in range(12)]
    figure = figures.plot_power_law(reports.report(*wide, reports.layer("n.12.up.weight", noise=0.1)))
    said = ["band not drawn: too wide" in axes.get_title() for axes in figure.axes]
    drawn = ["band" in [c.get_label() for c in axes.collections] for axes in figure.axes]
    assert drawn == [not text for text in said]
    assert {True, False} == set(drawn)
    assert figure.axes[0].get_title().startswith("n.0.qkv.q\n")
    (missing,) = {x.name.replace(".weight", "") for x in wide} - {a.get_title().splitlines()[0] for a in figure.axes}
    assert f"12 of 13 layers, without {missing}" in figure._suptitle.get_text().replace("\n", " ")


def test_layers_by_name_and_pattern():
    report = network()
    assert [x.name for x in choose_layers(report, "block.conv.weight")[0]] == ["block.conv.weight"]
    assert [x.name for x in choose_layers(report, ["*.mlp_*", "block.conv"])[0]] == [
        "block.conv.weight", "block.mlp_up.weight", "block.mlp_down.weight",
    ]  # fmt: skip
    assert len(figures.plot_rank_profiles(report, layers="*.mlp_*").axes) == 2
    with pytest.raises(ValueError, match=r"layers: 'nowhere' matches no layer; the layers are block.conv"):
        figures.plot_power_law(report, layers=["*", "nowhere"])
    with pytest.raises(ValueError, match=r"layers: \[\] selects no layer"):
        figures.plot_rank_profiles(report, layers=[])
    with pytest.raises(ValueError, match=r", \.\.\. \(160 in all\)$"):
        choose_layers(deep(), "x")


def test_rank_profiles_draw_the_models_and_name_the_winner():
    report = network(0)
    figure = figures.plot_rank_profiles(report)
    winners = set()
    for axes, layer in zip(figure.axes, report.layers.values(), strict=True):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        models = layer.rank_models
        winners.add(models.winner)
        close(
            torch.stack(xy(lines(axes, "sigma")[0])), torch.stack([torch.arange(1, len(layer.sigma) + 1), layer.sigma])
        )
        widths = {name: lines(axes, name)[0].get_linewidth() for name in models.fits}
        assert max(widths, key=widths.get) == models.winner
        margin = sorted(models.bic.values())[1] - models.bic[models.winner]
        assert axes.texts[0].get_text() == f"{MODEL_STYLE[models.winner].name}\nΔBIC {margin:.1f}"
    assert winners == set(MODEL_STYLE)


def test_model_curves_have_the_residuals_of_the_fits():
    for layer in network(0).layers.values():
        sigma = rank_values(layer)
        k = torch.arange(1, len(sigma) + 1, dtype=torch.float64)
        for model, fit in layer.rank_models.fits.items():
            residual = sigma.log() - model_curve(model, fit.coefficients, k).log()
            assert float(residual.square().sum()) == pytest.approx(fit.rss, rel=1e-6)


def test_values_below_the_noise_floor_are_hollow_in_rank_profiles():
    axes = figures.plot_rank_profiles(broken(), layers="rounding").axes[0]
    (noise,) = lines(axes, "noise")
    assert hollow(noise)
    close(torch.stack(xy(noise))[:, 0], [5.0, 1e-11])
    text = figures.plot_rank_profiles(broken(), layers="empty").axes[0].texts[0].get_text()
    assert text == "no model: 0 values"


# --- the confidence band


@pytest.mark.parametrize(
    ("dof", "t_95", "t_99"),
    [(1, 12.706, 63.657), (2, 4.303, 9.925), (3, 3.182, 5.841), (18, 2.101, 2.878), (100, 1.984, 2.626)],
)
def test_student_quantiles_of_the_tables(dof, t_95, t_99):
    assert student_quantile(0.95, dof) == pytest.approx(t_95, abs=6e-4)
    assert student_quantile(0.99, dof) == pytest.approx(t_99, abs=6e-4)


def test_band_is_that_of_the_textbook():
    layer = synthetic.spectrum("a", noise=0.5, negative=(4,))
    used = layer.h > 0
    x, y = layer.sigma[used].log().tolist(), layer.h[used].log().tolist()
    n, mean = len(x), sum(x) / len(x)
    sxx = sum((v - mean) ** 2 for v in x)
    rss = sum((b - layer.alpha.intercept - layer.alpha.exponent * a) ** 2 for a, b in zip(x, y, strict=True))
    at = torch.tensor([1e-3, 0.02, 0.5], dtype=torch.float64)
    line, low, high = line_and_band(layer, at)
    for i, x_0 in enumerate(at.log().tolist()):
        half = 2.1098 * math.sqrt(rss / (n - 2) * (1 / n + (x_0 - mean) ** 2 / sxx))
        assert math.log(high[i] / line[i]) == pytest.approx(half, rel=1e-4)
        assert math.log(line[i] / low[i]) == pytest.approx(half, rel=1e-4)


def test_far_out_the_band_is_that_of_the_exponent_sampled_or_not():
    for stderr in (torch.zeros(20), torch.linspace(1e-5, 1e-3, 20)):
        layer = synthetic.spectrum("a", h_stderr=stderr)
        far = torch.tensor([1e120], dtype=torch.float64)
        line, _, high = line_and_band(layer, far)
        distance = far.log() - layer.sigma.log().mean()
        per_unit = float((high / line).log() / distance) / student_quantile(0.95, 18)
        assert per_unit == pytest.approx(layer.alpha.stderr, rel=5e-3)


# --- a point or a curve per layer


def test_alpha_by_depth():
    report = network()
    figure = of_network("alpha_by_depth")
    axes = figure.axes[0]
    bars = {container.get_label(): container for container in axes.containers}
    for i, (name, layer) in enumerate(report.layers.items()):
        point, _, (bar,) = bars[name].lines
        assert (point.get_xdata()[0], point.get_ydata()[0]) == (i, layer.alpha.exponent)
        low, high = bar.get_segments()[0][:, 1]
        assert (high - low) / 2 == pytest.approx(layer.alpha.stderr)
        assert hollow(point) == (not trusted(layer))
    assert any(not trusted(layer) for layer in report.layers.values())
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == [name.removesuffix(".weight") for name in report.layers]
    (band,) = axes.patches
    assert "α from 1.85 to 2.15" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert band.get_extents().transformed(axes.transData.inverted()).intervaly == pytest.approx((1.85, 2.15))


def test_alpha_by_depth_has_the_signal_behind_it_on_an_axis_of_its_own():
    noise = {"a": 0.95, "b": -0.2, "c": math.nan}
    layers = [synthetic.spectrum(name, gradient_noise=GradientNoise(signal)) for name, signal in noise.items()]
    figure = figures.plot_alpha_by_depth(synthetic.report(layers))
    axes, right = figure.axes
    (steps,) = right.patches
    assert steps.get_data()[0][:2] == pytest.approx([0.95, 0.0])
    assert math.isnan(steps.get_data()[0][2])
    assert list(steps.get_data()[1]) == [-0.5, 0.5, 1.5, 2.5]
    low, high = right.get_ylim()
    assert low == 0.0 < 1.0 <= high < 1.1
    assert 0.8 in right.get_yticks()
    assert axes.get_zorder() > right.get_zorder()
    assert not axes.patch.get_visible()
    assert "signal S, right" in [text.get_text() for text in figure.legends[0].get_texts()]
    hollow_ones = [hollow(container.lines[0]) for container in axes.containers]
    assert hollow_ones == [False, True, False]
    assert len(figures.plot_alpha_by_depth(deep()).axes) == 1


def test_layers_without_a_fit_are_crosses():
    (axes,) = figures.plot_alpha_by_depth(broken()).axes
    (crosses,) = lines(axes, "no fit")
    assert list(crosses.get_xdata()) == [1, 2, 3, 6, 7, 8]
    assert "no layer has a fit of α\n(no second derivative)" in words(
        figures.plot_alpha_by_depth(synthetic.report([synthetic.dead("a")]))
    )


def test_names_of_many_layers_are_thinned():
    for width in (3.5, 6.0, 12.0):
        (axes,) = figures.plot_alpha_by_depth(deep(), width=width).axes
        assert 160 / 12 < len(axes.get_xticklabels()) * 12 / width < 160
        assert len(axes.get_xticks(minor=True)) + len(axes.get_xticks()) == 160
    heat_axes = figures.plot_spectrum_heatmap(deep()).axes[0]
    assert 30 < len(heat_axes.get_yticklabels()) < 60


def test_transfer_identity():
    reports = synthetic.history()
    figure = figures.plot_transfer_identity(reports)
    (axes,) = figure.axes
    for report in (reports[0], reports[-1]):
        for name, layer in report.layers.items():
            point = lines(axes, name)[reports.index(report)]
            assert (point.get_xdata()[0], point.get_ydata()[0]) == (layer.alpha_gamma, layer.s.exponent)
            assert (point.get_alpha() == 1.0) == (report is reports[-1])
            assert hollow(point) == (not trusted(layer))
    (identity,) = lines(axes, "s = αγ")
    close(*xy(identity))
    (band,) = axes.collections
    # On the edges of the band the transfer error is 10 %.
    for x, s in band.get_paths()[0].vertices:
        assert min(abs(abs(s - x) / abs(s) - 0.1), abs(s - x)) < 1e-5
    assert axes.get_aspect() == 1
    layers = [layer for report in reports for layer in report.layers.values()]
    errors = [layer.transfer_error for layer in layers if trusted(layer)]
    assert 20 < len(errors) < len(layers)
    middle, within = 100 * statistics.median(errors), sum(error <= 0.1 for error in errors)
    said = f"median error {middle:.1f}\xa0% of the fits to trust, {within} of {len(errors)} within 10\xa0%"
    assert said in figure._suptitle.get_text().replace("\n", " ")
    cloud = synthetic.report([synthetic.spectrum("cloud", noise=3.0)])
    assert "no fit to trust" in figures.plot_transfer_identity(cloud)._suptitle.get_text()
    assert "no layer has fits of α, γ and s" in words(figures.plot_transfer_identity(REPORTS["only dead"]()))


def test_participation_ratio():
    report = network()
    (axes,) = of_network("participation_ratio").axes
    assert axes.get_yscale() == "log"
    for name, layer in report.layers.items():
        (point,) = lines(axes, name)
        assert (point.get_xdata()[0], point.get_ydata()[0]) == (layer.alpha_gamma, layer.pr_curvature)
    for label, window in (("zeta bound", None), ("window", 20)):
        x, y = xy(lines(axes, label)[0])
        close(y, [zeta_bound(s, window) for s in x.tolist()])
        assert window or bool((x > 1).all())
    assert "bound for 20 directions" in words(axes.figure)
    assert "no layer has a fit" in words(figures.plot_participation_ratio(REPORTS["only dead"]()))


def test_transfer_functions():
    report = network()
    (axes,) = figures.plot_transfer_functions(report, damping=0.03).axes
    for name, layer in report.layers.items():
        curve, marks = lines(axes, name)
        for line in (curve, marks):
            x, y = xy(line)
            close(y, x / (x**layer.alpha.exponent + 0.03))
        close(xy(marks)[0], sigma_hat(layer))
    with pytest.raises(ValueError, match="damping must be a finite number above 0"):
        figures.plot_transfer_functions(report, damping=0.0)
    flawed = figures.plot_transfer_functions(broken())
    assert "layers without a fit: 6" in flawed._suptitle.get_text()
    assert "no layer has a fit of α" in words(figures.plot_transfer_functions(REPORTS["only dead"]()))


def test_sigma_hat_is_the_optimizers_where_all_values_are_measured():
    layer = synthetic.spectrum("a", k=16, shape=(16, 30))
    matrix = torch.zeros(16, 30, dtype=torch.float64)
    matrix.diagonal().copy_(layer.sigma)
    x = sigma_hat(layer)
    update = spectral_transfer(matrix, alpha=1.3, damping=0.1, exact=True).diagonal()
    close(update, x / (x**1.3 + 0.1))
    # A grouped convolution's values are those of all its blocks; with fewer than all, they are an upper bound.
    grouped = synthetic.spectrum("b", k=16, shape=(16, 4), groups=2)
    close(sigma_hat(grouped).square().mean(), 8 / 16)
    part = synthetic.spectrum("a", k=8, shape=(16, 30))
    assert bool((sigma_hat(part) > x[:8]).all())


def test_heatmap():
    report = broken()
    names = list(report.layers)
    sigma_lk, _ = heat(report, "sigma")
    h_lk, classes_lk = heat(report, "h")
    assert sigma_lk.shape == h_lk.shape == (10, 20)
    good = report.layers["good"]
    close(sigma_lk[0], good.sigma.log10())
    close(h_lk[0], good.h.log10())
    assert classes_lk[names.index("negative")].tolist() == [2.0] * 20
    assert classes_lk[names.index("dead")].tolist() == [1.0] * 20
    assert classes_lk[names.index("short")].tolist() == [0.0] * 20
    assert classes_lk[names.index("rounding"), :6].tolist() == [0, 0, 0, 1, 1, 0]
    figure = figures.plot_spectrum_heatmap(report, "h")
    background, image = figure.axes[0].images
    close(torch.nan_to_num(torch.tensor(image.get_array().filled(0.0))), torch.nan_to_num(h_lk))
    assert [matplotlib.colors.to_hex(background.cmap(i / 2)).upper() for i in (1, 2)] == [MISSING, NEGATIVE]
    assert figure.axes[1].get_xlabel() == "log₁₀ h (loss per squared unit of weight)"
    assert len(figures.plot_spectrum_heatmap(REPORTS["only negative"](), "h").axes) == 1
    with pytest.raises(ValueError, match="quantity must be 'sigma' or 'h', got 'alpha'"):
        figures.plot_spectrum_heatmap(report, "alpha")


# --- over training


def test_alpha_over_training():
    reports = synthetic.history()
    reports[1] = synthetic.report([*reports[1].layers.values(), synthetic.spectrum("late", alpha=1.0)], step=20)
    (axes,) = figures.plot_alpha_over_training(reports[::-1]).axes
    thick = {line.get_label(): line for line in axes.lines if line.get_linewidth() == 2.0}
    thin = [line for line in axes.lines if line.get_linewidth() < 1]
    assert len(thin) == len(KINDS) + 1
    for kind, line in thick.items():
        assert list(line.get_xdata()) == [0, 20, 40, 80, 160]
        of_trust = [report.medians()[f"alpha/median_{kind}"] for report in reports]
        assert list(line.get_ydata()) == pytest.approx(of_trust, nan_ok=True)
    assert [math.isnan(y) for y in thin[-1].get_ydata()] == [True, False, True, True, True]
    assert math.isnan(thick["head"].get_ydata()[0])
    keys = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert {"head", "fit not to be trusted"} <= set(keys)
    assert axes.get_xlabel() == "optimizer step"
    assert "no layer has a fit" in words(figures.plot_alpha_over_training(REPORTS["only dead"]()))


def test_runs_side_by_side_have_a_panel_per_kind_and_a_look_each():
    late = synthetic.report([synthetic.spectrum("late", "dense", alpha=1.0)], step=300)
    runs = {"adamw": synthetic.history()[::-1], "$muon$": iter([*synthetic.history((0, 40)), late])}
    figure = figures.plot_alpha_over_training(runs)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == [kind.replace("_", " ") for kind in KINDS]
    for axes, kind in zip(panels, KINDS, strict=True):
        one, other = [line for line in axes.lines if line.get_linewidth() > 1]
        assert (list(one.get_xdata()), list(other.get_xdata())) == ([0, 20, 40, 80, 160], [0, 40, 300])
        for line, history in ((one, synthetic.history()), (other, [*synthetic.history((0, 40)), late])):
            of_trust = [report.medians().get(f"alpha/median_{kind}", math.nan) for report in history]
            assert list(line.get_ydata()) == pytest.approx(of_trust, nan_ok=True)
        assert (one.get_color(), one.get_marker()) != (other.get_color(), other.get_marker())
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["adamw", r"\$muon\$", "α from 1.85 to 2.15"]
    assert [handle.get_color() for handle in legend.legend_handles[:2]] == [one.get_color(), other.get_color()]
    assert legend.get_title().get_text() == "optimizer step"
    outside = {"trained": synthetic.history(), "measured": synthetic.report([synthetic.spectrum("a")])}
    numbered = figures.plot_alpha_over_training(outside)
    assert numbered.legends[0].get_title().get_text() == "measurement"
    assert "no layer of any run has a fit" in words(figures.plot_alpha_over_training({"a": REPORTS["only dead"]()}))


def test_more_runs_than_can_be_told_apart_are_refused():
    for look in zip(*RUN_STYLE, strict=True):
        assert len(set(look)) == len(RUN_STYLE)
    assert len(RUN_STYLE) * len(set(RUN_DASHES)) == MOST_RUNS
    for runs in ({}, {i: network() for i in range(MOST_RUNS + 1)}):
        with pytest.raises(ValueError, match=f"need 1 to {MOST_RUNS} runs, .* got {len(runs)}$"):
            figures.plot_alpha_over_training(runs)
    with pytest.raises(ValueError, match="no reports to draw"):
        figures.plot_alpha_over_training({"a": []})
    with pytest.raises(ValueError, match="several runs take a panel per kind of layer"):
        figures.plot_alpha_over_training({"a": network()}, ax=matplotlib.figure.Figure().subplots())


def test_points_over_training_are_hollow_where_the_fit_is_not_to_be_trusted_and_medians_leave_them_out():
    def at(step, *signals):
        made = [
            synthetic.spectrum(f"l{i}", alpha=1.0 + i, gradient_noise=GradientNoise(s)) for i, s in enumerate(signals)
        ]
        return synthetic.report(made, step=step)

    (axes,) = figures.plot_alpha_over_training([at(0, 0.9, 0.9), at(1, 0.5, 0.9), at(2, 0.5, 0.5)]).axes
    drawn = {}
    for line in axes.lines:
        if line.get_linestyle() == "None":
            steps = [step for step, alpha in zip(*line.get_data(), strict=True) if not math.isnan(alpha)]
            drawn[line.get_label(), "hollow" if hollow(line) else "filled"] = steps
    assert drawn == {("l0", "filled"): [0], ("l0", "hollow"): [1, 2], ("l1", "filled"): [0, 1], ("l1", "hollow"): [2]}
    (median,) = [line for line in axes.lines if line.get_linewidth() == 2.0]
    assert list(median.get_ydata()) == pytest.approx([1.5, 2.0, math.nan], abs=0.05, nan_ok=True)
    assert "fit not to be trusted" in words(axes.figure)
    trusting = figures.plot_alpha_over_training([at(0, 0.9), at(1, 0.9)])
    assert "fit not to be trusted" not in words(trusting)


def test_many_points_are_small_and_a_median_without_a_neighbour_has_its_marker():
    noise = [GradientNoise(0.9 if i in (3, 40) else 0.5) for i in range(60)]
    reports = [synthetic.report([synthetic.spectrum("a", gradient_noise=of)], step=i) for i, of in enumerate(noise)]
    (axes,) = figures.plot_alpha_over_training(reports).axes
    (median,) = [line for line in axes.lines if line.get_linewidth() == 2.0]
    assert {3, 40} <= set(median.get_markevery())
    assert len(median.get_markevery()) < 30
    few, many = figures.plot_alpha_over_training(network()), figures.plot_alpha_over_training([deep()] * 5)
    sizes = [{x.get_markersize() for x in f.axes[0].lines if x.get_linestyle() == "None"} for f in (few, many)]
    assert max(sizes[1]) < min(sizes[0])


def test_scale_over_training_shows_what_exponents_do_not():
    def at(step, factor):
        layers = [synthetic.spectrum(name, negative=range(20) if name == "c" and step else ()) for name in "abc"]
        sharper = [replace(x, h=x.h * factor * 10**i, sigma=x.sigma * 2**i) for i, x in enumerate(layers)]
        return synthetic.report([*sharper, synthetic.dead("dead")], step=step)

    reports = [at(0, 1.0), at(5, 100.0)]
    above, below = figures.plot_scale_over_training(reports).axes
    for axes, name in ((above, "h_max"), (below, "sigma_max")):
        assert axes.get_yscale() == "log"
        thin = [line for line in axes.lines if line.get_linewidth() < 1]
        (thick,) = [line for line in axes.lines if line.get_linewidth() == 2.0]
        for line, layer in zip(thin, reports[0].layers, strict=True):
            measured = [getattr(report.layers[layer], name) for report in reports]
            expected = [value if value > 0 else math.nan for value in measured]
            assert list(line.get_ydata()) == pytest.approx(expected, nan_ok=True)
        assert list(thick.get_ydata()) == [report.medians()[f"{name}/median_conv"] for report in reports]
        low, high = axes.get_ylim()
        values = [value for line in thin for value in line.get_ydata() if not math.isnan(value)]
        assert low < min(values) < max(values) < high
    assert reports[1].layers["c"].h_max < 0
    assert [text.get_text() for text in (above.yaxis.label, below.yaxis.label)] == ["largest h", "largest σ"]
    assert words(figures.plot_scale_over_training(REPORTS["only dead"]())).count("no layer has a value above 0") == 1


def test_reports_from_outside_training_are_numbered():
    reports = [synthetic.report([synthetic.spectrum("a", alpha=a)]) for a in (2.0, 1.0, 1.5)]
    (axes,) = figures.plot_alpha_over_training(reports).axes
    assert axes.get_xlabel() == "measurement"
    assert list(axes.lines[0].get_xdata()) == [0, 1, 2]
    assert axes.lines[0].get_ydata() == pytest.approx([2.0, 1.0, 1.5], abs=0.05)


def test_rank_models_over_training():
    reports = synthetic.history()
    (axes,) = figures.plot_rank_models_over_training(iter(reports)).axes
    bottoms = [0.0] * len(reports)
    for patch, (model, style) in zip(axes.patches, MODEL_STYLE.items(), strict=True):
        tops, edges, baseline = patch.get_data()
        winners = [[layer.rank_models.winner for layer in report.layers.values()] for report in reports]
        close(tops - baseline, [of.count(model) / len(of) for of in winners])
        close(baseline, bottoms)
        bottoms = tops
        assert patch.get_label() == style.name
        assert all(a < step < b for step, (a, b) in zip((0, 20, 40, 80, 160), itertools.pairwise(edges), strict=True))
    close(bottoms, [1.0] * len(reports))
    assert len({tuple(patch.get_data()[0]) for patch in axes.patches}) == 3
    (flawed,) = figures.plot_rank_models_over_training(broken()).axes
    assert flawed.patches[-1].get_label() == "too few values"
    assert flawed.patches[-1].get_data()[0] - flawed.patches[-1].get_data()[2] == pytest.approx(0.3)


def test_two_reports_of_one_step():
    figure = figures.plot_rank_models_over_training([network(5), network(5)])
    assert "step 5, 2 reports" in figure._suptitle.get_text()
