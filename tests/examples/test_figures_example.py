"""The example draws the README's figures, and all there are, of one demo."""

import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest

from lightning_spectral.report import figures

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def test_the_example_draws_the_readmes_figures_and_all(monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    from examples.figures import make

    # One demo for both.
    monkeypatch.setattr(make, "TemporaryDirectory", lambda: nullcontext(str(tmp_path)))
    monkeypatch.setattr(make, "run", cache(make.run))

    make.main(["--output", str(tmp_path / "readme")], steps_factor=0.0025)
    committed = {path.name for path in (ROOT / "examples" / "figures").glob("*.png")}
    assert {path.name for path in (tmp_path / "readme").iterdir()} == committed
    make.main(["--all", str(tmp_path / "all")], steps_factor=0.0025)
    assert len(list((tmp_path / "all").glob("*.pdf"))) == 2 * len(figures.__all__)
