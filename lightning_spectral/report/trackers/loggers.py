"""TensorBoard, MLflow and CSV files: what each takes of a probe beside its scalars."""

from __future__ import annotations

import csv
import html
import io
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_spectral.report.trackers.tracker import Row, Tracker, image

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        new, cut = not _heading(path), _is_cut(path)
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


def _is_cut(path: Path) -> bool:
    """Return True if the last line has no end, after a full disk or a killed process."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, io.SEEK_END)
        return file.read(1) != b"\n"


def _markdown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    # Names are no Markdown, whose cells end at a bar or a line's end, and no HTML, which it lets through.
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]|])", r"\\\1", text)
