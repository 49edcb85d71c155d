import os

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
# pytest-xdist gives its workers a terminal of 80 columns.
os.environ.pop("COLUMNS", None)

import pytest
import torch
from torch.distributed import fsdp

torch.set_num_threads(1)

SHARDED = [
    "helpers/gathered_steps.py", "helpers/jointly.py", "helpers/sharded_steps.py", "helpers/shared_in_lightning.py",
    "distributed/test_gathering.py", "distributed/test_processes.py", "distributed/test_shared_steps.py",
    "examples/test_shards_benchmark.py",
]  # fmt: skip
collect_ignore = [] if hasattr(fsdp, "fully_shard") else SHARDED


def pytest_terminal_summary(terminalreporter):
    if collect_ignore:
        terminalreporter.line(f"left out, for FSDP2 is of torch 2.6 and later: {', '.join(collect_ignore)}")


try:
    from hypothesis import settings
except ImportError:  # tests/test_properties.py is skipped
    pass
else:
    # The same examples in every run, and none kept on disk.
    settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
    # `make fuzz`: others each time, with what reproduces a failure.
    settings.register_profile("fuzz", deadline=None, print_blob=True)
    settings.load_profile("fuzz" if "FUZZ_EXAMPLES" in os.environ else "repeatable")


@pytest.fixture(autouse=True, scope="session")
def current_folder(tmp_path_factory):
    """Without a logger's folder a probe keeps its reports in the current one."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("current"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
