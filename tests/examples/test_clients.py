"""Other people's programs with the probe: what the table tells of one, and the table that is committed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2]))

pytest.importorskip("lightning.pytorch")

from examples.benchmarks import program_training, programs
from examples.clients import run as clients

TABLE = Path(clients.__file__).with_name("clients.md")


def small():
    x = torch.randn(64, 8)
    data = DataLoader(TensorDataset(x, x @ torch.randn(8, 8)), 32, shuffle=True)
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    return program_training.plain(network, lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), data)


def test_a_program_is_trained_twice_and_its_weights_are_the_same(monkeypatch):
    monkeypatch.setattr(program_training, "CALLBACKS", [])
    monkeypatch.setitem(programs.PROGRAMS, "small", small)
    found = clients.train("small")
    assert (found["same"], found["layers"], found["parameters"]) == (True, [2, 2], 280)
    assert sum(found["methods"].values()) == 2
    assert found["steps"] > 0
    cells = clients.row("small", found).split(" | ")
    assert [cells[0], cells[1], cells[2], cells[5]] == ["| small", "280", "2 of 2", "the same"]


def test_weights_that_differ_are_told(monkeypatch):
    seeds = iter((1, 2))

    def other():
        torch.manual_seed(next(seeds))
        return small()

    monkeypatch.setattr(program_training, "CALLBACKS", [])
    monkeypatch.setitem(programs.PROGRAMS, "small", other)
    found = clients.train("small")
    assert not found["same"]
    assert "| **differ** |" in clients.row("small", found)


def test_what_cannot_be_installed_is_said_and_the_next_one_runs(monkeypatch, tmp_path, capsys):
    def environment(folder, requirements):
        if requirements == ["chemprop"]:
            raise subprocess.CalledProcessError(1, "pip", stderr="first\nno chemprop")
        return Path(sys.executable)

    found = '{"parameters": 5, "layers": [1, 2], "methods": {"ggn": 2}, "steps": 7.2, "same": true, "said": ["a|b"]}'
    real = subprocess.run
    monkeypatch.setattr(clients, "environment", environment)
    program = ["-c", f"print('noise'); print({found!r})"]
    monkeypatch.setattr(clients.subprocess, "run", lambda command, **given: real([command[0], *program], **given))
    table = tmp_path / "table.md"
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "chemprop_regression", "scvi", "--output", str(table)])
    clients.main()
    line = "| scvi | 5 | 1 of 2 | ggn (2) | 7 | the same | a/b |\n"
    assert table.read_text() == clients.HEADER + line
    printed = capsys.readouterr()
    assert printed.out == line
    assert printed.err == "chemprop_regression failed: no chemprop\n"


def test_the_table_is_of_programs_there_are():
    assert set(clients.CLIENTS) <= set(programs.PROGRAMS)
    text = TABLE.read_text(encoding="utf-8")
    assert text.startswith(clients.HEADER)
    rows = [line.split(" | ") for line in text.removeprefix(clients.HEADER).splitlines()]
    assert len(rows) >= 8
    assert {row[0].removeprefix("| ") for row in rows} <= set(clients.CLIENTS)
    assert all(row[5] == "the same" for row in rows)
