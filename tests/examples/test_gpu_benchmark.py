"""The benchmark for accelerators, tried on the CPU at a small size."""

import json

import pytest

from examples.benchmarks import gpu


def test_it_measures_probe_optimizer_and_overhead_on_a_device(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.compile", lambda step: step)
    file = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--small", "--repeats", "1", "--seconds", "1", "--output", str(file)])
    result = json.loads(file.read_text())
    assert result["environment"]["device"] == "cpu"
    methods = result["probe"]["gpt1"]["methods"]
    assert set(methods) == {"exact", "auto"}
    assert all(figures["steps"] > 0 for figures in methods.values())
    assert methods["auto"]["alpha_median"] < 0.5
    assert set(result["optimizer"]["64x64"]) == {
        "muon", "muon_compiled", "spectral_newton", "spectral_newton_alpha_1.5", "adamw"
    }  # fmt: skip
    assert all(0 <= run["share"] <= 1 for run in result["overhead"].values())


def test_without_an_accelerator_it_says_what_would_do(monkeypatch):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: None)
    with pytest.raises(SystemExit, match="--device cpu --small"):
        gpu.main([])
