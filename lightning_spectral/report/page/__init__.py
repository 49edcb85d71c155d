"""Report of a run as one HTML file."""

from lightning_spectral.report.page.build import is_page, plotly_js, write_page

__all__ = ["is_page", "plotly_js", "write_page"]
