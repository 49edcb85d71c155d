"""SpectralNewton on DTensors steps as it does on whole tensors; run in each of several processes."""

import functools
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from optimizer_ddp import STEPS, entries_transferred, gradients, net, optimizer_for, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from world import largest_difference

from lightning_spectral import SpectralNewton
from lightning_spectral.optim import ddp as sharing
from lightning_spectral.optim import fsdp as sharded
from lightning_spectral.optim import matrix_update as matrices


def fsdp_net(n, dtype=torch.float32, **options):
    model = net(dtype)
    mesh = init_device_mesh("cpu", (n,))
    for module in (model.attention, model.dense):
        fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def set_grads(model, step, seed=0):
    for parameter, grad in zip(model.parameters(), gradients(model, step, seed), strict=True):
        split = isinstance(parameter, DTensor)
        parameter.grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements) if split else grad


def take_steps(model, optimizer, first=0):
    for step in range(first, first + STEPS):
        set_grads(model, step)
        optimizer.step()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def wholes(model):
    return [whole(parameter.detach()) for parameter in model.parameters()]


def states(optimizer):
    return [whole(value) for state in optimizer.state.values() for key, value in state.items() if key != MEAN_SQUARE]


MEAN_SQUARE = "mean_square"
"""Of a matrix in shards, a sum over ranks, in another order than that of a whole one."""


def mean_squares(optimizer):
    return torch.cat([state[MEAN_SQUARE] for state in optimizer.state.values() if MEAN_SQUARE in state])


def by_columns(parameter):
    """Some parameters split along the second dimension."""
    return Shard(1) if parameter.ndim > 1 and parameter.shape[1] % 2 == 0 else Shard(0)


def check_steps(rank, n, folder):
    # FSDP2 splits along columns into even parts only.
    columns = {"shard_placement_fn": by_columns} if n == 2 else {}
    for dtype, tolerance, options in ((torch.float64, 1e-14, columns), (torch.bfloat16, 0.0, {})):
        alone, model = net(dtype), fsdp_net(n, dtype, **options)
        optimizer, other = optimizer_for(model), optimizer_for(alone)
        take_steps(model, optimizer)
        take_steps(alone, other)
        assert largest_difference(wholes(model), weights(alone)) <= tolerance
        assert largest_difference(states(optimizer), states(other)) <= tolerance
        torch.testing.assert_close(mean_squares(optimizer), mean_squares(other))
        momentum = optimizer.state[model.dense[0].weight]["momentum_buffer"]
        assert momentum.placements == model.dense[0].weight.placements
        assert momentum.to_local().numel() < momentum.numel()


def check_training(rank, n, folder):
    """Gradients of FSDP2's own, by a closure, for a batch that all processes have."""
    # In float64: the bias of keys has a gradient of rounding errors alone, of which AdamW makes whole steps.
    models = [fsdp_net(n, torch.float64), net(torch.float64)]
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for model in models:
        optimizer = optimizer_for(model)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        losses = [float(optimizer.step(closure).detach()) for _ in range(STEPS)]
        assert losses[-1] < losses[0]
    assert largest_difference(wholes(models[0]), weights(models[1])) <= 1e-8


def check_each_matrix_is_whole_in_one_process(rank, n, folder):
    model = fsdp_net(n)
    optimizer = optimizer_for(model)
    set_grads(model, 0)
    here, everywhere, total = entries_transferred(optimizer)
    assert everywhere == total
    assert 0 < here < 0.8 * total


def check_rounds(rank, n, folder):
    """As few matrices at once as there are processes: the same step."""
    models, most_at_once, real = [fsdp_net(n), fsdp_net(n)], [], sharded._step_round
    for model, sharing.MAX_BATCH_NUMEL in zip(models, (matrices.MAX_BATCH_NUMEL, 1), strict=True):
        rounds = []

        def counting(chosen, *args, rounds=rounds):
            rounds.append(len(chosen))
            real(chosen, *args)

        sharded._step_round = counting
        optimizer = optimizer_for(model)
        set_grads(model, 0)
        optimizer.step()
        most_at_once.append(max(rounds))
    sharded._step_round, sharing.MAX_BATCH_NUMEL = real, matrices.MAX_BATCH_NUMEL
    spectral = [group for group in optimizer.param_groups if group["update"] == "spectral"]
    assert most_at_once == [sum(len(group["params"]) for group in spectral), n]
    assert largest_difference(*map(wholes, models)) <= 1e-6


PLACED = {"rows": (9, 5), "columns": (5, 9), "few rows": (2, 7), "bias": (4,)}


def placed(mesh, placements, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(distribute_tensor(torch.randn(shape, generator=generator, dtype=dtype), mesh, placements))
        for shape in PLACED.values()
    ]


def check_placements(rank, n, folder):
    line, alone = init_device_mesh("cpu", (n,)), None
    wide, high = init_device_mesh("cpu", (1, n)), init_device_mesh("cpu", (n, 1))
    cases = [
        (line, [Replicate()]), (line, [Shard(0)]), (wide, [Replicate(), Shard(0)]), (high, [Shard(0), Replicate()]),
        (high, [Replicate(), Shard(0)]), (wide, [Shard(0), Replicate()]), (high, [Replicate(), Replicate()]),
    ]  # fmt: skip
    for mesh, placements in cases:
        parameters = placed(mesh, placements)
        optimizer = SpectralNewton(parameters, lr=0.1, alpha=2.0)
        for step in range(2):
            for parameter, shape in zip(parameters, PLACED.values(), strict=True):
                grad = torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
                # A sum that nobody has taken yet: of n equal parts.
                held = [Partial() if placement.is_replicate() else placement for placement in placements]
                parts = n if mesh is line and placements == [Replicate()] else 1
                if parts > 1:
                    parameter.grad = DTensor.from_local(grad / parts, mesh, held)
                else:
                    parameter.grad = distribute_tensor(grad, mesh, placements)
            optimizer.step()
        found = [whole(parameter.detach()) for parameter in parameters]
        alone = alone or found
        assert largest_difference(found, alone) <= 1e-12


