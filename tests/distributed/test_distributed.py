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
    # Before step 4 the loss fails in the second process.
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
    assert first["steps"] == second["steps"] == [0, 2, 4]
    assert first["layers"] == ["net.0.weight", "net.4.weight", "net.8.weight"]
    assert first["alphas"] == second["alphas"]
    assert all(alpha == alpha for alphas in first["alphas"] for alpha in alphas)
    assert first["samples"] == 32
    assert first["used"] == second["used"]
    # A step takes the exponent to the nearest tenth.
    assert first["used"][0] == pytest.approx(first["used"][1], abs=0.051)
    assert first["as without"]
    assert second["as without"]


@pytest.mark.parametrize("name", ["smaller", "uncountable"])
def test_processes_wait_for_the_batches_of_all_or_are_all_off(world_of_two, tmp_path, name):
    first, second = world_of_two.run("probe_trainers:probe_unlike_loaders", tmp_path, name)
    assert first["steps"] == second["steps"]
    assert bool(first["steps"]) == (name == "smaller")
    off = [text for text in first["warnings"] if "SpectralProbe is off: rank 1: its batches cannot be had" in text]
    assert bool(off) == (name == "uncountable")
    assert first["weights"] == second["weights"]
