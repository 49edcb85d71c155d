"""Reports for people: tables in the terminal, and a page for a browser."""

from lightning_spectral.report.page.build import write_page
from lightning_spectral.report.runs.read import read_run, run_of
from lightning_spectral.report.runs.run import RunError
from lightning_spectral.report.runs.several import read_runs
from lightning_spectral.report.runs.spectra_file import read_reports, read_steps
from lightning_spectral.report.terminal.tables import kind_table, layer_table, print_report

__all__ = [
    "RunError", "kind_table", "layer_table", "print_report", "read_reports", "read_run", "read_runs", "read_steps",
    "run_of", "write_page",
]  # fmt: skip
