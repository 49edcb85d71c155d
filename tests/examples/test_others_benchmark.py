"""Networks as other people write them: each trains, and the benchmark compares and survives a failure."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.benchmarks import against_exact, others


def fit(alpha: float, r2: float = 0.95) -> dict[str, float]:
    return {"alpha": alpha, "stderr": 0.1, "r2": r2}


def test_layers_that_only_one_measured_are_counted():
    found = {"a": fit(1.1), "b": fit(math.nan), "c": fit(0.5), "d": fit(2.0)}
    exact = {"a": fit(1.0), "b": fit(1.0), "c": fit(0.2, r2=0.5)}
    error = against_exact.comparison(found, exact)
    assert error["all"] == {
        "layers": 2,
        "median": pytest.approx(0.1),
        "p90": pytest.approx(0.28),
    }
    assert error["trusted"]["layers"] == 1
    assert (error["only_exact"], error["only_exact_trusted"], error["only_auto"]) == (["b"], ["b"], ["d"])


def test_one_network_is_measured_and_one_fails(monkeypatch, tmp_path, capsys):
    def broken():
        raise RuntimeError("no such data")

    monkeypatch.setitem(others.NETWORKS, "broken", broken)
    path = tmp_path / "found.json"
    arguments = ["others.py", "--only", "broken", "mlp_binary", f"--output={path}"]
    monkeypatch.setattr(sys, "argv", arguments)
    others.main()
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["figures"]["broken"]["failure"] == "RuntimeError: no such data"
    row = found["figures"]["mlp_binary"]
    assert row["steps"] > 0
    assert row["error"]["all"]["layers"] == 3
    assert "no such data" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", [*arguments, f"--reference={path}"])
    others.main()
    again = json.loads(path.read_text(encoding="utf-8"))["figures"]["mlp_binary"]
    assert "exact_steps" not in again
    assert again["exact_layers"] == row["exact_layers"]


@pytest.mark.parametrize("name", ["gaussian_nll", "byol", "moe_einsum", "rnn_relu"])
def test_a_network_has_a_finite_loss_with_a_gradient(name):
    torch.manual_seed(0)
    model, batch, loss = others.NETWORKS[name]()
    value = loss(model, batch)
    value.backward()
    assert value.isfinite()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
