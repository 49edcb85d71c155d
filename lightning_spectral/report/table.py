"""A report as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_spectral.analysis import GOOD_FIT, compare_kinds
from lightning_spectral.record import SpectralReport
from lightning_spectral.spectrum import LayerSpectrum

TABLE_WIDTH = 112
"""Width that a row needs. In a narrower terminal lines wrap, where a table made to fit would lose its figures."""


def print_report(
    report: SpectralReport,
    title: str = "spectral report",
    *,
    layers: Collection[str] | None = None,
    console: Console | None = None,
) -> None:
    """Print a report to the terminal: a row per layer, then a row per kind of layer beside the paper's alpha.

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
        console.print(layer_table(shown, heading))
        heading = "median per kind of layer, beside the paper's"
    if left := len(report.layers) - len(shown.layers):
        console.print(f"{left} of {len(report.layers)} layers are not shown\n", style="dim")
    console.print(kind_table(report, heading))
    for text in report.problems():
        console.print(literal(text), style="yellow", soft_wrap=True)


def method_of(report: SpectralReport) -> str:
    """The method of the curvature: what "auto" chose, or what was asked for."""
    return report.chosen.partition(":")[0] or report.curvature


def literal(text: str, style: str = "") -> Text:
    r"""A text as it is, for the terminal: no markup, no emoji, and what is not to be printed by its code.

    >>> print(literal("[red]:x:[/]"), literal("a" + chr(27) + "[2J"))
    [red]:x:[/] a\x1b[2J
    """
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), style)


def layer_table(report: SpectralReport, title: str = "") -> Table:
    """A row per layer: exponents, fits and participation ratio. Values of fits with r2 below 0.9 are dim."""
    table = _table(title)
    for column in ("layer", "kind", "shape"):
        table.add_column(column, overflow="fold", no_wrap=column != "layer")
    for column in ("alpha ± se", "r2", "gamma", "s", "α·γ", "error", "PR_h", "zeta", "points"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in report.layers.values():
        table.add_row(*_row(layer), style="dim" if layer.alpha.r2 < GOOD_FIT else "")
    return table


def kind_table(report: SpectralReport, title: str = "") -> Table:
    """A row per kind of layer: medians of this report beside the paper's alpha."""
    table = _table(title)
    table.add_column("kind", no_wrap=True)
    for column in ("layers", "alpha", "gamma", "s", "error", "PR_h"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("alpha in the paper")
    for row in compare_kinds(report):
        numbers = (_fixed(row.alpha), _fixed(row.gamma), _fixed(row.s), _percent(row.transfer_error))
        table.add_row(literal(row.kind), str(row.layers), *numbers, _fixed(row.pr_curvature), row.paper_alpha)
    return table


def _table(title: str) -> Table:
    heading = literal(title, "table.title") if title else None
    return Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def _row(layer: LayerSpectrum) -> list[str | Text]:
    m, n = layer.shape
    used, all_points = layer.alpha.n_used, len(layer.sigma)
    return [
        literal(layer.name.removesuffix(".weight")),
        literal(layer.kind),
        f"{m}x{n}" + (f" /{layer.groups}" if layer.groups > 1 else ""),
        f"{_fixed(layer.alpha.exponent)} ± {_fixed(layer.alpha.stderr)}",
        _fixed(layer.alpha.r2),
        _fixed(layer.gamma.exponent),
        _fixed(layer.s.exponent),
        _fixed(layer.alpha_gamma),
        _percent(layer.transfer_error),
        _fixed(layer.pr_curvature),
        _fixed(layer.zeta_bound),
        f"{used}/{all_points}",
    ]


def _fixed(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.1e}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"
