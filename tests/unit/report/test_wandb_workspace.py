"""The saved view of a W&B workspace, as it would be sent: every panel shows keys that a probe logs."""

import re
import sys

import pytest
from reports import layer, report

from lightning_spectral import cli
from lightning_spectral.callbacks.log_selection import LogSelection
from lightning_spectral.callbacks.report_writer import FIGURES
from lightning_spectral.cli.report_command import project_of
from lightning_spectral.layers.kinds import KINDS
from lightning_spectral.records.log_keys import PROBE_KEYS, STEP_CURVATURE, STEP_KEYS, layer_key
from lightning_spectral.report.trackers.wandb_tracker import PICTURES, wandb_workspace

pytest.importorskip("wandb_workspaces")


def panels_of(view):
    """Section -> configuration of each of its panels, as W&B gets them."""
    sections = view._to_model().spec.section.panel_bank_config.sections
    return {
        section.name: [panel.model_dump(by_alias=True, exclude_none=True)["config"] for panel in section.panels]
        for section in sections
    }


def logged_keys():
    """All keys that a probe logs of a network with every kind of layer."""
    measured = report(*(layer(f"net.{i}.weight", kind=kind) for i, kind in enumerate(KINDS)))
    keys = LogSelection("all", "auto", (), pytest.fail).scalars(measured)
    return {*keys, *PROBE_KEYS, *STEP_KEYS, *(layer_key(STEP_CURVATURE.name, name) for name in measured.layers)}


def test_every_line_is_of_a_key_that_is_logged():
    panels = [panel for section in panels_of(wandb_workspace("team", "nets")).values() for panel in section]
    logged = {f"spectral/{key}" for key in logged_keys()}
    named = {key for panel in panels for key in panel.get("metrics", [])}
    assert named <= logged
    assert {panel["xAxis"] for panel in panels if "xAxis" in panel} == {"trainer/global_step"}
    kinds = {f"spectral/{name}/median_{kind}" for name in ("alpha", "noise_scale") for kind in KINDS}
    assert {"spectral/alpha_median", "spectral/step/scale", *kinds} <= named
    patterns = [panel["metricRegex"] for panel in panels if panel.get("useMetricRegex")]
    for pattern in patterns:
        found = {key for key in logged if re.search(pattern, key)}
        assert {key.rpartition("/")[2] for key in found} == {f"net.{i}.weight" for i in range(len(KINDS))}
        assert len({key.split("/")[1] for key in found}) == 1
    assert len(patterns) == 5


def test_pictures_and_the_chart_by_depth_are_those_that_are_logged():
    panels = panels_of(wandb_workspace("team", "nets", prefix="my/probe"))
    by_depth = panels["Alpha of the layers"][0]
    # As W&B's own chart of the same key asks for its table: tests/integration/test_wandb.py reads that one back.
    assert by_depth["panelDefId"] == "wandb/lineseries/v0"
    assert by_depth["fieldSettings"] == {"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"}
    assert "Custom Chart Tables/my/probe/alpha_by_depth_table" in str(by_depth["userQuery"])
    assert set(PICTURES) == set(FIGURES)
    pictures = [key for panel in panels["Figures, of runs with log_figures_every"] for key in panel["mediaKeys"]]
    assert pictures == [f"my/probe/figures/{name}" for name in PICTURES]


def test_the_command_saves_the_view(monkeypatch):
    from wandb_workspaces import workspaces

    saved = []

    def save(self):
        saved.append((self.entity, self.project, self.name, self.sections[0].panels[0].y[0]))

    monkeypatch.setattr(workspaces.Workspace, "save", save)
    assert cli.main(["workspace", "team/nets", "--name", "Spectra", "--prefix", "late"]) == 0
    assert saved == [("team", "nets", "Spectra", "late/alpha_median")]


def test_what_w_and_b_refuses_is_one_line(monkeypatch, capsys):
    from wandb_workspaces import workspaces

    def save(self):
        raise ConnectionError("api_key not configured (no-tty)\ncall wandb.login")

    monkeypatch.setattr(workspaces.Workspace, "save", save)
    assert cli.main(["workspace", "team/nets"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == ["lightning-spectral workspace: W&B took no view: ConnectionError: api_key not configured (no-tty)"]


@pytest.mark.parametrize("path", ["nets", "team/nets/runs", "team/ nets", ""])
def test_a_project_that_is_none(path, capsys):
    with pytest.raises(ValueError, match=re.escape(f"{path!r} is no ENTITY/PROJECT")):
        project_of(path)
    assert cli.main(["workspace", path]) == 2
    assert "give what stands in https://wandb.ai/ENTITY/PROJECT" in capsys.readouterr().err


def test_without_the_package_it_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    assert cli.main(["workspace", "team/nets"]) == 2
    assert 'pip install --upgrade "lightning-spectral[workspace]"' in capsys.readouterr().err
