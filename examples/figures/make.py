"""Draw the figures of README and manual: of the demo's runs, which are printed, too, and of three decisions.

python examples/figures/make.py              # the five of them, into this folder: about six minutes on one CPU core
python examples/figures/make.py --all FOLDER # every figure of both networks
"""

from __future__ import annotations

import argparse
import sys
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.figures import decisions
from lightning_spectral import SpectralReport
from lightning_spectral.demo.run import run
from lightning_spectral.report import figures

DPI, SMALL_DPI = 150, 110
"""Of these figures."""


def draw_readme(histories: dict[str, list[SpectralReport]], folder: Path) -> None:
    """The two figures of the demo's runs."""
    resnet, gpt = histories["resnet-digits"], histories["gpt-python"]
    save_small(figures.plot_power_law(resnet[-1]), folder / "resnet_power_law.png")
    save_small(figures.plot_alpha_over_training(gpt), folder / "gpt_alpha_over_training.png")


def draw_decisions(folder: Path, steps_factor: float) -> None:
    """The three figures of decisions, each of runs of its own."""
    short = {} if steps_factor == 1.0 else {"steps": 1, "samples": 8}
    for name, figure in decisions.draw(**short).items():
        save_small(figure, folder / f"{name}.png", SMALL_DPI)


def save_small(figure: Figure, path: Path, dpi: int = DPI) -> None:
    """Write a PNG of 64 colours, a quarter of the size of one in full colour."""
    with BytesIO() as buffer:
        figure.savefig(buffer, dpi=dpi)
        Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)


def draw_all(histories: dict[str, list[SpectralReport]], folder: Path) -> None:
    """Every figure of every run, as PDF."""
    of_one = ("power_law", "alpha_by_depth", "rank_profiles", "spectrum_heatmap", "transfer_functions")
    for name_of_run, history in histories.items():
        for name in figures.__all__:
            what = history[-1] if name.removeprefix("plot_") in of_one else history
            getattr(figures, name)(what).savefig(folder / f"{name_of_run}_{name.removeprefix('plot_')}.pdf")


def main(arguments: list[str] | None = None, *, steps_factor: float = 1.0) -> None:
    """Run the demo and draw; a factor below 1 shortens the runs, for a test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    parser.add_argument("--all", type=Path, metavar="FOLDER", help="draw every figure into this folder instead")
    options = parser.parse_args(arguments)
    folder = options.all or options.output
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as logs:
        histories = run(logs, steps_factor=steps_factor)
    (draw_all if options.all else draw_readme)(histories, folder)
    if not options.all:
        draw_decisions(folder, steps_factor)
    print(f"figures in {folder}")


if __name__ == "__main__":
    main()
