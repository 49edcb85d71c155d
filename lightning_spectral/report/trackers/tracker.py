"""`Row`, one probe as loggers get it, `Tracker`, and what TensorBoard, MLflow and CSV files take beside."""

from __future__ import annotations

import csv
import html
import io
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_spectral.report.runs.spectra_file import end_of_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure


DPI = 200
"""Resolution of figures as images: 6 inches are 1200 pixels, a panel of a dashboard on a dense display."""


@dataclass(frozen=True)
class Row:
    """One probe, as loggers get it.

    Attributes:
        scalars: full keys -> values.
        charted: keys that get a chart of their own in W&B.
        summarized: keys whose minimum and maximum over the run W&B keeps beside the last value.
        table: a row per layer: column -> value, the step first.
        lines: a chart of several lines, label -> (abscissas, ordinates); in W&B, with the table.
    """

    prefix: str
    step: int
    scalars: Mapping[str, float]
    charted: Sequence[str] = ()
    summarized: Collection[str] = ()
    table: Sequence[Mapping[str, Any]] = ()
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)

    def cells(self) -> list[list[Any]]:
        """Return the table without its heading; None for a number that is not finite."""
        return [
            [None if isinstance(x, float) and not math.isfinite(x) else x for x in row.values()] for row in self.table
        ]

    def columns(self) -> list[str]:
        """Return the table's heading."""
        return list(self.table[0]) if self.table else []


class Tracker:
    """Any logger: it gets the scalars.

    Args:
        warn: function that warns once of what a logger could not do; training goes on.

    Attributes:
        is_lost: True while the logger does not even take scalars.
    """

    figures = tables = files = False
    """True where the logger takes figures, tables, or a run's files."""

    def __init__(self, logger: Any, warn: Callable[[str], None]) -> None:
        self.logger, self.warn = logger, warn
        self.is_lost = False

    def write(self, row: Row) -> None:
        """Log a probe. Scalars are logged where figures or tables fail."""
        self.is_lost = True
        with self.warn_on_error(""):
            self.logger.log_metrics(dict(row.scalars), step=row.step)
            self.is_lost = False
        for name, figure in row.figures.items():
            with self.warn_on_error(" figures"):
                self.write_figure(row, name, figure)
        if row.table:
            with self.warn_on_error(" tables"):
                self.write_table(row)

    def write_figure(self, row: Row, name: str, figure: Figure) -> None:
        """Log a figure; nothing where the logger takes none."""

    def write_table(self, row: Row) -> None:
        """Log the table; nothing where the logger takes none."""

    def write_config(self, prefix: str, config: Mapping[str, Any]) -> None:
        """Log the options of a probe; nothing where the logger has no place for those of a callback."""

    def alert(self, title: str, text: str) -> None:
        """Send the user a message; nothing where the logger sends none."""

    def keep_growing(self, path: Path | None) -> None:
        """Keep a file that grows while training goes on, once there is one; nothing where the logger takes none."""

    def keep(self, paths: Sequence[Path], artifact: str | None) -> None:
        """Keep files of a run that has ended, as an artifact of this name, too; nothing where the logger takes none."""

    @contextmanager
    def warn_on_error(self, what: str) -> Iterator[None]:
        """Warn of an error within, in place of raising it."""
        try:
            yield
        except Exception as error:
            self.warn(f"{type(self.logger).__name__} could not log{what}: {error}")


def image(figure: Figure) -> Any:
    """Return a figure as a PIL image."""
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return Image.open(file)


class TensorBoardTracker(Tracker):
    """Figures as images, the table as text."""

    figures = tables = True

    def write_figure(self, row: Row, name: str, figure: Figure) -> None:
        """Log a figure as an image."""
        import numpy

        pixels = numpy.asarray(image(figure))
        self.logger.experiment.add_image(f"{row.prefix}/figures/{name}", pixels, row.step, dataformats="HWC")

    def write_table(self, row: Row) -> None:
        """Log the table as Markdown."""
        cells = [row.columns(), ["---"] * len(row.columns()), *row.cells()]
        lines = ("| " + " | ".join(map(_markdown, line)) + " |" for line in cells)
        self.logger.experiment.add_text(f"{row.prefix}/layers", "\n".join(lines), row.step)


class MLFlowTracker(Tracker):
    """Figures and tables as artifacts, a file for each step."""

    figures = tables = True

    def write_figure(self, row: Row, name: str, figure: Figure) -> None:
        """Log a figure as an artifact."""
        file = f"{row.prefix}/figures/{name}/{row.step:08d}.png"
        self.logger.experiment.log_figure(self.logger.run_id, figure, file)

    def write_table(self, row: Row) -> None:
        """Log the table as an artifact."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([row.columns(), *row.cells()])
        file = f"{row.prefix}/layers/{row.step:08d}.csv"
        self.logger.experiment.log_text(self.logger.run_id, text.getvalue(), file)


class CSVTracker(Tracker):
    """CSV logger: the table is a file beside metrics.csv, a row per step and layer, until its columns change."""

    tables = True

    def write_table(self, row: Row) -> None:
        """Append to the file, or to the next one where a run resumed with other options has other columns."""
        folder = Path(self.logger.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        heading = row.columns()
        path = _csv_file(folder / f"{row.prefix.replace('/', '_')}_layers.csv", heading)
        new = not _heading(path)
        # The last line has no end after a full disk or a killed process.
        cut = not new and end_of_lines(path) < path.stat().st_size
        with path.open("a", newline="", encoding="utf-8") as file:
            if cut:
                file.write("\n")
            writer = csv.writer(file)
            if new:
                writer.writerow(heading)
            writer.writerows(row.cells())


def _csv_file(path: Path, heading: Sequence[str]) -> Path:
    """Return the first of x.csv, x_1.csv, x_2.csv, ... that does not exist, is empty or has this heading."""
    files = itertools.chain([path], (path.with_stem(f"{path.stem}_{i}") for i in itertools.count(1)))
    return next(file for file in files if _heading(file) in ([], heading))


def _heading(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def _markdown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    # Names are no Markdown, whose cells end at a bar or a line's end, and no HTML, which it lets through.
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]|])", r"\\\1", text)
