"""The example draws the figures of README and manual, and all there are, of one demo."""

import sys
from pathlib import Path

import pytest
from reports import layer, report

from lightning_spectral import SpectralProbe
from lightning_spectral.report import figures

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

RUNS = ("resnet-digits", "gpt-python")
"""Of the demo."""


def test_the_example_draws_the_readmes_figures_and_all(monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    from examples.figures import decisions, make

    # One run for all that are compared.
    real = decisions.train
    run = real(1, 1, batch=decisions.same_samples(), gradient_samples=8, max_samples=8, swap_optimizer=True)
    assert len(run.history[-1].layers) == 9
    assert run.scales.keys() == run.losses.keys()
    asked = []

    def train(steps, every, *, lr=3e-3, batch_size=64, **options):
        SpectralProbe(every_n_steps=every, **options)
        asked.append((steps, lr, batch_size, options.get("swap_optimizer", False)))
        return run

    monkeypatch.setattr(decisions, "train", train)

    # The demo has a test of its own.
    histories = {name: [report(layer("a"), layer("b", noise=0.2), step=step) for step in (0, 5)] for name in RUNS}
    monkeypatch.setattr(make, "run", lambda folder, steps_factor: histories)

    make.main(["--output", str(tmp_path / "readme")], steps_factor=0.0025)
    committed = {path.name for path in (ROOT / "examples" / "figures").glob("*.png")}
    assert {path.name for path in (tmp_path / "readme").iterdir()} == committed
    assert [lr for _, lr, *_ in asked[:3]] == [0.003, 0.03, 0.3]
    assert [size for *_, size, _ in asked[3:5]] == [8, 128]
    assert [swap for *_, swap in asked[5:]] == [False, True]
    make.main(["--all", str(tmp_path / "all")], steps_factor=0.0025)
    assert len(list((tmp_path / "all").glob("*.pdf"))) == len(RUNS) * len(figures.__all__)


def test_a_scale_that_is_not_there_is_left_out_and_a_small_one_stands_on_the_edge():
    from examples.figures import decisions

    run = decisions.Run(scales={0: 2.0, 5: float("nan"), 10: 1e-5, 15: -1.0}, losses={0: 3.0, 5: 2.0, 10: 1.0, 15: 1.0})
    scales, losses = decisions.draw_step_scale({"lr 1": run}).axes
    assert list(scales.lines[0].get_xdata()) == [0, 10]
    assert list(scales.lines[0].get_ydata()) == [2.0, decisions.LEAST_SCALE]
    assert scales.get_ylim()[0] < decisions.LEAST_SCALE
    assert list(losses.lines[0].get_ydata()) == [3.0, 2.0, 1.0, 1.0]
