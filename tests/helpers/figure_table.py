"""Every figure by its name, and the reports that tests draw."""

from functools import cache

import synthetic

from lightning_spectral.report import figures

ONE = {
    "power_law": figures.plot_power_law,
    "alpha_by_depth": figures.plot_alpha_by_depth,
    "rank_profiles": figures.plot_rank_profiles,
    "spectrum_heatmap": figures.plot_spectrum_heatmap,
    "transfer_functions": figures.plot_transfer_functions,
}

SEVERAL = {
    "transfer_identity": figures.plot_transfer_identity,
    "alpha_over_training": figures.plot_alpha_over_training,
    "rank_models_over_training": figures.plot_rank_models_over_training,
    "scale_over_training": figures.plot_scale_over_training,
    "participation_ratio": figures.plot_participation_ratio,
}

ALL = ONE | SEVERAL

network, deep, broken = (cache(make) for make in (synthetic.network, synthetic.deep, synthetic.broken))
"""The same reports for all tests: a figure changes none."""

REPORTS = {
    "network": network,
    "deep": deep,
    "broken": broken,
    "one layer": lambda: synthetic.report([synthetic.spectrum("head.weight", "head")]),
    "only dead": lambda: synthetic.report([synthetic.dead("a"), synthetic.dead("b")], step=1),
    "only negative": lambda: synthetic.report([synthetic.spectrum("a", negative=range(20))]),
}
