"""A report in a notebook: its table and summary as HTML, and its figures by name."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from lightning_spectral.records.report import SpectralReport
from lightning_spectral.report import figures
from lightning_spectral.report.terminal.tables import CAPTION, heading, layer_table, other_methods
from lightning_spectral.summary import summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = (
    "power_law", "alpha_by_depth", "rank_profiles", "spectrum_heatmap", "transfer_functions", "transfer_identity",
    "participation_ratio",
)  # fmt: skip
"""Figures of one report, without ``plot_``; those over training take several."""

DIM = ' style="opacity: 0.5"'


def report_html(report: SpectralReport) -> str:
    """Return the table of layers, in a box that scrolls, with its caption, the summary and what was not measured."""
    sentences = [*summary(report), *report.problems()]
    return (
        f"<p><b>SpectralReport</b>: {html.escape(heading(report))}</p>"
        f'<div style="max-height: 30em; overflow: auto">{table_html(layer_table(report))}</div>'
        f"<p><small>{html.escape(CAPTION + other_methods(report))}</small></p>"
        f"<ul>{''.join(f'<li>{html.escape(sentence)}</li>' for sentence in sentences)}</ul>"
    )


def table_html(table: Table) -> str:
    """Return a table of the terminal as HTML, its dim rows pale."""
    aligned = [f' style="text-align: {column.justify}"' for column in table.columns]

    def row(cells: list[Any], tag: str, look: str = "") -> str:
        texts = [html.escape(cell.plain if isinstance(cell, Text) else str(cell)) for cell in cells]
        inner = "".join(f"<{tag}{side}>{text}</{tag}>" for side, text in zip(aligned, texts, strict=True))
        return f"<tr{look}>{inner}</tr>"

    head = row([column.header for column in table.columns], "th")
    looks = [DIM if of.style == "dim" else "" for of in table.rows]
    body = zip(*(column.cells for column in table.columns), strict=True)
    rows = "".join(row(list(cells), "td", look) for cells, look in zip(body, looks, strict=True))
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def report_figure(report: SpectralReport, name: str, **options: Any) -> Figure:
    """Draw one of `FIGURES` of a report."""
    if name not in FIGURES:
        raise ValueError(f"there is no figure {name!r} of one report; there are {', '.join(FIGURES)}")
    figure: Figure = getattr(figures, f"plot_{name}")(report, **options)
    return figure
