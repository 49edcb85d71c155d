import gc
import inspect
import os
import sys
from importlib.metadata import version

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
# pytest-xdist gives its workers a terminal of 80 columns.
os.environ.pop("COLUMNS", None)

import pytest

SHARDED = [
    "distributed/test_gathering.py",
    "distributed/test_processes.py",
    "distributed/test_shared_steps.py",
    "examples/test_shards_benchmark.py",
]
COSTLY = [
    "world_of_two",
    "world_of_three",
    "small_world",
    "browser",
    "killed_runs",
    "trained",
    "site",
    "started",
    "built",
]
LEFT_OUT = SHARDED if [*map(int, version("torch").split(".")[:2])] < [2, 6] else []
collect_ignore = ["helpers", *LEFT_OUT]


def pytest_terminal_summary(terminalreporter):
    if LEFT_OUT:
        terminalreporter.line(f"left out, for FSDP2 is of torch 2.6 and later: {', '.join(LEFT_OUT)}")


try:
    from hypothesis import settings
except ImportError:  # tests/property is skipped
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


@pytest.hookimpl(hookwrapper=True)
def pytest_pyfunc_call():
    """End W&B's run: a logger of the next test would go on with it.

    Before the fixtures end: W&B gives sys.stdout the write of the capture in which the run began, and it must be open.
    """
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()


@pytest.fixture(autouse=True)
def plain_probes(request, monkeypatch):
    """In a Trainer, probe by the share of time alone and on the step's own batch, unless a test says otherwise.

    Else the clock would decide how many probes there are, and noise how many batches they take.
    """
    if "integration" in request.path.parts or "unit" in request.path.parts:
        from lightning_spectral import SpectralProbe

        init = inspect.unwrap(SpectralProbe.__init__)
        monkeypatch.setattr(init, "__kwdefaults__", init.__kwdefaults__ | {"gradient_samples": None, "min_probes": 0})


@pytest.fixture
def trusting():
    """Every fit passes the rule of trust, which those of tiny networks seldom do."""
    from trust import every_fit_trusted

    with every_fit_trusted():
        yield


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """Leave what earlier tests have kept (modules, caches) out of collections of garbage, of which many tests ask."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def world_of_two():
    """Two ranks for the whole run."""
    from world import World

    world = World(2)
    yield world
    world.close()


@pytest.fixture(scope="session")
def world_of_three():
    """Three ranks for the whole run."""
    from world import World

    world = World(3)
    yield world
    world.close()


def pytest_collectstart():
    """Import Lightning before the tests' modules, and not in the process that starts the workers.

    `typing` keeps of two unions the one it meets first: after `float | int` Lightning's command line takes
    `limit_train_batches=1` for all of them.
    """
    gc.disable()
    import pytorch_lightning  # noqa: F401


def pytest_collection_finish():
    """Leave what has been imported out of every collection of garbage: a third of the tests' time."""
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    gc.enable()


# Around all others, since pytest-xdist's own reads the marks.
@pytest.hookimpl(hookwrapper=True)
def pytest_collection_modifyitems(items):
    """Keep the tests that share a costly fixture in one worker (`--dist loadgroup`)."""
    for item in items:
        for name in sorted({*COSTLY} & {*item.fixturenames}):
            item.add_marker(pytest.mark.xdist_group(name))
    yield
