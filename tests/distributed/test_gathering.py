"""Weights in shards, whole only while they are read."""

from __future__ import annotations

import gathered_steps
import pytest
from processes import in_processes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n", [2, 3])
def test_weights_in_shards_are_measured_as_whole_ones(n, tmp_path):
    in_processes(gathered_steps.BY_TWO if n == 2 else gathered_steps.BY_THREE, n, tmp_path)
