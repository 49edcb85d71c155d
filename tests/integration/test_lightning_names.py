"""Private names of Lightning have public fallbacks, and a strategy without a device mesh repeats no batch."""

import copy
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from tiny import Tiny
from torch.utils.data import DataLoader

from lightning_spectral.callbacks._lightning import TrainingPass, optimizer_steps, repeats_batch, to_device


def test_steps_are_counted_without_lightnings_own_counter():
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=3))
    assert optimizer_steps(SimpleNamespace(global_step=6, fit_loop=loop)) == 3
    loop.epoch_loop = SimpleNamespace()
    assert optimizer_steps(SimpleNamespace(global_step=6, fit_loop=loop)) == 6
    assert optimizer_steps(SimpleNamespace(global_step=6)) == 6


def test_batches_pass_the_modules_hooks_without_lightnings_own():
    class Doubling(Tiny):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return 2 * batch

    class Renamed:
        def __init__(self, module):
            self.on_before_batch_transfer = module.on_before_batch_transfer

    trainer = SimpleNamespace(
        precision_plugin=SimpleNamespace(convert_input=lambda batch: batch + 1),
        strategy=SimpleNamespace(batch_to_device=lambda batch, dataloader_idx: batch),
    )
    module, batch = Doubling(), torch.ones(2)
    assert torch.equal(to_device(trainer, Renamed(module), batch), torch.full((2,), 4.0))
    assert torch.equal(to_device(trainer, module, batch), torch.full((2,), 4.0))


def test_the_training_data_is_read_without_lightnings_own_combination_of_loaders():
    trainer = SimpleNamespace(
        fit_loop=SimpleNamespace(), train_dataloader=DataLoader(range(6), 2), num_training_batches=2
    )
    assert [batch.tolist() for batch in copy.copy(TrainingPass(trainer))] == [[0, 1], [2, 3]]


class Mesh:
    def __init__(self, names, rank=0):
        self.mesh_dim_names, self.rank = names, rank

    def __getitem__(self, name):
        assert name == "tensor_parallel"
        return SimpleNamespace(get_local_rank=lambda: self.rank)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (SimpleNamespace(), False),
        (ModelParallelStrategy(), False),
        (SimpleNamespace(device_mesh=None), False),
        (SimpleNamespace(device_mesh=Mesh(None)), False),
        (SimpleNamespace(device_mesh=Mesh(("data_parallel",))), False),
        (SimpleNamespace(device_mesh=Mesh(("data_parallel", "tensor_parallel"), rank=0)), False),
        (SimpleNamespace(device_mesh=Mesh(("data_parallel", "tensor_parallel"), rank=1)), True),
    ],
    ids=["none", "not set up", "None", "unnamed", "data", "first of a group", "second of a group"],
)
def test_the_ranks_of_a_tensor_parallel_group_have_one_batch(strategy, expected):
    assert repeats_batch(SimpleNamespace(strategy=strategy)) is expected
