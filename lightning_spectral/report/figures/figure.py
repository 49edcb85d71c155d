"""Figure without pyplot, for notebooks and papers; imports matplotlib, and so is imported only where one is drawn."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

PRINT: dict[Any, Any] = {"pdf.fonttype": 42, "ps.fonttype": 42, "savefig.bbox": None, "savefig.dpi": 300}
"""TrueType fonts in PDF and PostScript, since journals refuse matplotlib's default, Type 3; the size of the figure, and
pixels enough for print, whatever the settings in force."""


class PaperFigure(Figure):
    """Figure that a notebook shows as its picture, once, and that is saved at its own size."""

    def savefig(self, fname: Any, **options: Any) -> None:
        """Save as `matplotlib.figure.Figure.savefig` does, at the figure's size in inches, 300 dpi, fonts embedded."""
        with rc_context(PRINT):
            super().savefig(fname, **options)

    def _repr_png_(self) -> bytes:
        """Return the picture as PNG, as IPython asks for it."""
        with BytesIO() as buffer:
            self.savefig(buffer, format="png", dpi=self.dpi)
            return buffer.getvalue()
