"""The page in a real browser: no network, no errors, and everything a reader can do. Skipped where there is none."""

import math
import re
from dataclasses import replace

import pytest
import synthetic
import torch
from browser import Page, find_browser
from reports import dead, layer, report
from torch import nn

from lightning_spectral import measure_spectra
from lightning_spectral.numerics.gradient_noise import GradientNoise
from lightning_spectral.records.alignment import KroneckerFactors
from lightning_spectral.records.on_request import CurvatureFraction, WeightSpectrum
from lightning_spectral.report import read_run, run_of, write_page
from lightning_spectral.report.page import build
from lightning_spectral.report.page.data import page_data
from lightning_spectral.report.palette import KIND_STYLE, MODEL_STYLE, PLOTLY_DASH, SYMBOLS
from lightning_spectral.report.runs.spectra_file import append_report

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="no Chromium or Chrome on PATH (or in the variable CHROMIUM)"
)

SCRIPT = "<script>alert(1)</script>"
SLANTED = "<i>x</i><img src=x onerror=alert(1)>"
"""Of it, plotly itself would read the slant."""
NAMES = ["stem.weight", "blocks.2.qkv.weight", "blocks.10.qkv.weight", "head.weight"]
LAYERS = "[...document.querySelectorAll('#rows td:first-child')].map(cell => cell.textContent)"
ALPHAS = "document.getElementById('depth').data.filter(t => t.customdata).flatMap(t => [...t.y])"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    page = Page(find_browser(), tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture(scope="module")
def steps():
    def at(step):
        kinds = ("conv", "attention_qkv", "attention_qkv", "head")
        alphas = (1.2 + step / 10, 2.5, 2.0, 0.6)
        made = zip(NAMES, kinds, alphas, strict=True)
        layers = [layer(n, kind=k, alpha=a, noise=0.1, negative=2 if k == "head" else 0) for n, k, a in made]
        return report(*layers, dead("dead.weight"), step=step)

    return [at(step) for step in (0, 5, 10)]


@pytest.fixture(scope="module")
def file(tmp_path_factory, steps):
    return write_page(run_of(steps, "mine"), tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture
def opened(browser, file):
    browser.open(file)
    return browser


def test_loads_without_errors_or_requests(opened, steps):
    assert opened.problems == []
    assert opened.requests == []
    assert opened.evaluate("document.querySelectorAll('.js-plotly-plot').length") == 7
    assert opened.evaluate("document.getElementById('split-figure').hidden")
    assert opened.evaluate("document.getElementById('facts').textContent").endswith("5 layers, 3 probes")
    for plot in ("depth", "training"):
        assert "alpha 1.85 to 2.15" in opened.evaluate(f"document.querySelector('#{plot} .legend').textContent")
    assert opened.evaluate("document.getElementById('failed').hidden")
    assert opened.evaluate(LAYERS) == ["stem", "blocks.2.qkv", "blocks.10.qkv", "head", "dead"]
    assert opened.evaluate("document.querySelectorAll('tr.doubtful').length") == 1
    assert opened.evaluate(ALPHAS) == pytest.approx([steps[-1].layers[name].alpha.exponent for name in NAMES], rel=1e-5)


def test_a_network_is_out_of_reach(opened):
    opened.evaluate("fetch('http://127.0.0.1:9/x').catch(() => 0)")
    assert any("Content Security Policy" in str(problem) for problem in opened.problems)
    assert opened.requests == []


def test_table_sorts_by_button_and_says_so(opened):
    sorted_by = "document.querySelector('th[data-key=alpha]').getAttribute('aria-sort')"
    assert opened.evaluate(sorted_by) == "none"
    opened.evaluate("document.querySelector('th[data-key=alpha] button').click()")
    assert opened.evaluate(sorted_by) == "ascending"
    assert opened.evaluate(LAYERS) == ["head", "blocks.10.qkv", "stem", "blocks.2.qkv", "dead"]
    opened.evaluate("document.querySelector('th[data-key=alpha] button').focus()")
    opened.press("Enter", 13, "\r")
    assert opened.evaluate(sorted_by) == "descending"
    assert opened.evaluate(LAYERS) == ["blocks.2.qkv", "stem", "blocks.10.qkv", "head", "dead"]
    opened.evaluate("document.querySelector('th[data-key=layer] button').click()")
    assert opened.evaluate(LAYERS)[0] == "stem"
    assert opened.evaluate(sorted_by) == "none"


def search(page, text):
    page.evaluate(
        f"(() => {{ const box = document.getElementById('search'); box.value = {text!r};"
        " box.dispatchEvent(new Event('input')) })()"
    )
    return page.evaluate(LAYERS)


def test_search_filters_by_name_and_kind(opened):
    assert search(opened, "QKV") == ["blocks.2.qkv", "blocks.10.qkv"]
    assert opened.evaluate("document.getElementById('count').textContent") == "2 of 5 layers"
    assert search(opened, "attention .10") == ["blocks.10.qkv"]
    assert search(opened, "nothing like it") == []
    assert len(search(opened, "")) == 5


def law(page):
    return page.evaluate("[...document.getElementById('law').data[0].x]")


def test_a_row_opens_its_layer(opened, steps):
    before = law(opened)
    opened.evaluate("document.querySelectorAll('#rows tr')[3].click()")
    assert opened.evaluate("document.getElementById('layer-title').textContent") == "head"
    assert opened.evaluate("location.hash") == "#layer=head.weight"
    assert opened.evaluate("document.activeElement.id") == "layer"
    below = "document.getElementById('toolbar').getBoundingClientRect().bottom"
    title = "document.getElementById('layer-title').getBoundingClientRect().top"
    opened.wait(f"{below} < {title} && {title} < innerHeight / 2")
    assert opened.evaluate("document.querySelector('tr[aria-current]').textContent").startswith("head")
    assert law(opened) == pytest.approx(steps[-1].layers["head.weight"].sigma[:18].tolist(), rel=1e-5)
    assert law(opened) != before
    assert opened.evaluate("document.getElementById('law').data[1].x.length") == 2
    opened.evaluate("document.getElementById('next').click()")
    assert "nothing flows through it" in opened.evaluate("document.getElementById('layer-missing').textContent")
    opened.evaluate("document.getElementById('next').click()")
    assert opened.evaluate("document.getElementById('layer-title').textContent") == "stem"
    assert opened.problems == []


def test_a_link_opens_its_layer_by_keyboard_and_by_address(opened, file):
    opened.evaluate("document.querySelectorAll('#rows a')[1].focus()")
    opened.press("Enter", 13, "\r")
    assert opened.evaluate("document.getElementById('layer-title').textContent") == "blocks.2.qkv"
    opened.open(file, fragment="#layer=head.weight")
    assert opened.evaluate("document.getElementById('layer-title').textContent") == "head"
    opened.open(file, fragment="#layer=%E0%A4%A")
    assert opened.evaluate("document.getElementById('layer-title').textContent") == "stem"


def test_a_point_opens_its_layer(opened):
    opened.evaluate("document.getElementById('depth').emit('plotly_click', {points: [{customdata: 3}]})")
    assert opened.evaluate("document.getElementById('layer-title').textContent") == "head"


def test_slider_moves_the_points_and_the_words(opened, steps):
    opened.evaluate("document.getElementById('step').focus()")
    for _ in range(2):
        opened.press("ArrowLeft", 37)
    assert opened.evaluate("document.getElementById('at').textContent") == "step 0, loss 1.25"
    assert opened.evaluate(ALPHAS)[0] == pytest.approx(steps[0].layers["stem.weight"].alpha.exponent, rel=1e-5)
    assert "From step" not in opened.evaluate("document.getElementById('summary').textContent")
    assert f"{steps[0].layers['stem.weight'].alpha.exponent:.2f} ±" in opened.evaluate(
        "document.querySelector('#rows tr').textContent"
    )
    ranges = "document.getElementById('depth').layout.yaxis.range.join()"
    before = opened.evaluate(ranges)
    opened.press("ArrowRight", 39)
    assert opened.evaluate(ranges) == before
    assert opened.problems == []


@pytest.mark.parametrize("dark", [False, True])
def test_theme_follows_the_system_and_toggles(browser, file, dark):
    browser.open(file, dark=dark)
    ground = "getComputedStyle(document.body).backgroundColor"
    paper = "document.getElementById('depth').layout.paper_bgcolor"
    grounds = ["rgb(246, 247, 249)", "rgb(20, 23, 27)"]
    papers = ["#ffffff", "#1c2025"]
    assert (browser.evaluate(ground), browser.evaluate(paper)) == (grounds[dark], papers[dark])
    browser.evaluate("document.getElementById('theme').click()")
    assert (browser.evaluate(ground), browser.evaluate(paper)) == (grounds[not dark], papers[not dark])
    assert browser.problems == []


SIZES = "[...document.querySelectorAll('.js-plotly-plot')].map(plot => plot._fullLayout._size.h)"
TOP = "plot.querySelector('{}').getBoundingClientRect().top"
BELOW = (
    "[...document.querySelectorAll('.js-plotly-plot')].filter(plot => plot.querySelector('.legend'))"
    f".map(plot => {TOP.format('.legend')} - {TOP.format('.xtick')})"
)


@pytest.mark.parametrize("width", [420, 1400])
def test_legends_are_below_plots_that_are_high_enough_at_any_width(browser, file, width):
    browser.open(file, width=width)
    assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    browser.wait(f"{SIZES}.every(height => height >= 218)")
    below = browser.evaluate(BELOW)
    assert len(below) >= 6
    assert min(below) > 0
    card = "document.querySelector('.scroll').closest('section').getBoundingClientRect().right"
    assert browser.evaluate(f"document.querySelector('.scroll').getBoundingClientRect().right < {card}")


def test_kinds_and_models_look_as_in_figures(browser, tmp_path):
    browser.open(write_page(run_of(synthetic.history(), "kinds"), tmp_path / "p.html"))
    traces = "document.getElementById('depth').data.filter(t => t.name)"
    drawn = browser.evaluate(f"{traces}.map(t => [t.name, t.marker.color, t.marker.symbol[0]])")
    ink = browser.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()")
    assert {name: (colour, symbol.removesuffix("-open")) for name, colour, symbol in drawn} == {
        kind: (ink if colour == "ink" else colour, SYMBOLS[marker]) for kind, (colour, marker) in KIND_STYLE.items()
    }
    models = browser.evaluate("document.getElementById('models').data.slice(1).map(t => [t.line.color, t.line.dash])")
    assert models == [[style.on_white, PLOTLY_DASH[style.dash]] for style in MODEL_STYLE.values()]
    assert browser.problems == []


def test_no_error_bar_is_of_no_length(browser, tmp_path):
    exact = [layer("exact"), layer("noisy", noise=0.3)]
    browser.open(write_page(run_of([report(*exact)], "bars"), tmp_path / "p.html"))
    errors = browser.evaluate("document.getElementById('depth').data[0].error_y.array.map(x => x > 0)")
    assert errors == [exact[0].alpha.stderr > 0, True]
    assert browser.evaluate("document.querySelectorAll('#depth path.yerror').length") == sum(errors)


def test_numbers_have_one_look(opened):
    written = {
        "fixed(-0.5)": "−0.50",
        "fixed(-123456)": "−1.23·10⁵",
        "fixed(null)": "–",
        "fixed('inf')": "∞",
        "brief(0)": "0",
        "brief(0.000123456)": "1.23·10⁻⁴",
        "brief(-0.00125)": "−0.00125",
        "brief(1234.5)": "1230",
        "percent(-0.012)": "−1.2 %",
    }
    assert {call: opened.evaluate(call) for call in written} == written


@pytest.mark.parametrize("count", [2, 150])
def test_any_number_of_probes_has_whole_steps_and_few_markers(browser, tmp_path, count):
    made = report(layer("a"), layer("b", alpha=1.5))
    browser.open(write_page(run_of([made.at(step=i, epoch=0) for i in range(count)], "n"), tmp_path / "p.html"))
    ticks = browser.evaluate(TICKS.format("training"))
    assert all(tick.isdecimal() for tick in ticks)
    marked = "[...document.querySelectorAll('#training .trace')].at(-1).querySelectorAll('.point').length"
    assert 2 <= browser.evaluate(marked) <= 26
    assert browser.problems == []


class Hostile(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({SCRIPT: nn.Linear(8, 8), SLANTED: nn.Linear(8, 8)})

    def forward(self, x):
        for part in self.parts.values():
            x = part(x).tanh()
        return x


def test_names_of_layers_are_shown_and_never_read_as_html(browser, tmp_path):
    torch.manual_seed(0)
    measured = measure_spectra(Hostile(), torch.randn(64, 8), lambda model, x: model(x).square().mean())
    file = write_page(run_of([measured.at(step=i, epoch=0) for i in (0, 1)], SCRIPT), tmp_path / "p.html")
    browser.open(file)
    assert f"parts.{SCRIPT}" in browser.evaluate(LAYERS)
    assert browser.evaluate("document.querySelector('h1').textContent") == SCRIPT
    assert browser.evaluate("document.querySelectorAll('#rows tr')[1].click(), location.hash").startswith(
        "#layer=parts.%3C"
    )
    # The text that shows while the mouse is over a point is plotly's, which reads some HTML; so are the axis's names.
    for kind, name in enumerate((SCRIPT, SLANTED)):
        browser.evaluate(f"Plotly.Fx.hover('depth', [{{curveNumber: {kind}, pointNumber: 0}}])")
        browser.wait(f"document.querySelector('#depth .hovertext')?.textContent.includes({name!r})")
    ticks = browser.evaluate("[...document.querySelectorAll('#depth .xtick text')].map(tick => tick.textContent)")
    assert ticks == [f"parts.{name[:5]}…{name[-12:]}" for name in (SCRIPT, SLANTED)]
    assert browser.evaluate("document.querySelectorAll('img, script:not([type]):not([id])').length") == 2
    assert browser.evaluate("[...document.scripts].filter(s => s.textContent.trim().startsWith('alert')).length") == 0
    assert browser.problems == []


NOTES = "document.querySelector('#{} .annotation')?.textContent"
VISIBLE = "[...document.querySelectorAll('#{} .xtick text')].filter(tick => tick.checkVisibility())"
TICKS = f"{VISIBLE}.map(tick => tick.textContent)"


def test_axes_hold_all_fits_to_trust_and_say_what_else_is_outside(browser, tmp_path):
    def at(step, head, rough):
        flat = [layer(f"c{i}", alpha=2.0 + i / 100, noise=0.05) for i in range(4)]
        return report(*flat, layer("head", alpha=head, gamma=2.0), layer("rough", alpha=rough, noise=9.0), step=step)

    browser.open(write_page(run_of([at(0, 2.0, -9.0), at(5, 0.9, 2.0)], "few"), tmp_path / "p.html"))
    low, high = browser.evaluate("document.getElementById('depth').layout.yaxis.range")
    assert low < 0.9 < 2.0 < high
    low, high = browser.evaluate("document.getElementById('transfer').layout.xaxis.range")
    assert low < 1.8 < 4.0 < high
    low, high = browser.evaluate("document.getElementById('training').layout.yaxis.range")
    curves = browser.evaluate(
        "document.getElementById('training').data.filter(t => t.mode !== 'markers').flatMap(trace => [...trace.y])"
    )
    curves = [y for y in curves if y is not None]
    assert browser.evaluate(NOTES.format("training")) == f"{sum(not low <= y <= high for y in curves)} outside"
    assert browser.problems == []


@pytest.mark.parametrize(("n", "width"), [(1, 1280), (9, 800), (30, 1280)])
def test_every_layer_has_its_name_at_the_axis(browser, tmp_path, n, width):
    layers = [layer(f"transformer.blocks.attention.{i}.weight", alpha=1.5 + i / 50) for i in range(n)]
    browser.open(write_page(run_of([report(*layers)], "names"), tmp_path / "p.html"), width=width)
    assert len(browser.evaluate(TICKS.format("depth"))) == n
    left = "Math.min(...[...document.querySelectorAll('#depth .xtick text')].map(t => t.getBoundingClientRect().left))"
    assert browser.evaluate(f"{left} >= document.getElementById('depth').getBoundingClientRect().left")


def test_probes_outside_training_are_named_where_steps_would_stand(browser, tmp_path):
    files = [tmp_path / name / "spectra.json" for name in (SLANTED.replace("/", ""), "after")]
    for i, file in enumerate(files):
        file.parent.mkdir()
        report(layer("a", alpha=1.0 + i)).to_json(file)
    browser.open(write_page(read_run(files), tmp_path / "p.html"))
    assert browser.evaluate("document.getElementById('at').textContent").startswith("after/spectra.json")
    shown = browser.evaluate(TICKS.format("training"))
    assert [shown[0][:5], shown[1]] == [SLANTED[:5], "after/spectra.json"]
    assert browser.evaluate(TICKS.format("layer-training")) == shown
    assert browser.problems == []


MEDIANS = "document.getElementById('training').data.filter(t => t.mode === 'lines+markers')"
SHOWN = "getComputedStyle(document.getElementById('{}').closest('figure')).display !== 'none'"
ABSENT = "[...document.querySelectorAll('#absent li')].map(item => item.textContent)"
HEADS = "[...document.querySelectorAll('#columns button')].map(button => button.textContent)"


def test_plots_without_data_are_left_out_and_say_why(browser, tmp_path):
    browser.open(write_page(run_of([report(dead("a"), dead("b"), step=3)], "dead"), tmp_path / "p.html"))
    shown = {plot: browser.evaluate(SHOWN.format(plot)) for plot in ("depth", "transfer", "training", "models")}
    assert shown == {"depth": False, "transfer": False, "training": False, "models": True}
    assert browser.evaluate(ABSENT) == [
        "alpha by layer is not shown: no layer has an alpha at step 3.",
        "The transfer identity is not shown: no layer has alpha, gamma and s at step 3.",
        "alpha over training is not shown: it takes several probes.",
    ]
    assert browser.evaluate("document.querySelectorAll('tr.doubtful').length") == 2
    assert browser.problems == []


def test_medians_of_kinds_are_drawn_in_their_colours(browser, tmp_path):
    def at(step):
        layers = [layer(f"{k}.{i}", kind=k, alpha=a + i) for k, a in (("conv", 2.0), (SLANTED, 3.0)) for i in (0, 1)]
        return report(*layers, step=step)

    browser.open(write_page(run_of([at(0), at(1)], "kinds"), tmp_path / "p.html"))
    thick = browser.evaluate(
        "document.getElementById('training').data.filter(t => t.mode === 'lines+markers')"
        ".map(t => [t.name.startsWith('&lt;'), t.line.color, t.y[1]])"
    )
    assert [[escaped, alpha] for escaped, _, alpha in thick] == [[False, 2.5], [True, 3.5]]
    assert len({colour for _, colour, _ in thick}) == 2
    assert browser.problems == []


def test_why_a_fit_is_not_trusted_is_shown_and_its_points_are_hollow(browser, tmp_path):
    """In the table, at its layer, while the mouse is over a point, and over training, where medians leave it out."""

    def at(step, *signals):
        layers = [
            layer(f"l{i}", alpha=1.0 + i, gradient_noise=GradientNoise(signal)) for i, signal in enumerate(signals)
        ]
        return report(*layers, step=step, curvature_samples=2)

    browser.open(write_page(run_of([at(0, 0.9, 0.9), at(5, 0.9, 0.4), at(9, 0.9, 0.4)], "doubt"), tmp_path / "p.html"))
    cells = "[...document.querySelectorAll('#rows td[data-key={}]')].map(cell => cell.textContent)"
    assert browser.evaluate(cells.format("signal")) == ["0.90", "0.40"]
    assert browser.evaluate(cells.format("doubt")) == ["", "noise"]
    rows = "[...document.querySelectorAll('#rows tr')].map(row => [row.className, row.title])"
    assert browser.evaluate(rows) == [["", ""], ["doubtful", "not to be trusted: noise"]]
    facts = "document.getElementById('facts').textContent"
    assert browser.evaluate(facts).startswith("gradient of 8 samples, curvature of 2, eval mode")
    hollow = "document.getElementById('training').data.filter(t => t.mode === 'markers' && t.marker.symbol === '{}')"
    points = ".flatMap(t => [...t.x].map((x, i) => [x, t.customdata[i]]))"
    assert browser.evaluate(hollow.format("circle-open") + points) == [[5, 1], [9, 1]]
    assert sorted(browser.evaluate(hollow.format("circle") + points)) == [[0, 0], [0, 1], [5, 0], [9, 0]]
    (medians,) = browser.evaluate(f"{MEDIANS}.map(t => [...t.y])")
    assert medians == pytest.approx([1.5, 1.0, 1.0])
    browser.evaluate("Plotly.Fx.hover('depth', [{curveNumber: 0, pointNumber: 1}])")
    browser.wait("document.querySelector('#depth .hovertext')?.textContent.includes('not to be trusted: noise')")
    browser.evaluate("document.querySelectorAll('#rows tr')[1].click()")
    assert "not to be trusted: noise" in browser.evaluate("document.getElementById('layer-facts').textContent")
    symbols = "document.getElementById('layer-training').data.map(t => [...t.marker.symbol])"
    assert browser.evaluate(symbols)[0] == ["x", "x-open", "x-open"]
    assert browser.evaluate("document.getElementById('law').data.at(-1).line.dash") == "dash"
    assert browser.problems == []


def choose(page, quantity):
    page.evaluate(
        f"(() => {{ const box = document.getElementById('quantity'); box.value = {quantity!r};"
        " box.dispatchEvent(new Event('change')) })()"
    )


@pytest.mark.parametrize("dark", [False, True])
def test_scale_can_be_chosen_over_training_on_a_log_axis(browser, tmp_path, dark):
    def at(step, factor):
        sharper = [replace(x, h=x.h * factor) for x in (layer("a"), layer("b", negative=20))]
        return report(*sharper, step=step)

    measured = [at(0, 1.0), at(5, 1000.0)]
    browser.open(write_page(run_of(measured, "scale"), tmp_path / "p.html"), dark=dark)
    options = browser.evaluate("[...document.getElementById('quantity').options].map(o => o.value)")
    assert options[0] == "alpha"
    assert {"sigma_max", "h_max", "gamma", "s"} <= set(options)
    # Of no layer known.
    assert not {"signal", "noise_scale"} & set(options)
    axis = (
        "(({type, range, title}) => [type, range, title.text])(document.getElementById('training')._fullLayout.yaxis)"
    )
    assert browser.evaluate(axis)[0] == "linear"
    choose(browser, "h_max")
    kind, (low, high), name = browser.evaluate(axis)
    assert (kind, name) == ("log", "h_max")
    assert low < 0 < 3 < high
    curves = browser.evaluate("document.getElementById('training').data.map(t => [...t.y])")
    assert curves[0] == pytest.approx([report.layers["a"].h_max for report in measured])
    assert curves[1] == [None, None]
    assert "alpha 1.85" not in browser.evaluate("document.querySelector('#training').textContent")
    assert (
        browser.evaluate("document.getElementById('training-legend').textContent")
        == "thin: layers; thick: median by kind"
    )
    browser.evaluate("document.getElementById('step').focus()")
    browser.press("ArrowLeft", 37)
    assert browser.evaluate(axis)[2] == "h_max"
    assert "largest h 1," in browser.evaluate("document.getElementById('layer-more').textContent")
    assert browser.problems == []


def test_a_probe_without_spectra_says_so(browser, steps, tmp_path, monkeypatch):
    """Of a long run, where spectra are shown of some probes alone."""
    data = page_data(run_of(steps, "long"))
    data["probes"][1]["spectra"] = None
    monkeypatch.setattr(build, "page_data", lambda run: data)
    browser.open(write_page(run_of(steps, "long"), tmp_path / "p.html"))
    assert browser.evaluate("document.getElementById('layer-missing').hidden")
    browser.evaluate("document.getElementById('step').focus()")
    browser.press("ArrowLeft", 37)
    missing = browser.evaluate("document.getElementById('layer-missing').textContent")
    assert missing == "No sigma and h of this layer at step 5 on this page."
    assert browser.evaluate("[...document.querySelectorAll('figure.spectral')].every(figure => figure.hidden)")
    assert browser.problems == []


def test_the_file_of_a_run_makes_the_page_of_its_reports(browser, steps, tmp_path):
    for r in steps:
        append_report(tmp_path / "spectra.jsonl", r)
    pages = [tmp_path / "whole.html", tmp_path / "file.html"]
    write_page(run_of(steps, "mine"), pages[0], title="mine")
    write_page(read_run([tmp_path]), pages[1], title="mine")
    whole, read = (re.sub("<p>From .*?</p>", "", page.read_text(encoding="utf-8")) for page in pages)
    assert read == whole
    browser.open(pages[1])
    assert "spectra file" in browser.evaluate("document.querySelector('footer').textContent")
    assert browser.evaluate("document.getElementById('facts').textContent").endswith("5 layers, 3 probes")
    assert browser.problems == []


def asked_for(step):
    """A layer with everything that is measured on request, and one without what alignment takes."""
    k = torch.arange(1, 21, dtype=torch.float64)
    spectrum = torch.arange(1, 41, dtype=torch.float64) ** -1
    factors = KroneckerFactors(3 * k**-0.5, k**-0.5, k**-1, 2 * k**-0.5, k**0, 4.5, 7.25, 64)
    whole = layer("whole", noise=0.2, bootstrap=20, factors=factors, spectrum=spectrum)
    draws = torch.tensor([9.0, 11.0])
    parts = {"weights": WeightSpectrum.of(torch.diag(k), top_k=5)}
    parts["fraction"] = CurvatureFraction.of(draws, whole.h, shape=whole.shape)
    without = layer("without", alpha=1.5, bootstrap=20, alignment_note="is applied twice")
    return report(*(replace(x, **parts) for x in (whole, without)), step=step, spectrum_top_k=40)


@pytest.mark.parametrize("dark", [False, True])
def test_what_was_measured_on_request_has_columns_lines_and_panels(browser, tmp_path, dark):
    measured = [asked_for(step) for step in (0, 5)]
    browser.open(write_page(run_of(measured, "asked"), tmp_path / "p.html"), dark=dark)
    heads = browser.evaluate(HEADS)
    assert heads[heads.index("alpha ± se") + 1] == "alpha 95 %"
    assert heads[heads.index("r2") + 1 :][:2] == ["signal", "doubt"]
    asked = ["s_weight", "gamma_weight", "tr H ± se", "fraction ± se", "over random", "beta", "phi", "chi_slope", "chi"]
    assert heads[heads.index("h < 0") + 1 :] == ["q1", "q2", "q3", "q4", *asked, "ratio", "rank a", "rank delta"]
    first = measured[-1].layers["whole"]
    low, high = first.intervals.alpha.low, first.intervals.alpha.high
    cell = "document.querySelector('#rows td[data-key={}]').textContent"
    assert browser.evaluate(cell.format("alpha_low")) == f"{low:.2f} to {high:.2f}"
    assert browser.evaluate(cell.format("hessian_trace")) == "10 ± 1"
    assert browser.evaluate(cell.format("effective_rank_a")) == "7.25"
    for i, quarter in enumerate(first.alpha_quartiles, start=1):
        assert browser.evaluate(cell.format(f"alpha_q{i}")) == f"{quarter.exponent:.2f}"
    lines = browser.evaluate("[...document.querySelectorAll('#layer-more li')].map(item => item.textContent)")
    assert lines[0].startswith("gradient spectrum of 40 singular values: power law, ")
    assert lines[1].startswith(f"95 % of bootstrap draws: alpha {low:.2f} to {high:.2f}, gamma ")
    assert browser.evaluate("document.getElementById('models').data[0].x.length") == 40
    drawn = browser.evaluate("document.getElementById('split').data.map(({name, x, y}) => [name, [...x], [...y]])")
    split = first.alignment
    assert [name for name, _, _ in drawn][1::2] == [
        f"{key} = {getattr(split, key).exponent:.2f}" for key in ("beta", "phi", "chi_slope")
    ]
    for (_, x, y), fit in zip(drawn[1::2], (split.beta, split.phi, split.chi_slope), strict=True):
        assert y == pytest.approx([1, (x[1] / x[0]) ** fit.exponent], rel=1e-4)
    assert drawn[0][2][0] == pytest.approx(
        float(split.lambda_delta[0] * split.lambda_a[0])
        / (math.exp(split.beta.intercept) * drawn[0][1][0] ** split.beta.exponent),
        rel=1e-4,
    )
    browser.evaluate("document.getElementById('next').click()")
    assert browser.evaluate("document.getElementById('split-figure').hidden")
    assert "alignment: is applied twice" in browser.evaluate("document.getElementById('layer-missing').textContent")
    width = "document.getElementById('layer-training').clientWidth"
    browser.wait(f"Math.abs(document.querySelector('#layer-training .main-svg').clientWidth - {width}) < 2")
    assert browser.problems == []


def test_error_bars_end_within_the_axis(browser, tmp_path):
    noisy = [layer(name, alpha=1.0, noise=3.0, seed=i, k=5) for i, name in enumerate(NAMES)]
    file = write_page(run_of([report(*noisy, layer("calm"))], "one"), tmp_path / "p.html")
    browser.open(file)
    low, high = browser.evaluate("document.getElementById('depth').layout.yaxis.range")
    assert high - low < 50
    ends = [x.alpha.exponent + way * x.alpha.stderr for x in noisy for way in (-1, 1)]
    assert low < min(ends) < max(ends) < high
    assert browser.evaluate("document.getElementById('facts').textContent").endswith("5 layers, 1 probe")
    assert browser.problems == []


def test_one_probe_has_no_slider(browser, steps, tmp_path):
    browser.open(write_page(run_of(steps[:1], "one"), tmp_path / "p.html"))
    assert browser.evaluate("document.getElementById('toolbar').hidden")
    assert browser.evaluate("document.getElementById('training').closest('figure').hidden")
    assert browser.problems == []
