"""Figures of a report, or of a list of reports, for a paper or a notebook. Needs matplotlib.

Every function returns a `matplotlib.figure.Figure` and touches no global state of matplotlib: nothing is shown, no
backend chosen, no setting changed, and the settings in force change nothing in the figure. Save it with
``figure.savefig("alpha.pdf")``; a notebook shows what a cell returns as a picture.

All take the keywords ``width``, in inches, made for 3.5 and more, and ``dark``. Figures are black on opaque white by
default, so that one saved in a dark notebook is also one for a paper, and its labels can be read in both; a transparent
ground would lose its black labels on a dark page. ``dark=True`` draws light on dark for slides and dark pages.

A kind of layer has the same colour and marker in every figure, from Okabe and Ito's palette for colour-blind readers.
Hollow markers are fits not to be trusted (`lightning_spectral.analysis.trusted`), but in `plot_power_law`, where they
are single directions that are left out of the fit.
"""

from lightning_spectral.report.figures.by_layer import (
    plot_alpha_by_depth,
    plot_participation_ratio,
    plot_transfer_identity,
)
from lightning_spectral.report.figures.heatmap import plot_spectrum_heatmap
from lightning_spectral.report.figures.over_training import (
    plot_alpha_over_training,
    plot_rank_models_over_training,
    plot_scale_over_training,
)
from lightning_spectral.report.figures.panels import plot_power_law, plot_rank_profiles
from lightning_spectral.report.figures.transfer_functions import plot_transfer_functions

__all__ = [
    "plot_alpha_by_depth",
    "plot_alpha_over_training",
    "plot_participation_ratio",
    "plot_power_law",
    "plot_rank_models_over_training",
    "plot_rank_profiles",
    "plot_scale_over_training",
    "plot_spectrum_heatmap",
    "plot_transfer_functions",
    "plot_transfer_identity",
]
