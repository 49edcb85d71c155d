"""Write one probe to a logger: W&B, TensorBoard, MLflow, CSV files or any other.

Loggers are recognised by the names of their classes, of either Lightning package. A tracker's own package is imported
where it is used.
"""

from __future__ import annotations

import csv
import html
import io
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEP = "trainer/global_step"
"""Axis in W&B of all that Lightning's logger logs."""

DPI = 110
"""Resolution of figures as images: 6 inches fill a column of a dashboard."""


@dataclass(frozen=True)
class Row:
    """One probe, as loggers get it.

    Attributes:
        prefix: first part of its keys.
        step: optimizer steps before it.
        scalars: full keys -> values.
        charted: keys that get a chart of their own in W&B.
        table: a row per layer: column -> value.
        lines: a chart of several lines, label -> (abscissas, ordinates); in W&B, with the table.
        figures: name -> figure.
    """

    prefix: str
    step: int
    scalars: Mapping[str, float]
    charted: Sequence[str] = ()
    table: Sequence[Mapping[str, Any]] = ()
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)

    def cells(self) -> list[list[Any]]:
        """Return the table without its heading; None for a number that is not finite."""
        return [[_cell(value) for value in row.values()] for row in self.table]

    def columns(self) -> list[str]:
        """Return the table's heading."""
        return list(self.table[0]) if self.table else []


class Tracker:
    """Any logger: it gets the scalars.

    Args:
        logger: of a Trainer.
        warn: function that warns once of what a logger could not do; training goes on.
    """

    figures = tables = False
    """True where the logger takes figures, or tables."""

    def __init__(self, logger: Any, warn: Callable[[str], None]) -> None:
        self.logger, self.warn = logger, warn

    def write(self, row: Row) -> None:
        """Log a probe. Scalars are logged where figures or tables fail."""
        with self.warn_on_error(""):
            self.logger.log_metrics(dict(row.scalars), step=row.step)
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

    @contextmanager
    def warn_on_error(self, what: str) -> Iterator[None]:
        """Warn of an error within, in place of raising it."""
        try:
            yield
        except Exception as error:
            self.warn(f"{type(self.logger).__name__} could not log{what}: {error}")


class WandbTracker(Tracker):
    """One row per probe in W&B's history, on Lightning's axis, with media in the same row."""

    figures = tables = True

    def __init__(self, logger: Any, warn: Callable[[str], None]) -> None:
        super().__init__(logger, warn)
        self._defined: set[str] = set()

    def write(self, row: Row) -> None:
        """Hide the keys beyond the charts, and log the row; without media where they fail."""
        self._hide(row)
        media: dict[str, Any] = {}
        with self.warn_on_error(" figures"):
            media |= {f"{row.prefix}/figures/{name}": _wandb_image(figure) for name, figure in row.figures.items()}
        with self.warn_on_error(" tables"):
            media |= _wandb_tables(row)
        if media:
            with self.warn_on_error(" figures and tables"):
                self.logger.log_metrics(dict(row.scalars) | media, step=row.step)
                return
        super().write(Row(row.prefix, row.step, row.scalars))

    def _hide(self, row: Row) -> None:
        """Hide all keys but the charted ones: W&B makes a chart of every other."""
        before = getattr(self.logger, "_prefix", "")
        for key in sorted(row.scalars.keys() - set(row.charted) - self._defined):
            name = f"{before}-{key}" if before else key
            # One that W&B does not take, with an asterisk in it, leaves the others.
            with self.warn_on_error(" which keys have charts"):
                self.logger.experiment.define_metric(name, step_metric=STEP, step_sync=True, hidden=True)
                self._defined.add(key)


def _wandb_image(figure: Figure) -> Any:
    import wandb

    return wandb.Image(image(figure))


def _wandb_tables(row: Row) -> dict[str, Any]:
    if not row.table:
        return {}
    import wandb

    media: dict[str, Any] = {f"{row.prefix}/layers": wandb.Table(columns=[*row.columns()], data=[*row.cells()])}
    if row.lines:
        xs, ys = zip(*row.lines.values(), strict=True)
        media[f"{row.prefix}/alpha_by_depth"] = wandb.plot.line_series(
            list(xs), list(ys), keys=list(row.lines), title="alpha by depth", xname="layer", split_table=True
        )
    return media


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
        heading = ["step", *row.columns()]
        path = _csv_file(folder / f"{row.prefix.replace('/', '_')}_layers.csv", heading)
        new, cut = not _heading(path), _is_cut(path)
        with path.open("a", newline="", encoding="utf-8") as file:
            if cut:
                file.write("\n")
            writer = csv.writer(file)
            if new:
                writer.writerow(heading)
            writer.writerows([row.step, *cells] for cells in row.cells())


_TRACKERS: dict[str, type[Tracker]] = {
    "WandbLogger": WandbTracker,
    "TensorBoardLogger": TensorBoardTracker,
    "MLFlowLogger": MLFlowTracker,
    "CSVLogger": CSVTracker,
}


def offline_wandb_run(project: str, name: str, folder: Path) -> Any:
    """Start an offline run for a `WandbLogger`, which prints nothing in the terminal.

    A run that the logger starts by itself warns of an argument that Lightning gives it.
    """
    import wandb

    # Else W&B's own summary of every key would bury what is printed.
    settings = wandb.Settings(silent=True)
    run = wandb.init(project=project, name=name, dir=str(folder), mode="offline", settings=settings)
    # As Lightning does for the runs that it starts.
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, step_sync=True)
    return run


def tracker_of(logger: Any, warn: Callable[[str], None]) -> Tracker:
    """Return the tracker of a Trainer's logger."""
    names = [base.__name__ for base in type(logger).__mro__]
    return next((_TRACKERS[name] for name in names if name in _TRACKERS), Tracker)(logger, warn)


def image(figure: Figure) -> Any:
    """Return a figure as a PIL image."""
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return Image.open(file)


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


def _cell(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    # Names are no Markdown, whose cells end at a bar or a line's end, and no HTML, which it lets through.
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]|])", r"\\\1", text)
