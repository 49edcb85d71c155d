"""Weights & Biases: options, rows with media, summaries, files and alerts of a run, and a saved view of a project."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_spectral.layers.kinds import KINDS
from lightning_spectral.records.log_keys import RANK_MODELS, STEP_CURVATURE, median_key
from lightning_spectral.report.trackers.tracker import Row, Tracker, image

STEP = "trainer/global_step"
"""Axis in W&B of all that Lightning's logger logs."""


class WandbTracker(Tracker):
    """One row per probe in W&B's history, on Lightning's axis, with media in the same row."""

    figures = tables = files = True

    def __init__(self, logger: Any, warn: Callable[[str], None]) -> None:
        super().__init__(logger, warn)
        self._defined: set[str] = set()
        self._growing: set[Path] = set()

    def write(self, row: Row) -> None:
        """Define the keys, and log the row; without media where they fail.

        A summarized key that is NaN is left out: one NaN would be its minimum and maximum for good.
        """
        self._define(row)
        scalars = {
            key: value for key, value in row.scalars.items() if key not in row.summarized or not math.isnan(value)
        }
        media: dict[str, Any] = {}
        with self.warn_on_error(" figures"):
            import wandb

            media |= {
                f"{row.prefix}/figures/{name}": wandb.Image(image(figure)) for name, figure in row.figures.items()
            }
        with self.warn_on_error(" tables"):
            media |= _wandb_tables(row)
        if media:
            with self.warn_on_error(" figures and tables"):
                self.logger.log_metrics(scalars | media, step=row.step)
                self.is_lost = False
                return
        super().write(Row(row.prefix, row.step, scalars))

    def write_config(self, prefix: str, config: Mapping[str, Any]) -> None:
        """Write the options into the run's configuration, below the prefix; a resumed run may have others."""
        self.logger.experiment.config.update({prefix: dict(config)}, allow_val_change=True)

    def alert(self, title: str, text: str) -> None:
        """Send a W&B alert, which users get by mail or Slack as their settings say."""
        with self.warn_on_error(" alerts"):
            self.logger.experiment.alert(title, text, level="WARN")

    def keep_growing(self, path: Path | None) -> None:
        """Have the run upload a file in its folder when it ends, however it ends."""
        run = self.logger.experiment
        if path is None or path in self._growing or self.is_lost or getattr(run, "disabled", False):
            return
        self._growing.add(path)
        with self.warn_on_error(f" {path.name}"):
            folder = Path(run.dir)
            if path.parent.resolve() == folder.resolve():
                run.save(str(path), base_path=str(folder), policy="end")

    def keep(self, paths: Sequence[Path], artifact: str | None) -> None:
        """Keep files among those of the run, and on request log them as an artifact."""
        run = self.logger.experiment
        if self.is_lost or getattr(run, "disabled", False):
            return
        folder = Path(run.dir)
        for path in paths:
            with self.warn_on_error(f" {path.name}"):
                if path.parent.resolve() != folder.resolve():
                    shutil.copyfile(path, folder / path.name)
                run.save(str(folder / path.name), base_path=str(folder), policy="now")
        if artifact is not None:
            with self.warn_on_error(" an artifact"):
                _log_artifact(run, artifact, paths)

    def _define(self, row: Row) -> None:
        """Hide all keys but the charted ones, of which W&B makes a chart each, and ask for summaries."""
        before = getattr(self.logger, "_prefix", "")
        for key in sorted(row.scalars.keys() - self._defined):
            options: dict[str, Any] = {"hidden": True} if key not in row.charted else {}
            if key in row.summarized:
                options["summary"] = "last,min,max"
            if not options:
                continue
            name = f"{before}-{key}" if before else key
            # One that W&B does not take, with an asterisk in it, leaves the others.
            with self.warn_on_error(" which keys have charts"):
                self.logger.experiment.define_metric(name, step_metric=STEP, step_sync=True, **options)
                self._defined.add(key)


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


