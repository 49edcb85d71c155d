"""Figures as matplotlib draws them: their text stands inside and apart, whatever the settings."""

import itertools

import pytest
from figure_table import ALL, REPORTS, network

matplotlib = pytest.importorskip("matplotlib")

FIGURES = [
    ("network", 3.5), ("network", 6.0), ("deep", 3.5), ("deep", 6.0), ("broken", 3.5), ("one layer", 6.0),
    ("one layer", 3.5), ("only dead", 6.0), ("only negative", 3.5),
]  # fmt: skip


@pytest.mark.filterwarnings("error:constrained_layout", "error:Glyph")
@pytest.mark.parametrize(("kind", "width"), FIGURES)
@pytest.mark.parametrize("name", ALL)
def test_every_report_makes_a_figure_with_its_text_inside_and_apart(name, kind, width):
    figure = ALL[name](REPORTS[kind](), width=width)
    assert isinstance(figure, matplotlib.figure.Figure)
    assert figure.get_figwidth() == width
    renderer, page = figure._get_renderer(), figure.bbox.padded(1)
    texts = [figure._suptitle, *(figure.texts), *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            within = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            ticks = [label for tick in within for label in (tick.label1, tick.label2) if label.get_visible()]
            boxes = [label.get_window_extent(renderer) for label in ticks if label.get_text()]
            assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes)), ticks
            texts += ticks
    for text in texts:
        box = text.get_window_extent(renderer)
        if text.get_text():
            assert page.x0 <= box.x0 <= box.x1 <= page.x1, text
            assert page.y0 <= box.y0 <= box.y1 <= page.y1, text
    for part in (figure._suptitle, *figure.legends):
        box = part.get_window_extent(renderer)
        assert not any(box.overlaps(axes.get_tightbbox(renderer)) for axes in figure.axes), part
        assert figure._supylabel is None or not box.overlaps(figure._supylabel.get_window_extent(renderer)), part


@pytest.mark.parametrize("name", ALL)
def test_settings_are_neither_changed_nor_taken(name, tmp_path):
    def pixels():
        figure = ALL[name](network())
        before = dict(matplotlib.rcParams)
        figure.savefig(tmp_path / "figure.png", dpi=50)
        assert dict(matplotlib.rcParams) == before
        return matplotlib.image.imread(tmp_path / "figure.png")

    plain = pixels()
    odd = {
        "axes.facecolor": "red", "figure.facecolor": "green", "text.color": "blue", "lines.linewidth": 9,
        "xtick.labelsize": 30, "ytick.major.size": 20, "font.sans-serif": ["cmr10"], "axes.grid": True,
    }  # fmt: skip
    with matplotlib.rc_context(odd):
        assert abs(pixels() - plain).max() <= 2 / 255
