"""Figures of made-up reports beside those in baseline/, as pictures.

After a wanted change `make baselines` draws them anew; look at each before committing it.
"""

import re
import sys
from pathlib import Path

import pytest
import synthetic

from lightning_spectral.report import figures

matplotlib = pytest.importorskip("matplotlib")
np = pytest.importorskip("numpy")

BASELINE = Path(__file__).parent / "baseline"

# Versions of matplotlib place and draw text differently, by more than a wrong colour makes.
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
DRAWN_WITH = re.search(r"^matplotlib==(\d+\.\d+)", CONSTRAINTS.read_text(), re.MULTILINE)[1]
same_version = pytest.mark.skipif(
    not matplotlib.__version__.startswith(f"{DRAWN_WITH}."), reason=f"the pictures are matplotlib {DRAWN_WITH}'s"
)

DPI = 40

TOLERANCE = 0.005
"""Root mean square difference of pixels in [0, 1]; one kind of layer in another colour makes 0.009."""

BLOCK = 3
"""Pixels along each side that are averaged first, so that the edges of letters count little."""

SIX = ["*.conv", "*.attention_*", "*.mlp_up", "*.head", "*.dense"]

PICTURES = {
    "power_law": lambda: figures.plot_power_law(synthetic.network(), SIX),
    "power_law_broken": lambda: figures.plot_power_law(synthetic.broken(), width=4),
    "alpha_by_depth": lambda: figures.plot_alpha_by_depth(synthetic.network()),
    "alpha_by_depth_deep": lambda: figures.plot_alpha_by_depth(synthetic.deep(), width=4),
    "transfer_identity": lambda: figures.plot_transfer_identity(synthetic.history()),
    "rank_profiles": lambda: figures.plot_rank_profiles(synthetic.network(0), SIX),
    "alpha_over_training": lambda: figures.plot_alpha_over_training(synthetic.history()),
    "alpha_over_training_dark": lambda: figures.plot_alpha_over_training(synthetic.history(), dark=True),
    "alpha_of_two_runs": lambda: figures.plot_alpha_over_training(
        {"adamw": synthetic.history(), "muon": synthetic.history((0, 60, 120))}
    ),
    "scale_over_training": lambda: figures.plot_scale_over_training(synthetic.history()),
    "rank_models_over_training": lambda: figures.plot_rank_models_over_training(synthetic.history()),
    "participation_ratio": lambda: figures.plot_participation_ratio(synthetic.history()),
    "spectrum_heatmap": lambda: figures.plot_spectrum_heatmap(synthetic.broken(), "h"),
    "transfer_functions": lambda: figures.plot_transfer_functions(synthetic.network()),
}


def draw(name, folder):
    path = folder / f"{name}.png"
    PICTURES[name]().savefig(path, dpi=DPI, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return path


def pixels(path):
    """(rows, columns, 3), averaged over blocks."""
    image = matplotlib.image.imread(path)[..., :3]
    rows, columns = (size // BLOCK for size in image.shape[:2])
    return image[: rows * BLOCK, : columns * BLOCK].reshape(rows, BLOCK, columns, BLOCK, 3).mean((1, 3))


def difference(one, other):
    """Root mean square; infinite for pictures of different sizes."""
    one, other = pixels(one), pixels(other)
    return float(np.sqrt(((one - other) ** 2).mean())) if one.shape == other.shape else np.inf


@same_version
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_those_committed(name, tmp_path):
    found = difference(draw(name, tmp_path), BASELINE / f"{name}.png")
    assert found <= TOLERANCE, f"{name} differs by {found:.3f}; if that is wanted, make baselines draws it anew"


def test_baselines_are_these_and_small():
    assert {path.stem for path in BASELINE.iterdir()} == set(PICTURES)
    assert all(path.stat().st_size < 25_000 for path in BASELINE.iterdir())


@same_version
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("power_law", lambda: figures.plot_power_law(synthetic.network(150), SIX)),
        ("alpha_by_depth", lambda: figures.plot_alpha_by_depth(synthetic.network(120))),
        ("alpha_over_training", lambda: figures.plot_alpha_over_training(synthetic.history((0, 20, 40, 90, 160)))),
        ("rank_profiles", lambda: figures.plot_rank_profiles(synthetic.network(20), SIX)),
        ("participation_ratio", lambda: figures.plot_participation_ratio(synthetic.history((0, 20, 40, 60, 120)))),
        ("spectrum_heatmap", lambda: figures.plot_spectrum_heatmap(synthetic.broken(), "sigma")),
    ],
)
def test_other_data_exceed_the_tolerance(name, other, tmp_path, monkeypatch):
    monkeypatch.setitem(PICTURES, name, other)
    assert difference(draw(name, tmp_path), BASELINE / f"{name}.png") > TOLERANCE


if __name__ == "__main__":
    BASELINE.mkdir(exist_ok=True)
    for chosen in sys.argv[1:] or PICTURES:
        print(draw(chosen, BASELINE))
