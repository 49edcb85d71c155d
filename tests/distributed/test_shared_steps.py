"""Optimizer steps of several processes, and what of them needs none."""

import copy
from types import SimpleNamespace

import optimizer_ddp
import optimizer_fsdp
import optimizer_trainers
import pytest
import torch
from torch import nn

from lightning_spectral import SpectralNewton
from lightning_spectral.optim.ddp import SMALLEST, balanced_rounds, is_shared, shares_by_cost
from lightning_spectral.optim.placement import Layout, blocks, row_counts

BY_ANY = [*optimizer_ddp.BY_ANY, *optimizer_fsdp.BY_ANY]
BY_TWO = [*BY_ANY, *optimizer_ddp.BY_TWO, *optimizer_fsdp.BY_TWO, *optimizer_trainers.BY_TWO]


def name_of(check):
    return f"{check.__module__}-{check.__name__.removeprefix('check_')}"


@pytest.mark.parametrize("check", BY_TWO, ids=name_of)
def test_two_ranks_step_as_one(world_of_two, check, tmp_path):
    world_of_two.run("optimizer_ddp:check", check.__module__, check.__name__, tmp_path)


@pytest.mark.parametrize("check", BY_ANY, ids=name_of)
def test_three_ranks_step_as_one(world_of_three, check, tmp_path):
    world_of_three.run("optimizer_ddp:check", check.__module__, check.__name__, tmp_path)


def items(*costs):
    return [SimpleNamespace(cost=cost, numel=cost) for cost in costs]


@pytest.mark.parametrize(
    ("costs", "n", "loads"),
    [((8, 7, 6, 5, 4), 2, [17, 13]), ((5, 5, 5, 5, 5), 3, [10, 10, 5]), ((9,), 3, [9, 0, 0]), ((), 2, [0, 0])],
)
def test_the_costliest_go_first_to_the_least_loaded(costs, n, loads):
    assert [sum(item.cost for item in share) for share in shares_by_cost(items(*costs), n)] == loads


def test_a_round_holds_something_for_every_process(monkeypatch):
    monkeypatch.setattr("lightning_spectral.optim.ddp.MAX_BATCH_NUMEL", 5)
    rounds = [[item.cost for item in chosen] for chosen in balanced_rounds(items(1, 2, 9, 4, 3, 8, 1), 2)]
    assert rounds == [[9, 8], [4, 3, 2, 1], [1]]


def test_small_matrices_are_not_worth_sharing():
    assert is_shared(SMALLEST, SMALLEST**2)
    assert not is_shared(SMALLEST - 1, SMALLEST**3)
    assert not is_shared(SMALLEST**3, SMALLEST**3 * (SMALLEST - 1))


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((6, 4, 3), Layout(input_first=0, rows=[])),
        ((6, 4), Layout(input_first=0, rows=[1, 2, 3])),
        ((6, 4, 3), Layout(input_first=1, rows=[])),
        ((6, 4, 3), Layout(input_first=1, rows=[1, 3])),
        ((6, 4, 3), Layout(input_first=3, rows=[])),
    ],
)
def test_row_counts_are_those_of_the_blocks(shape, layout):
    assert row_counts(shape, layout) == [block.shape[0] for block in blocks(torch.zeros(shape), layout)]


def test_process_groups_that_cannot_be():
    weight = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(
        ValueError, match=r"process_group='world' needs torch\.distributed: call init_process_group first"
    ):
        SpectralNewton([weight], process_group="world")
    alone = SpectralNewton([weight])
    weight.grad = torch.ones(3, 3)
    alone.step()
    assert alone.sharing_processes == 1
    assert copy.deepcopy(alone).sharing_processes == 1


def test_what_was_flattened_after_construction():
    optimizer = SpectralNewton([("w", nn.Parameter(torch.ones(3, 3)))])
    flat = nn.Parameter(torch.ones(9))
    flat.grad = torch.ones(9)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"parameter w was a matrix and has now the shape \(9,\): something has"):
        optimizer.step()
