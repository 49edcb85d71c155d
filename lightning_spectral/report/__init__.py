"""Reports for people: tables in the terminal."""

from lightning_spectral.report.table import kind_table, layer_table, print_report

__all__ = ["kind_table", "layer_table", "print_report"]
