"""A saved view of a W&B project's workspace: what its runs' probes measured, a section for each thing to look at."""

from __future__ import annotations

import re
from typing import Any

from lightning_spectral.layers.kinds import KINDS
from lightning_spectral.records.log_keys import RANK_MODELS, STEP_CURVATURE, median_key
from lightning_spectral.report.trackers.wandb_tracker import STEP

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

    Args:
        entity: user or team.
        project: project that the runs are in, or will be.
        name: name of the view.
        prefix: first part of the probe's keys.

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
