"""Processes that share the matrices of SpectralNewton step as one does on the same gradients; run in each of them."""

import copy
import importlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from world import largest_difference, patches, same_everywhere

from lightning_spectral import SpectralNewton
from lightning_spectral.optim import ddp as sharing
from lightning_spectral.optim import matrix_update as matrices

STEPS = 3


class Net(nn.Module):
    """Matrices of several shapes, that neither two nor three processes share evenly."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.grouped = nn.Conv2d(6, 8, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.dense = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.grouped(self.conv(x).relu()).flatten(2).mT
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(self.dense(h.mean(1)))


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def optimizer_for(model, **options):
    """With an exponent of its own in each group, and damping by the noise in all but the last of them.

    So there are Cholesky factors, sums of inverses and eigenvalues.
    """
    groups = SpectralNewton.groups(model)
    for group, alpha, damping in zip(groups, (2.0, 1.3, 2.5, 1.0), ("noise", "noise", "noise", "auto"), strict=False):
        group |= {"alpha": alpha, "damping": damping}
    return SpectralNewton(groups, lr=0.02, **options)


def gradients(model, step, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in model.parameters()]


def set_grads(model, step, seed=0):
    for parameter, grad in zip(model.parameters(), gradients(model, step, seed), strict=True):
        parameter.grad = grad


def take_steps(model, optimizer, first=0):
    for step in range(first, first + STEPS):
        set_grads(model, step)
        optimizer.step()


def entries_transferred(optimizer):
    """Of all matrices whose function a step takes: entries in this process, in all, and those of the parameters."""
    here, real = 0, matrices.transfer_batch

    def counting(x_brn, **options):
        nonlocal here
        here += x_brn.numel()
        return real(x_brn, **options)

    matrices.transfer_batch = counting
    optimizer.step()
    matrices.transfer_batch = real
    everywhere = torch.tensor(here)
    dist.all_reduce(everywhere)
    spectral = [group for group in optimizer.param_groups if group["update"] == "spectral"]
    return here, int(everywhere), sum(p.numel() for group in spectral for p in group["params"])


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def states(optimizer):
    return [value for state in optimizer.state.values() for value in state.values()]


def pair(dtype=torch.float32):
    """(model, optimizer) that shares, and one that does not."""
    models = [net(dtype), net(dtype)]
    return [(m, optimizer_for(m, process_group=group)) for m, group in zip(models, ("world", None), strict=True)]


def check_steps(rank, n, folder):
    for dtype, tolerance in {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 0.0}.items():
        (model, optimizer), (alone, other) = pair(dtype)
        take_steps(model, optimizer)
        take_steps(alone, other)
        assert (optimizer.sharing_processes, other.sharing_processes) == (n, 1)
        assert same_everywhere([*weights(model), *states(optimizer)])
        assert largest_difference(weights(model), weights(alone)) <= tolerance
        assert largest_difference(states(optimizer), states(other)) == 0


def check_each_matrix_is_computed_once(rank, n, folder):
    (model, optimizer), _ = pair()
    set_grads(model, 0)
    here, everywhere, total = entries_transferred(optimizer)
    assert everywhere == total
    assert 0 < here < 0.75 * total


def check_odd_gradients(rank, n, folder):
    """Not finite in one process, missing in another: all leave out what a process would that sees both."""
    names = ("dense.0.weight", "head.bias", "dense.2.weight", "conv.bias")
    (model, optimizer), (alone, other) = pair()
    for a_model, an_optimizer in ((model, optimizer), (alone, other)):
        of = dict(a_model.named_parameters())
        set_grads(a_model, 0)
        if rank == 1 or a_model is alone:
            of["dense.0.weight"].grad[0, 0] = torch.nan
            of["head.bias"].grad[0] = torch.inf
        if rank == n - 1 or a_model is alone:
            of["dense.2.weight"].grad = None
        of["conv.bias"].grad = None
        an_optimizer.step()
    start, now = dict(net().named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(start[name], now[name]) == (name in names) for name in now)
    assert largest_difference(weights(model), weights(alone)) <= 1e-6
    # A gradient that some have counts as one that was left out; one that none has does not.
    assert (optimizer.skipped_updates, other.skipped_updates) == (3, 2)
    assert model.conv.bias not in optimizer.state
    assert same_everywhere([*weights(model), *states(optimizer)])


def check_checkpoints(rank, n, folder):
    """One process saves, all load: a shared run goes on alone, and one alone goes on shared."""
    for first, then in (("world", None), (None, "world")):
        model = net()
        optimizer = optimizer_for(model, process_group=first)
        take_steps(model, optimizer)
        if rank == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "last.ckpt")
        dist.barrier()
        saved = torch.load(folder / "last.ckpt", weights_only=True)
        again = net()
        again.load_state_dict(saved["model"])
        other = optimizer_for(again, process_group=then)
        other.load_state_dict(saved["optimizer"])
        take_steps(model, optimizer, STEPS)
        take_steps(again, other, STEPS)
        assert largest_difference(weights(model), weights(again)) <= 1e-6
        dist.barrier()


def train(ddp, optimizer, rank, scaler=None):
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        x = torch.randn(4, 3, 6, 6, generator=generator)

        def closure(x=x):
            optimizer.zero_grad()
            loss = ddp(x).square().mean()
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        if scaler is None:
            assert optimizer.step(closure) > 0
        else:
            closure()
            scaler.step(optimizer)
            scaler.update()


def check_ddp_is_found(rank, n, folder):
    for scaled in (False, True):
        trained = []
        for process_group in ("auto", None):
            model = net()
            optimizer = optimizer_for(model, process_group=process_group)
            scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if scaled else None
            train(DistributedDataParallel(model), optimizer, rank, scaler)
            assert optimizer.sharing_processes == (1 if process_group is None else n)
            trained.append(model)
        assert largest_difference(*map(weights, trained)) <= 1e-6
        assert same_everywhere(weights(trained[0]))


def check_what_shares_nothing(rank, n, folder):
    model = net()
    optimizer = optimizer_for(model)
    take_steps(model, optimizer)
    assert optimizer.sharing_processes == 1
    # Its state is loaded after the model is wrapped: it looks again.
    ddp = DistributedDataParallel(model)
    optimizer.load_state_dict(optimizer.state_dict())
    take_steps(model, optimizer)
    assert optimizer.sharing_processes == n
    assert copy.deepcopy(optimizer)._sharing.process_group == "auto"
    assert copy.deepcopy(optimizer_for(model, process_group=None))._sharing.process_group is None
    assert copy.deepcopy(optimizer_for(model, process_group=dist.group.WORLD))._sharing.process_group == "auto"
    outside = SpectralNewton([*model.parameters(), nn.Parameter(torch.ones(8, 8))])
    outside.step()
    assert outside.sharing_processes == 1
    one = [dist.new_group([k]) for k in range(n)][rank]
    assert optimizer_for(model, process_group=one)._sharing.scope(optimizer.param_groups).groups == ()
    # A process without batches is gone from the others' steps.
    with ddp.join():
        for _ in range(1 + rank):
            optimizer.zero_grad()
            ddp(torch.ones(2, 3, 6, 6)).square().mean().backward()
            optimizer.step()
    with pytest.raises(ValueError, match="process_group must be 'auto', 'world', a group of this process or None"):
        SpectralNewton(model.parameters(), process_group="ddp")
    elsewhere = [dist.new_group([k]) for k in range(n)][rank - 1]
    with pytest.raises(ValueError, match="process_group must be 'auto', 'world', a group of this process or None"):
        SpectralNewton(model.parameters(), process_group=elsewhere)


BY_ANY = [check_steps, check_each_matrix_is_computed_once, check_odd_gradients]
BY_TWO = [check_checkpoints, check_ddp_is_found, check_what_shares_nothing]


def check(rank, n, module, name, folder):
    """Run a check of this name, of a module of helpers, in which small matrices are shared too."""
    patches.setattr(sharing, "SMALLEST", 2)
    getattr(importlib.import_module(module), name)(rank, n, folder)