def check_odd_gradients(rank, n, folder):
    names = ("dense.0.weight", "head.bias", "dense.2.weight")
    model = fsdp_net(n)
    of = dict(model.named_parameters())
    optimizer = optimizer_for(model)
    set_grads(model, 0)
    if rank == 1:
        of["dense.0.weight"].grad.to_local()[0, 0] = torch.nan
        of["head.bias"].grad.to_local().fill_(torch.inf)
        of["dense.2.weight"].grad = None
    optimizer.step()
    start = dict(net().named_parameters())
    now = {name: whole(parameter.detach()) for name, parameter in of.items()}
    assert all(torch.equal(start[name].detach(), now[name]) == (name in names) for name in now)
    assert optimizer.skipped_updates == 3
    alone = net()
    other = optimizer_for(alone)
    set_grads(alone, 0)
    for name, parameter in alone.named_parameters():
        if name in names:
            parameter.grad = None
    other.step()
    assert largest_difference(now.values(), weights(alone)) <= 1e-6


def check_scaler(rank, n, folder):
    """An overflow in one process: no process steps."""
    model = fsdp_net(n)
    optimizer = optimizer_for(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(2):
        before = wholes(model)
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 3, 6, 6)).square().mean()).backward()
        if step == 0 and rank == 1:
            model.dense[0].weight.grad.to_local()[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert (largest_difference(before, wholes(model)) == 0) == (step == 0)


def saved_state(model, optimizer):
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def resume(model, optimizer, folder, **options):
    state = saved_state(model, optimizer)
    dcp.load(state, checkpoint_id=folder, **options)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def check_checkpoints(rank, n, folder):
    """n processes, then one on whole tensors, then n again: as if never interrupted."""
    warnings.simplefilter("ignore")
    options = {"alpha_range": (0.5, 2.0)}
    make = functools.partial(optimizer_for, **options)
    uninterrupted = net()
    other = make(uninterrupted)
    for k in range(3):
        take_steps(uninterrupted, other, k * STEPS)

    model = fsdp_net(n)
    optimizer = make(model)
    take_steps(model, optimizer)
    dcp.save(saved_state(model, optimizer), checkpoint_id=folder / "first")
    if rank == 0:
        model = net()
        optimizer = make(model)
        resume(model, optimizer, folder / "first", no_dist=True)
        take_steps(model, optimizer, STEPS)
        dcp.save(saved_state(model, optimizer), checkpoint_id=folder / "second", no_dist=True)
    dist.barrier()
    model = fsdp_net(n)
    optimizer = make(model)
    resume(model, optimizer, folder / "second")
    take_steps(model, optimizer, 2 * STEPS)
    assert largest_difference(wholes(model), weights(uninterrupted)) <= 1e-5
    assert largest_difference(states(optimizer), states(other)) <= 1e-5
    assert [group["name"] for group in optimizer.param_groups] == [group["name"] for group in other.param_groups]
    with pytest.raises(ValueError, match="the parameter is a DTensor and the saved state is not"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="the saved state is a DTensor and the parameter is not"):
        make(net()).load_state_dict(make_with_state(fsdp_net(n)).state_dict())


def make_with_state(model):
    optimizer = optimizer_for(model)
    take_steps(model, optimizer)
    return optimizer


def check_refusals(rank, n, folder):
    line, high = init_device_mesh("cpu", (n,)), init_device_mesh("cpu", (n, 1))

    def made(tensor, **options):
        return SpectralNewton([("w", nn.Parameter(tensor))], **options)

    with pytest.raises(
        ValueError, match=r"parameter w is a DTensor placed as .* takes one Shard, and Replicate in the"
    ):
        made(distribute_tensor(torch.ones(6, 6), high, [Shard(0), Shard(1)]))
    with pytest.raises(ValueError, match="parameter w is a DTensor placed as"):
        made(DTensor.from_local(torch.ones(6, 6), line, [Partial()]))
    with pytest.raises(ValueError, match=r"whose part here has the shape \(2, 6\), and an even split gives"):
        made(DTensor.from_local(torch.ones(2, 6), line, [Shard(0)], shape=(7, 6), stride=(6, 1)))
    first = DeviceMesh("cpu", [0])
    of_one = DTensor.from_local(torch.ones(6, 6), first, [Replicate()], run_check=False)
    if rank:
        with pytest.raises(ValueError, match=r"parameter w is a DTensor on .*, which this rank is not in"):
            made(of_one)
    offloaded = distribute_tensor(torch.ones(6, 6), line, [Shard(0)])
    mesh_type = type(line)
    real = mesh_type.device_type
    mesh_type.device_type = property(lambda mesh: "cuda")
    try:
        with pytest.raises(ValueError, match="parameter w is offloaded: its parts are on the CPU, and its ranks"):
            made(offloaded)
    finally:
        mesh_type.device_type = real
    for as_they_were in (False, True):
        model = FullyShardedDataParallel(net(), use_orig_params=as_they_were, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match="was flattened by FSDP1 or DeepSpeed, and Spectral Newton needs matrices"):
            SpectralNewton(model.parameters())


BY_ANY = [check_steps, check_each_matrix_is_whole_in_one_process, check_rounds, check_placements, check_odd_gradients]
BY_TWO = [check_training, check_scaler, check_checkpoints, check_refusals]