def _log_artifact(run: Any, name: str, paths: Sequence[Path]) -> None:
    import wandb

    artifact = wandb.Artifact(f"{name}-{run.id}", type="spectra")
    for path in paths:
        artifact.add_file(str(path))
    run.log_artifact(artifact)


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


QUANTITIES = {
    "alpha": "alpha, h ~ sigma^alpha",
    "gamma": "gamma, sigma_k ~ k^-gamma",
    "s": "s, h ~ rank^-s",
    "transfer_error": "transfer error, |s - alpha gamma| / |s|",
    "pr_curvature": "participation ratio of the curvature",
    "zeta_bound": "zeta bound of the participation ratio",
}
"""Quantity -> title of the panel of its medians."""

PICTURES = ("power_law", "alpha_by_depth", "scale", "transfer_identity", "rank_models")
"""Figures, in the order in which they are shown."""


def wandb_workspace(entity: str, project: str, *, name: str = "lightning-spectral", prefix: str = "spectral") -> Any:
    """Return a workspace of a project, which its method ``save`` sends to W&B as a saved view.

    Raises:
        ImportError: without the package wandb-workspaces.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        # One that is older than W&B itself cannot be imported either.
        raise ImportError(
            f'a workspace needs wandb-workspaces: pip install --upgrade "lightning-spectral[workspace]" ({error})'
        ) from error

    def lines(title: str, *keys: str, **options: Any) -> Any:
        return wr.LinePlot(title=title, x=STEP, y=[f"{prefix}/{key}" for key in keys], **options)

    def by_kind(quantity: str, title: str, **options: Any) -> Any:
        return lines(title, median_key(quantity), *(median_key(quantity, kind) for kind in KINDS), **options)

    def of_layers(quantity: str, title: str, **options: Any) -> Any:
        # Parameters have a dot in their names, and kinds have none.
        regex = rf"^{re.escape(prefix)}/{quantity}/.*\..*$"
        return wr.LinePlot(title=title, x=STEP, metric_regex=regex, **options)

    by_depth = wr.CustomChart(
        query={"summaryTable": {"tableKey": f"Custom Chart Tables/{prefix}/alpha_by_depth_table"}},
        chart_name="wandb/lineseries/v0",
        chart_fields={"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"},
        chart_strings={"title": "alpha against depth, of runs with log_tables=True", "xname": "layer"},
    )
    sections = {
        "Medians by kind of layer": [by_kind(quantity, title) for quantity, title in QUANTITIES.items()],
        "Alpha of the layers": [by_depth, of_layers("alpha", "alpha"), of_layers("r2_alpha", "r2 of the fit of alpha")],
        "The optimizer's step": [
            lines("best factor on the step; below 1/2 it raises the loss", "step/scale"),
            lines("change of the loss: predicted and actual", "step/predicted_change", "step/actual_change"),
            of_layers(STEP_CURVATURE.name, "share of the curvature along the step"),
        ],
        "Sampling noise": [
            by_kind("noise_scale", "noise scale, in samples", log_y=True),
            by_kind("signal", "signal: share of the squared gradient that is no noise"),
            lines("samples of gradient and curvature", "gradient_samples", "curvature_samples", log_y=True),
        ],
        "Scale": [
            of_layers("h_max", "largest curvature h", log_y=True),
            of_layers("sigma_max", "largest singular value sigma", log_y=True),
            lines("gradient spectrum: share of layers by model", *(f"rank_model/{model}" for model in RANK_MODELS)),
        ],
        "Whether to trust it": [
            lines("layers to trust, measured, failed", "layers_trusted", "layers_measured", "layers_failed"),
            lines("directions of negative curvature", "negative_curvature_sum"),
            lines("share of wall time", "probe_overhead"),
        ],
        "Figures, of runs with log_figures_every": [
            wr.MediaBrowser(title=name, media_keys=[f"{prefix}/figures/{name}"]) for name in PICTURES
        ],
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(name=title, panels=panels, is_open=i < 3) for i, (title, panels) in enumerate(sections.items())
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP),
    )
