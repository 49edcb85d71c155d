"""`lightning-spectral workspace`: a saved view of a W&B project's workspace."""

from __future__ import annotations

import argparse
import re

from lightning_spectral.report.trackers.wandb_workspace import wandb_workspace


def run(arguments: argparse.Namespace) -> None:
    """Make the view in W&B, which prints its address.

    Raises:
        ValueError: for a project that is not ENTITY/PROJECT.
        ImportError: without wandb-workspaces.
        Exception: of W&B, without a login, a network or the right to write there.
    """
    entity, project = project_of(arguments.project)
    wandb_workspace(entity, project, name=arguments.name, prefix=arguments.prefix).save()


def project_of(path: str) -> tuple[str, str]:
    """Return entity and project of a path, or of a project's address in the browser.

    >>> project_of("team/nets"), project_of("https://wandb.ai/team/nets/workspace")
    (('team', 'nets'), ('team', 'nets'))

    Raises:
        ValueError: if it is neither.
    """
    match = re.fullmatch(r"([^/\s]+)/([^/\s]+)", re.sub(r"^https?://[^/]+/([^/]+/[^/?]+).*", r"\1", path))
    if match is None:
        raise ValueError(f"{path!r} is no ENTITY/PROJECT; give what stands in https://wandb.ai/ENTITY/PROJECT")
    return match[1], match[2]
