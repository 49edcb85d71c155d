"""Weights in shards, whole only while they are read."""

from __future__ import annotations

import pytest
import sharded_measurements


def name_of(check):
    return check.__name__.removeprefix("check_")


@pytest.mark.parametrize("check", sharded_measurements.BY_THREE, ids=name_of)
def test_three_ranks_measure_shards_as_whole_weights(world_of_three, check, tmp_path):
    world_of_three.run(f"sharded_measurements:{check.__name__}", tmp_path)


@pytest.mark.parametrize("check", sharded_measurements.BY_TWO, ids=name_of)
def test_two_ranks_measure_shards_as_whole_weights(world_of_two, check, tmp_path):
    world_of_two.run(f"sharded_measurements:{check.__name__}", tmp_path)
