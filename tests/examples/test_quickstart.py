"""The notebook runs in a real kernel and shows what it says: tables, one line per layer, each figure once."""

import copy
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("sklearn")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
INLINE = [
    "%matplotlib inline",
    "figures.plot_alpha_by_depth(report)",
    "axes = plt.subplots(1, 2)[1]\nfigures.plot_alpha_by_depth(report, ax=axes[0])",
]
"""The same with the backend of notebooks, which shows by itself what pyplot has made."""


def pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def shown(cell):
    """What the last expression of a cell is shown as."""
    (data,) = [output.data for output in cell.outputs if output.output_type == "execute_result"]
    return data


def test_the_quickstart_runs_and_figures_show_themselves_once(tmp_path):
    committed = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in committed.cells)
    notebook = copy.deepcopy(committed)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in INLINE]
    folder = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    cells = {cell.source.splitlines()[-1]: cell for cell in notebook.cells if cell.cell_type == "code"}

    assert re.match(r"\[SpectralReport\(5 layers at step 0, loss ", shown(cells["probe.history"])["text/plain"])
    for name in ("report", "once"):
        data = shown(cells[name])
        assert data["text/html"].count("<tr") == 6
        assert data["text/plain"].startswith("SpectralReport(5 layers")
    # Older kernels send what is printed in several parts.
    printed = "".join(output.text for output in cells["print(report.summary())"].outputs)
    assert "layers have an alpha to trust" in printed
    assert shown(cells['report.layers["net.4"]'])["text/plain"].startswith("LayerSpectrum(net.4.weight, conv 32x288, ")

    drawn = ["report.plot()", "figures.plot_alpha_over_training(probe.history)"]
    drawn += [INLINE[1], INLINE[2].splitlines()[-1]]
    assert {source: pictures(cells[source]) for source in drawn} == dict.fromkeys(drawn, 1)
    # Older versions of matplotlib show the first figure of pyplot below the cell that follows.
    saved = list(cells).index('figure.savefig("digits.pdf")')
    assert sum(map(pictures, [*cells.values()][saved : saved + 2])) == 1
    assert sum(map(pictures, cells.values())) == len(drawn) + 1
    assert {"digits.pdf", "untrained.json"} <= {path.name for path in tmp_path.iterdir()}
