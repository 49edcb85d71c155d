"""What a notebook shows of a report: its table and summary, and its figures by name."""

import html
import re

import pytest
import synthetic
from reports import dead, layer, report

from lightning_spectral.records.report import VIEWS, view
from lightning_spectral.report import figures
from lightning_spectral.report.notebook import FIGURES
from lightning_spectral.summary import summary

ONE = synthetic.network()


def cells(page):
    rows = re.findall(r"<tr(.*?)</tr>", page, re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def test_html_is_the_terminals_table_and_the_summary():
    page = ONE._repr_html_()
    head, *rows = cells(page)
    assert head[:4] == ["layer", "kind", "shape", "alpha ± se"]
    assert [row[0] for row in rows] == [name.removesuffix(".weight") for name in ONE.layers]
    assert rows[0][3].startswith(f"{ONE.layers['block.conv'].alpha.exponent:.2f} ± ")
    assert "step 160, loss 1.000, 64 samples, eval mode, curvature by exact" in page
    assert "block.attention_out: measured by sketch" in page
    told = [html.unescape(text) for text in re.findall(r"<li>(.*?)</li>", page)]
    assert told == summary(ONE)
    dim = [row.startswith(' style="opacity') for row in re.findall(r"<tr(.*?)</tr>", page)[1:]]
    assert dim == [not x.fit_quality.trusted for x in ONE.layers.values()]
    assert True in dim


def test_names_and_reasons_are_shown_as_they_are():
    page = report(layer("<script>&[red]"), dead("b", note="<img src=x>"))._repr_html_()
    assert "<script" not in page
    assert "<img" not in page
    assert cells(page)[1][0] == "<script>&[red]"
    assert "<li>b: &lt;img src=x&gt;</li>" in page


def test_a_report_without_layers_is_shown_with_what_there_is():
    page = report()._repr_html_()
    assert "No layer was measured." in page
    assert len(cells(page)) == 1


def test_the_summary_is_one_text():
    assert ONE.summary().splitlines() == summary(ONE)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_by_its_name_is_that_of_the_function(name, monkeypatch):
    monkeypatch.setattr(figures, f"plot_{name}", lambda report, **options: (name, report, options))
    assert ONE.plot(name, width=4.0) == (name, ONE, {"width": 4.0})


def test_the_figure_by_default_and_one_that_is_not_there():
    assert len(ONE.plot(layers="block.conv").axes) == 1
    with pytest.raises(ValueError, match="no figure 'alpha_over_training' of one report; there are power_law, alpha"):
        ONE.plot("alpha_over_training")
    assert {f"plot_{name}" for name in FIGURES} <= set(figures.__all__)
    of_several = {name for name in figures.__all__ if name.endswith("over_training")}
    assert {f"plot_{name}" for name in FIGURES} == set(figures.__all__) - of_several


@pytest.mark.parametrize("name", VIEWS)
def test_every_view_is_there(name):
    assert callable(view(name))


def test_a_layer_in_one_line():
    good = layer("net.0.weight", noise=0.1)
    fit = good.alpha
    assert repr(good) == (
        f"LayerSpectrum(net.0.weight, dense 64x32, alpha {fit.exponent:.2f} ± {fit.stderr:.2f}, "
        f"r2 {fit.r2:.2f}, 20 of 20 directions)"
    )
    doubtful = layer("a", noise=2.0, alpha=0.5)
    assert repr(doubtful).endswith(f"20 of 20 directions, not to be trusted: r2 {doubtful.alpha.r2:.2f})")
    assert repr(dead("b")) == "LayerSpectrum(b, dense 5x5, nothing flows through it)"
