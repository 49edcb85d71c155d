"""Figures of a report, or of a list of reports, for a paper or a notebook. Needs matplotlib.

Every function returns a `matplotlib.figure.Figure` and touches no global state of matplotlib: nothing is shown, no
backend chosen, no setting changed, and the settings in force change nothing in the figure. A notebook shows what a cell
returns as a picture. ``figure.savefig("alpha.pdf")`` writes it at its own size, with fonts embedded, pixels at 300 dpi.

A report is one of `measure_spectra` or ``probe.last_report``; where several are taken, such as ``probe.history``, they
are drawn over their steps, or numbered where one has no step. All functions have these keywords:

- ``width``: of the figure, in inches, 3.25 at least. Columns of papers are 3.25 to 3.5 wide, their text 5.5 to 6.75.
- ``title``: False leaves out the title, for a figure with a caption.
- ``dark``: light on dark, for slides and dark pages. The default is black on opaque white, so that a figure saved in a
  dark notebook is also one for a paper, and its labels can be read in both.
- ``ax``: axes of a figure of your own to draw on, in place of a new one; they are returned, and ``width`` is theirs.
  `plot_power_law` and `plot_rank_profiles` take it for one layer, `plot_scale_over_training` takes two.

They raise ImportError without matplotlib, and ValueError where there is no report, a report holds no layers, or the
width is too small.

A kind of layer has the same colour and marker in every figure, from Okabe and Ito's palette for colour-blind readers,
and in a page; where several runs are laid over each other, a colour, marker and line is a run.
Hollow markers are fits not to be trusted (`lightning_spectral.analysis.trusted`), but in `plot_power_law`, where they
are single directions that are left out of the fit.
"""

from lightning_spectral.report.figures.by_direction import plot_spectrum_heatmap, plot_transfer_functions
from lightning_spectral.report.figures.by_layer import (
    plot_alpha_by_depth,
    plot_participation_ratio,
    plot_transfer_identity,
)
from lightning_spectral.report.figures.over_training import (
    plot_alpha_over_training,
    plot_rank_models_over_training,
    plot_scale_over_training,
)
from lightning_spectral.report.figures.panels import plot_power_law, plot_rank_profiles

__all__ = [
    "plot_alpha_by_depth", "plot_alpha_over_training", "plot_participation_ratio", "plot_power_law",
    "plot_rank_models_over_training", "plot_rank_profiles", "plot_scale_over_training", "plot_spectrum_heatmap",
    "plot_transfer_functions", "plot_transfer_identity",
]  # fmt: skip
