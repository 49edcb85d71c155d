"""Spectra and fits that the paper printed, from the files in PAPER_RESULTS."""

import json
import os
from pathlib import Path

import pytest

PAPER = Path(os.environ.get("PAPER_RESULTS", Path(__file__).parents[3] / "shared" / "paper-results"))
needs_paper = pytest.mark.skipif(
    not PAPER.is_dir(), reason=f"the paper's data files are not in {PAPER}; PAPER_RESULTS names their folder"
)


def paper_layers():
    """(measured spectrum, fits the paper printed for it) of the 24 layers."""
    triangle = json.loads((PAPER / "results_alpha_triangle.json").read_text())
    models = json.loads((PAPER / "results_model_fit_comparison.json").read_text())["layers"]
    by_name = {(layer["experiment"], layer["name"]): layer for layer in models}
    return [
        (experiment["experiment"], layer, by_name[experiment["experiment"], layer["name"]])
        for experiment in triangle
        for layer in experiment["results"]
    ]
