"""Two processes of DDP: they measure their batches together, before the same steps, and train as without a probe."""

from __future__ import annotations

import pytest
from torch.distributed import fsdp


def test_both_processes_probe_before_the_same_steps_and_train_as_without(world_of_two, tmp_path):
    first, second = world_of_two.run("probe_trainers:train", tmp_path, True)
    assert first["steps"] == second["steps"]
    assert first["steps"][0] == 0
    assert len(first["steps"]) > 1
    assert first["weights"] == second["weights"]
    plain, _ = world_of_two.run("probe_trainers:train", tmp_path, False)
    assert plain["weights"] == first["weights"]


def test_two_processes_measure_the_joined_batch_and_skip_a_probe_together(world_of_two, tmp_path):
    first, second = world_of_two.run("probe_trainers:probe_jointly", tmp_path)
    assert first["samples"] == [12, 20]
    for name, h in first["joint"].items():
        assert h == pytest.approx(first["alone"][name], rel=1e-5, abs=1e-5 * max(map(abs, h)))
    assert first["reports"] == second["reports"]
    # Before step 4 the loss fails in the second process; a stream without a length is not read again at the end.
    assert first["steps"] == second["steps"] == [0, 2, 6]
    assert first["failed"] == second["failed"] == 1
    assert [text for text in first["warnings"] if "rank 1: KeyError: 'lost'" in text]
    assert not second["warnings"]
    assert first["weights"] == second["weights"]
    # Three batches of 8, two for one process and one for the other.
    assert first["held"] == [24, 3]


@pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="FSDP2 is of torch 2.6 and later")
def test_fully_sharded_training_is_probed_and_goes_on_as_without(world_of_two, tmp_path):
    first, second = world_of_two.run("probe_trainers:train_shards", tmp_path)
    assert first["steps"] == second["steps"] == [0, 2, 4, 5]
    assert first["layers"] == ["net.0.weight", "net.4.weight", "net.8.weight"]
    assert first["alphas"] == second["alphas"]
    assert all(alpha == alpha for alphas in first["alphas"] for alpha in alphas)
    assert first["samples"] == 32
    assert first["used"] == second["used"]
    # A step takes the exponent to the nearest tenth.
    assert first["used"][0] == pytest.approx(first["used"][1], abs=0.051)
    assert first["as without"]
    assert second["as without"]
    # Of shards no rank holds the whole update.
    told = [text for text in first["warnings"] if text.startswith("step=True: the optimizer's steps are not measured")]
    assert len(told) == 1
    assert "net.0.weight and 9 more parameters are in shards (DTensor)" in told[0]
    assert first["step"] is second["step"] is None


@pytest.mark.parametrize("name", ["smaller", "uncountable"])
def test_processes_wait_for_the_batches_of_all_or_are_all_off(world_of_two, tmp_path, name):
    first, second = world_of_two.run("probe_trainers:probe_unlike_loaders", tmp_path, name)
    assert first["steps"] == second["steps"]
    assert bool(first["steps"]) == (name == "smaller")
    off = [text for text in first["warnings"] if "SpectralProbe is off: rank 1: its batches cannot be had" in text]
    assert bool(off) == (name == "uncountable")
    assert first["weights"] == second["weights"]


def test_two_processes_measure_the_step_on_the_joined_batch_and_train_as_without(world_of_two, tmp_path):
    first, second = world_of_two.run("probe_trainers:measure_steps", tmp_path, None)
    assert first["samples"] == [12, 20]
    assert [step for step, _ in first["rows"]] == [0, 2, 4]
    # The first one logs, and both have the same.
    assert second["rows"] == []
    assert first["last"] == second["last"]
    assert first["monitored"] == second["monitored"]
    # Of each layer by its former name, too.
    assert len(first["monitored"]) == 9
    for (_, row), (slope, curvature, change, shares) in zip(first["rows"], first["truth"], strict=True):
        scale = -slope / curvature if curvature > 0 else float("nan")
        assert row["spectral/step/scale"] == pytest.approx(scale, rel=1e-6, nan_ok=True)
        assert row["spectral/step/predicted_change"] == pytest.approx(slope + curvature / 2, rel=1e-6)
        assert row["spectral/step/actual_change"] == pytest.approx(change, rel=1e-6)
        for name in ("0.weight", "4.weight", "8.weight"):
            assert row[f"spectral/step_curvature/net.{name}"] == pytest.approx(shares[name], rel=1e-6)
    plain, _ = world_of_two.run("probe_trainers:measure_steps", tmp_path, None, False)
    assert plain["weights"] == first["weights"] == second["weights"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("loss", "the optimizer's step 2 was not measured: ProcessError: rank 1: KeyError: 'lost'"),
        ("memory", "the optimizer's step 2 was not measured: rank 1 could not keep the weights before it"),
    ],
)
def test_a_step_that_fails_in_one_process_is_nan_in_both_and_none_waits(world_of_two, tmp_path, fault, says):
    first, second = world_of_two.run("probe_trainers:measure_steps", tmp_path, fault)
    assert [row["spectral/step/actual_change"] == row["spectral/step/actual_change"] for _, row in first["rows"]] == [
        True,
        False,
        True,
    ]
    assert [text for text in first["warnings"] if says in text]
    assert first["last"] == second["last"]
    assert first["weights"] == second["weights"]
