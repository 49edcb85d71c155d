"""Programs trained through their own Trainer: the module and a batch are kept, and what is not installed is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2]))

pytest.importorskip("lightning.pytorch")

from examples.benchmarks import programs
from examples.benchmarks.program_training import STEPS, plain, training_loss


def small():
    x = torch.randn(128, 8)
    data = DataLoader(TensorDataset(x, x @ torch.randn(8, 8)), 64, shuffle=True)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    return plain(network, lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), data)


def test_a_program_is_trained_and_its_step_is_as_before(monkeypatch):
    calls = []
    monkeypatch.setattr(F, "mse_loss", lambda a, b, mse=F.mse_loss: calls.append(1) or mse(a, b))
    module, batch = small()
    assert len(calls) == STEPS
    assert training_loss(module, batch).requires_grad


def test_a_program_is_measured_and_one_is_not_installed(monkeypatch, tmp_path, capsys):
    def absent():
        import no_such_program  # noqa: F401

    monkeypatch.setattr(programs, "PROGRAMS", {"small": small, "absent": absent})
    monkeypatch.setattr(programs.logging, "disable", lambda level: None)
    path = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["programs.py", f"--output={path}"])
    programs.main()
    figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
    assert figures["small"]["error"]["all"]["layers"] == 2
    assert figures["small"]["error"]["all"]["p90"] < 1e-3
    assert figures["absent"]["failure"] == "ModuleNotFoundError: No module named 'no_such_program'"
    assert "no_such_program" in capsys.readouterr().out
