"""Figure that a notebook shows as a picture; imports matplotlib, and so is imported only where one is drawn."""

from __future__ import annotations

from io import BytesIO

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """Figure without pyplot, whose place in a notebook is taken by its picture and not by ``<Figure size ...>``."""

    def _repr_png_(self) -> bytes:
        """Return the picture as PNG, as IPython asks for it."""
        with BytesIO() as buffer:
            self.savefig(buffer, format="png")
            return buffer.getvalue()
