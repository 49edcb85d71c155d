"""What is checked in two and in three processes, and the parts of it that need none."""

import pytest
import sharded_steps
import shared_steps
from processes import in_processes


@pytest.mark.parametrize("n", [2, 3])
def test_processes_step_as_one(n, tmp_path):
    in_processes([shared_steps.small_ones_too, *shared_steps.CHECKS, *sharded_steps.CHECKS], n, tmp_path)
