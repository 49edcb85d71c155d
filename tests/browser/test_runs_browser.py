"""The page of several runs in a real browser. Skipped where there is none."""

import math
from dataclasses import replace

import pytest
import synthetic
from browser import Page, find_browser
from reports import layer, report

from lightning_spectral.layers.kinds import KINDS
from lightning_spectral.records.step import StepMeasurement
from lightning_spectral.report import run_of, write_page
from lightning_spectral.report.palette import RUN_STYLE, SYMBOLS

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="no Chromium or Chrome on PATH (or in the variable CHROMIUM)"
)

NAME = "<i>muon</i><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    page = Page(find_browser(), tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


def with_steps(run, factor):
    steps = (replace(s, update=StepMeasurement(-factor, 1.0, {}, 1.0, 0.5, step=s.step)) for s in run.steps)
    return replace(run, steps=tuple(steps))


@pytest.fixture(scope="module")
def runs():
    one = run_of(synthetic.history(), "adamw")
    other = run_of([replace(r, mode="train", loss=0.5) for r in synthetic.history((0, 60, 120))], NAME)
    return [with_steps(one, 2.0), other]


@pytest.fixture(scope="module")
def file(tmp_path_factory, runs):
    return write_page(runs, tmp_path_factory.mktemp("page") / "page.html")


def traces(page, plot, what):
    return page.evaluate(f"document.getElementById({plot!r}).data.filter(t => t.name).map(t => {what})")


def texts(page, selector):
    return page.evaluate(f"[...document.querySelectorAll({selector!r})].map(item => item.textContent)")


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (420, True)])
def test_runs_are_laid_over_each_other(browser, file, runs, width, dark):
    browser.open(file, width=width, dark=dark)
    assert (browser.problems, browser.requests) == ([], [])
    assert browser.evaluate("document.querySelector('h1').textContent") == f"adamw, {NAME}"
    assert texts(browser, "#legend button") == ["adamw", NAME]
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert texts(browser, "#kinds figcaption") == list(KINDS)
    for kind in ("conv", "mlp_up"):
        lines = traces(browser, f"kind-{kind}", "[[...t.x], [...t.y], t.line.color, t.marker.symbol]")
        for (x, y, colour, symbol), run, style in zip(lines, runs, RUN_STYLE, strict=False):
            assert x == [step.step for step in run.steps]
            assert y == pytest.approx([s.report.medians()[f"alpha/median_{kind}"] for s in run.steps], rel=1e-5)
            assert (colour, symbol) == (style.on_dark if dark else style.on_white, SYMBOLS[style.marker])
    pairs = traces(browser, "pairs", "[...t.y]")
    for y, run in zip(pairs, runs, strict=True):
        alphas = [x.alpha.exponent for x in run.steps[-1].report.layers.values()]
        assert y == pytest.approx([a for a in alphas if not math.isnan(a)], rel=1e-5)
    assert traces(browser, "loss", "[...t.y]") == [[1.0] * 5, [0.5] * 3]
    assert traces(browser, "scale", "[...t.y]") == [[2.0] * 5, [None] * 3]
    sizes = "[...document.querySelectorAll('.js-plotly-plot')].map(plot => plot._fullLayout._size.h)"
    browser.wait(f"{sizes}.every(height => height >= 218)")
    assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.problems == []


def test_options_that_differ_are_warned_of_and_marked(browser, file):
    browser.open(file)
    warned = texts(browser, "#differences li")
    assert warned[1:] == [f"mode: eval in adamw; train in {NAME}"]
    assert texts(browser, "#runs td.differs") == ["eval", "train"]
    assert texts(browser, "#options th")[:4] == ["run", "probes", "last probe", "last loss"]


def test_a_run_can_be_left_out_and_put_back_and_a_quantity_chosen(browser, file):
    browser.open(file)
    click = "document.querySelector('#legend button').click()"
    browser.evaluate(click)
    assert browser.evaluate("document.querySelector('#legend button').getAttribute('aria-pressed')") == "false"
    assert traces(browser, "kind-conv", "t.x.length") == traces(browser, "loss", "t.x.length") == [3]
    browser.evaluate(click)
    assert traces(browser, "kind-conv", "t.x.length") == [5, 3]
    browser.evaluate(
        "(() => { const box = document.getElementById('quantity'); box.value = 'h_max';"
        " box.dispatchEvent(new Event('change')) })()"
    )
    assert browser.evaluate("document.getElementById('kind-conv')._fullLayout.yaxis.type") == "log"
    browser.evaluate("document.getElementById('theme').click()")
    assert traces(browser, "loss", "t.line.color") == [style.on_dark for style in RUN_STYLE[:2]]
    assert browser.problems == []


def test_what_no_run_has_is_said_and_the_difference_of_two_stands_in_the_table(browser, tmp_path):
    runs = [run_of([report(layer("a", alpha=alpha))], name) for name, alpha in (("one", 2.0), ("two", 1.5))]
    browser.open(write_page(runs, tmp_path / "p.html"))
    absent = texts(browser, "#absent li")
    assert [text.split(" is not shown")[0] for text in absent] == ["The step's scale", "The noise scale"]
    assert browser.evaluate("document.getElementById('noise').closest('figure').hidden")
    assert browser.evaluate("document.getElementById('curves-legend').textContent") == ""
    assert texts(browser, "#columns th") == ["layer", "kind", "one", "two", "difference"]
    assert texts(browser, "#rows td")[-1] == "−0.50"
    three = [*runs, replace(runs[0], name="three")]
    browser.open(write_page(three, tmp_path / "p.html"))
    assert texts(browser, "#columns th") == ["layer", "kind", "one", "two", "three"]
    assert browser.problems == []
