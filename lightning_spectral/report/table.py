"""A report as tables for the terminal."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_spectral.analysis import GOOD_FIT, compare_kinds, trusted
from lightning_spectral.record import SpectralReport
from lightning_spectral.report.cells import fixed, literal, name_of, new_table, percent
from lightning_spectral.report.requested import requested_of
from lightning_spectral.spectrum import LayerSpectrum

TABLE_WIDTH = 112
"""Width that a row needs. In a narrower terminal lines wrap, where a table made to fit would lose its figures."""

CAPTION = (
    "h ~ sigma^alpha, sigma ~ k^-gamma, h ~ rank^-s; error: |s - α·γ| / |s|; PR_h: directions that carry h, zeta: its "
    f"bound; dim: r2 below {GOOD_FIT}"
)
"""What the columns of the table of layers are, in a line."""


def print_report(
    report: SpectralReport,
    title: str = "spectral report",
    *,
    layers: Collection[str] | None = None,
    console: Console | None = None,
) -> None:
    """Print a report to the terminal: a row per layer, then a row per kind of layer beside the paper's alpha.

    What was measured on request has a table for each option in between.

    Args:
        report: what was measured.
        title: above the tables, before the step, the loss and the number of samples.
        layers: names of those that get a row; None: all.
        console: where to print; None: the terminal.
    """
    console = Console() if console is None else console
    console.width = max(console.width, TABLE_WIDTH)
    where = "" if report.step is None else f"step {report.step}, "
    console.print()
    heading = (
        f"{title}: {where}loss {report.loss:.3f}, {report.n_samples} samples, {report.mode} mode, "
        f"curvature by {method_of(report)}"
    )
    shown = report if layers is None else replace(report, layers={n: report.layers[n] for n in layers})
    if shown.layers or not report.layers:
        _print_table(console, layer_table(shown, heading), CAPTION)
        for requested in requested_of(shown):
            # A title of its own would be broken to the width of the table.
            console.print(requested.title, style="italic", soft_wrap=True, highlight=False)
            _print_table(console, requested.table(shown.layers.values()), requested.caption)
        heading = "median per kind of layer, beside the paper's"
    if left := len(report.layers) - len(shown.layers):
        console.print(f"{left} of {len(report.layers)} layers are not shown\n", style="dim")
    console.print(kind_table(report, heading))
    for text in report.problems():
        console.print(literal(text), style="yellow", soft_wrap=True)


def _print_table(console: Console, table: Table, caption: str) -> None:
    console.print(table)
    console.print(f"{caption}\n", style="dim", soft_wrap=True, highlight=False)


def method_of(report: SpectralReport) -> str:
    """The method of the curvature: what "auto" chose, or what was asked for."""
    return report.chosen.partition(":")[0] or report.curvature


def layer_table(report: SpectralReport, title: str = "") -> Table:
    """A row per layer: exponents, fits and participation ratio. Values of fits not to be trusted are dim."""
    table = new_table(title)
    for column in ("layer", "kind", "shape"):
        table.add_column(column, overflow="fold", no_wrap=column != "layer")
    for column in ("alpha ± se", "r2", "gamma", "s", "α·γ", "error", "PR_h", "zeta", "points"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in report.layers.values():
        table.add_row(*_row(layer), style="" if trusted(layer) else "dim")
    return table


def kind_table(report: SpectralReport, title: str = "") -> Table:
    """A row per kind of layer: medians of this report beside the paper's alpha."""
    table = new_table(title)
    table.add_column("kind", no_wrap=True)
    for column in ("layers", "alpha", "gamma", "s", "error", "PR_h"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("alpha in the paper")
    for row in compare_kinds(report):
        numbers = (fixed(row.alpha), fixed(row.gamma), fixed(row.s), percent(row.transfer_error))
        table.add_row(literal(row.kind), str(row.layers), *numbers, fixed(row.pr_curvature), row.paper_alpha)
    return table


def _row(layer: LayerSpectrum) -> list[str | Text]:
    m, n = layer.shape
    used, all_points = layer.alpha.n_used, len(layer.sigma)
    return [
        name_of(layer),
        literal(layer.kind),
        f"{m}x{n}" + (f" /{layer.groups}" if layer.groups > 1 else ""),
        f"{fixed(layer.alpha.exponent)} ± {fixed(layer.alpha.stderr)}",
        fixed(layer.alpha.r2),
        fixed(layer.gamma.exponent),
        fixed(layer.s.exponent),
        fixed(layer.alpha_gamma),
        percent(layer.transfer_error),
        fixed(layer.pr_curvature),
        fixed(layer.zeta_bound),
        f"{used}/{all_points}",
    ]
