"""What is measured of weights in shards is what is measured of whole ones; run in each of several processes."""

import contextlib
import copy
import ctypes
import functools
import gc

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from optimizer_ddp import net
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint
from twins import z_scores
from world import patches

from lightning_spectral import MeasurementError, ProcessError, measure_spectra
from lightning_spectral.measure import directional_curvature
from lightning_spectral.measurement import pipeline, setup
from lightning_spectral.measurement.sharded import on_demand_weights as gathering
from lightning_spectral.numerics.svd import SingularTriplets
from lightning_spectral.plan.planner import plan_spectra

OPTIONS = {"top_k": 3, "precision": "float64"}


class Deep(nn.Module):
    """Layers of one size: more than may be whole at a time, and no more, since each is gathered for each pass."""

    def __init__(self, depth=3):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(depth)))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


class Elsewhere(nn.Module):
    """Weights that are read by other modules than their own, and in a checkpointed part once more in the backward."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.tied = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 5)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 16))

    def forward(self, x):
        h = F.linear(x, self.tied.weight @ self.second.weight)
        h = checkpoint(lambda h: torch.tanh(self.first(h) * self.scale), h, use_reentrant=False)
        h = h + self.attention(h[:, None], h[:, None], h[:, None], need_weights=False)[0][:, 0]
        return self.head(torch.tanh(self.tied(h)))


def by_pointer(weight):
    """A copy of its memory, had as a compiled kernel would have it."""
    assert weight.untyped_storage().nbytes()
    memory = (ctypes.c_double * weight.numel()).from_address(weight.data_ptr())
    return np.array(memory).reshape(weight.shape)


class ByPointer(torch.autograd.Function):
    """x W^T, by code that PyTorch does not see."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.from_numpy(x.detach().numpy() @ by_pointer(weight).T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return torch.from_numpy(grad.numpy() @ by_pointer(weight)), grad.T @ x


class Foreign(Deep):
    def __init__(self):
        super().__init__()
        self.layers[0] = Kernel(16, 16, bias=False)
        self.shift = nn.Parameter(torch.randn(16, 16), requires_grad=False)

    def forward(self, x):
        # After all layers, whose weights were gathered since this one was.
        return super().forward(x) + torch.from_numpy(by_pointer(self.shift)).sum(0)[:5] * x[:, :5]


class Kernel(nn.Linear):
    """Applied by such code."""

    def forward(self, x):
        return ByPointer.apply(x, self.weight)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no way back")


class Cut(Deep):
    """Only the layers behind the first have a gradient."""

    def forward(self, x):
        x = Fails.apply(self.layers[0](x))
        for layer in self.layers[1:]:
            x = torch.tanh(layer(x))
        return self.head(x)


def models(make, *, by_layer=True):
    """The same network whole and, by FSDP2, in shards."""
    torch.manual_seed(0)
    whole = make().double()
    sharded, mesh = copy.deepcopy(whole), init_device_mesh("cpu", (dist.get_world_size(),))
    if by_layer:
        for module in [m for m in sharded.modules() if type(m) in (nn.Linear, Kernel)]:
            fully_shard(module, mesh=mesh)
    return whole, fully_shard(sharded, mesh=mesh)


def own_batch(rank, sizes=(13, 9, 0)):
    """Of another number of samples in each process."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(sum(sizes), 16, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 5, (sum(sizes),), generator=generator)
    start = sum(sizes[:rank])
    return x[start : start + sizes[rank]], y[start : start + sizes[rank]]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def writes(model, batch):
    """On weights that it then reads, and that its backward pass reads again."""
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.mul_(0.9)
    return loss(model, batch)


def measured(model, batch, loss_fn=loss, **options):
    return measure_spectra(model, batch, loss_fn, process_group=dist.group.WORLD, **OPTIONS | options)


def check_same(models, batch, loss_fn=loss, **options):
    reports = [measured(model, batch, loss_fn, **options) for model in models]
    expected, found = reports
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert list(found.layers) == list(expected.layers)
    assert found.failed == expected.failed
    for name, layer in found.layers.items():
        other = expected.layers[name]
        assert layer.method == other.method
        torch.testing.assert_close(layer.sigma, other.sigma, rtol=1e-10, atol=1e-13)
        if len(other.h):
            atol = 1e-8 * float(other.h.nan_to_num().abs().max())
            torch.testing.assert_close(layer.h, other.h, rtol=1e-7, atol=atol, equal_nan=True)
        noise = [(x.gradient_noise.signal, x.gradient_noise.noise_scale) for x in (layer, other)]
        # Where memory ran out for one of them, its parts are smaller.
        if layer.gradient_noise.parts == other.gradient_noise.parts:
            assert noise[0] == pytest.approx(noise[1], rel=1e-7, nan_ok=True)
    return reports


def at_most(measure):
    """Bytes: the most of whole weights at a time; of all; of the largest; of gradients that are not split."""
    made, real = [], gathering.OnDemandWeights.reserve
    held, real_spectra = [], pipeline.leading_directions

    def of_gradients(gradients, parts, objective, options):
        if objective.reducer is not None:
            held.append(sum(value.untyped_storage().nbytes() for value in gradients.values.values()))
            found = torch.tensor(sum(total.numel() * 8 for total in objective.reducer.sums.values()))
            dist.all_reduce(found)
            split.append(int(found))
        return real_spectra(gradients, parts, objective, options)

    split = []
    gathering.OnDemandWeights.reserve = lambda weights: made.append(weights) or real(weights)
    pipeline.leading_directions = of_gradients
    measure()
    gathering.OnDemandWeights.reserve, pipeline.leading_directions = real, real_spectra
    sizes = [weight.nbytes for weight in made[0]._weights]
    assert not any(weight.memory.untyped_storage().nbytes() for weight in made[0]._weights)
    matrices = [weight.nbytes for weight in made[0]._weights if weight.whole.ndim > 1]
    # But for the smallest, each is whole in one process.
    assert split == [sum(matrices) - min(matrices)]
    return made[0].peak_bytes, sum(sizes), max(sizes), held[0] - min(matrices)


def nothing_stays():
    for module, name in ((gathering, "RESIDENT"), (gathering, "SMALL")):
        patches.setattr(module, name, 0)


def check_methods(rank, n, folder):
    nothing_stays()
    pair = models(Deep)
    for method in ("exact", "ggn"):
        measure = functools.partial(check_same, pair, own_batch(rank), curvature=method)
        noise = [next(iter(x.layers.values())).gradient_noise for x in measure()]
        assert [of.parts for of in noise] == [sum(size > 0 for size in (13, 9, 0))] * 2
        most, total, largest, gradients = at_most(measure)
        # The head's weight and bias are held together, or two of the largest.
        assert most <= 2 * largest + 16 * 8
        assert total > 3 * largest
        assert gradients < 100
    whole, sharded = pair
    exact = measured(whole, own_batch(rank), curvature="exact")
    found = measured(sharded, own_batch(rank), curvature="sketch")
    assert float(z_scores(found.layers, exact.layers).abs().max()) < 6


def check_what_is_planned(rank, n, folder):
    nothing_stays()
    # Of a shorter one as much as all weights may be whole at a time.
    whole, sharded = models(lambda: Deep(5))
    sizes = (48,) * n
    joined = torch.zeros(sum(sizes), 16, dtype=torch.float64), torch.zeros(sum(sizes), dtype=torch.long)
    made, real_gather, real_reserve = [], gathering._Weight.gather, gathering.OnDemandWeights.reserve
    gathering.OnDemandWeights.reserve = lambda weights: made.append(weights) or real_reserve(weights)
    for method in ("exact", "ggn"):
        options = OPTIONS | {"curvature": method, "micro_batch_size": 16}
        gathered = 0

        def gather(weight, mine):
            nonlocal gathered
            gathered += weight.nbytes
            return real_gather(weight, mine)

        gathering._Weight.gather = gather
        measured(sharded, own_batch(rank, sizes), **options)
        gathering._Weight.gather = real_gather
        plan = plan_spectra(whole, joined, loss, world_size=n, sharded=True, **options)
        assert made[-1].peak_bytes <= plan.costs[method].memory.weights < sum(made[-1]._sizes)
        # Each process sends its own shards to all others.
        assert plan.sent / 6 < (n - 1) / n * gathered < plan.sent
    gathering.OnDemandWeights.reserve = real_reserve


def check_everything_on_request(rank, n, folder):
    nothing_stays()
    options = {"alignment": True, "weight_spectra": True, "micro_batch_size": 4, "bootstrap": 20}
    expected, found = check_same(models(Deep), own_batch(rank), curvature="ggn", curvature_fraction=2, **options)
    for name, layer in found.layers.items():
        other = expected.layers[name]
        torch.testing.assert_close(layer.weights.sigma, other.weights.sigma, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.alignment.h_kron, other.alignment.h_kron, rtol=1e-7, atol=1e-12)
        assert layer.fraction.trace == pytest.approx(other.fraction.trace, rel=1e-7)


def check_weights_read_elsewhere(rank, n, folder):
    nothing_stays()
    for by_layer in (True, False):
        pair = models(Elsewhere, by_layer=by_layer)
        for method in ("exact", "ggn"):
            check_same(pair, own_batch(rank), curvature=method)


def check_every_kind_of_layer(rank, n, folder):
    nothing_stays()
    whole = net(torch.float64)
    sharded, mesh = copy.deepcopy(whole), init_device_mesh("cpu", (n,))
    for module in (sharded.attention, sharded.dense):
        fully_shard(module, mesh=mesh)
    generator = torch.Generator().manual_seed(rank)
    batch = torch.randn(4 + rank, 3, 6, 6, generator=generator, dtype=torch.float64)
    pair = whole, fully_shard(sharded, mesh=mesh)
    for method in ("exact", "ggn"):
        check_same(pair, batch, lambda m, x: F.mse_loss(m(x), x[:, :, 0, 0]), curvature=method)


def check_written_weights(rank, n, folder):
    nothing_stays()
    pair = models(Deep)
    before = [p.full_tensor() for p in pair[1].parameters()]
    for method in ("exact", "ggn"):
        check_same(pair, own_batch(rank), writes, curvature=method)
    assert all(torch.equal(p.full_tensor(), value) for p, value in zip(pair[1].parameters(), before, strict=True))


def check_code_that_reads_by_pointer(rank, n, folder):
    nothing_stays()
    pair = models(Foreign)
    for method in ("exact", "ggn"):
        # Its backward pass comes last, long after its weight was let go of.
        check_same(pair, own_batch(rank), curvature=method)


def check_a_failure_in_one(rank, n, folder):
    nothing_stays()
    pair = models(Deep)

    def fails(model, batch):
        h = model.layers[0](batch[0])
        if rank == n - 2:
            raise KeyError("lost")
        return F.cross_entropy(model.head(model.layers[1:](h)), batch[1])

    with pytest.raises(ProcessError, match=f"rank {n - 2}: KeyError: 'lost'"):
        measured(pair[1], own_batch(rank), fails)
    check_same(pair, own_batch(rank), curvature="ggn")


def check_a_backward_pass_that_fails(rank, n, folder):
    """It is gone through once more, leaf by leaf; what had come of it counts once."""
    nothing_stays()
    _, found = check_same(models(Cut), own_batch(rank), curvature="ggn")
    assert list(found.failed) == ["layers.0.weight"]


@contextlib.contextmanager
def full(rank, calls):
    """Memory that is full when the weights of this process are filled for the nth time."""
    real, left = gathering._Weight.fill, calls

    def fill(weight, values):
        nonlocal left
        left -= 1
        if rank and left == 0:
            raise MemoryError("full")
        real(weight, values)

    gathering._Weight.fill = fill
    yield lambda: left < 0
    gathering._Weight.fill = real


def check_no_room_in_one(rank, n, folder):
    nothing_stays()
    pair = models(Deep)
    # In the forward pass, while gradients are summed, and in later passes.
    for calls in (3, 10, 14):
        with full(rank, calls) as came:
            # Taken up again on pieces half as large.
            check_same(pair, own_batch(rank), curvature="ggn")
            assert came() or not len(own_batch(rank)[0])
    real = gathering.OnDemandWeights.reserve

    def reserve(weights):
        if rank == 1:
            raise MemoryError("no room")
        real(weights)

    gathering.OnDemandWeights.reserve = reserve
    with pytest.raises(MemoryError, match="rank 1: out of memory: no room"):
        measured(pair[1], own_batch(rank))
    gathering.OnDemandWeights.reserve = real


@contextlib.contextmanager
def no_room(rank, call):
    """To take part in an exchange, in one process at its nth."""
    real, calls = gathering.OnDemandWeights._room, 0

    def room(weights):
        nonlocal calls
        calls += 1
        if rank == 1 and calls == call:
            raise MemoryError("full")
        return real(weights)

    gathering.OnDemandWeights._room = room
    yield lambda: calls >= call
    gathering.OnDemandWeights._room = real


def check_no_room_in_the_middle(rank, n, folder):
    """Of a process that asks, and of one without samples that takes part; the others do not wait for it."""
    nothing_stays()
    pair = models(Deep)
    for call in (5, 20, 34):
        for sizes in ((5, 13, 3), (13, 0, 9)):
            with no_room(rank, call) as came:
                check_same(pair, own_batch(rank, sizes), curvature="ggn")
                assert came()


def check_what_is_read_without_an_operation(rank, n, folder):
    """And written: each call of the loss begins with the same weights all the same."""
    nothing_stays()

    def reads(model, batch):
        value = loss(model, batch)
        first = model.layers[0].weight.detach()
        return value * (2 + np.tanh(first.numpy().sum() + np.asarray(first)[0, 0] + first.tolist()[0][0]))

    def through_numpy(model, batch):
        array = model.layers[0].weight.detach().numpy()
        array *= 0.9
        return loss(model, batch)

    def sets(model, batch):
        model.layers[0].weight.data = model.layers[0].weight.data * 0.9
        return loss(model, batch)

    for loss_fn in (reads, through_numpy, sets):
        check_same(models(Deep), own_batch(rank), loss_fn, curvature="ggn")


def check_transforms(rank, n, folder):
    nothing_stays()

    def mapped(model, batch):
        return F.cross_entropy(torch.func.vmap(model)(batch[0]), batch[1])

    def pushed(model, batch):
        out, slope = torch.func.jvp(model, (batch[0],), (torch.ones_like(batch[0]),))
        return F.cross_entropy(out, batch[1]) + slope.square().mean()

    for loss_fn in (mapped, pushed):
        check_same(models(Deep), own_batch(rank, (5, 13, 3)), loss_fn, curvature="exact")


def check_no_graph_stays(rank, n, folder):
    nothing_stays()
    _, sharded = models(Deep)
    for method in ("exact", "ggn"):
        measured(sharded, own_batch(rank), curvature=method)
    gc.collect()
    # Parts of a graph are seen as long as a tensor of theirs is.
    tensors = [value for value in gc.get_objects() if isinstance(value, torch.Tensor)]
    assert not [value.grad_fn for value in tensors if value.grad_fn is not None]


class Normed(nn.Module):
    """Weights that are computed from others."""

    def __init__(self):
        super().__init__()
        self.scaled = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.bounded = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
        self.plain, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        for layer in (self.scaled, self.bounded, self.plain):
            x = torch.tanh(layer(x))
        return self.head(x)


def check_parametrized_layers(rank, n, folder):
    nothing_stays()
    whole, _ = models(Normed, by_layer=False)
    sharded, mesh = copy.deepcopy(whole), init_device_mesh("cpu", (n,))
    for module in (sharded.scaled, sharded.bounded, sharded.plain):
        fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for mode in ("eval", "train"):
        check_same((whole, sharded), own_batch(rank), mode=mode, curvature="exact")


def check_shards_in_some(rank, n, folder):
    torch.manual_seed(0)
    model = Deep().double()
    if rank == 0:
        fully_shard(model, mesh=DeviceMesh("cpu", [0]))
    else:
        DeviceMesh("cpu", [0])
    with pytest.raises(ValueError, match=r"rank 1 holds 0 parameters and buffers as shards .*, and rank 0 holds 8"):
        measured(model, own_batch(rank))


def check_a_failure_beside_buffers_in_shards(rank, n, folder):
    """What is put back at the end is put back without the others."""
    _, sharded = models(Deep)
    mesh = init_device_mesh("cpu", (n,))
    sharded.register_buffer("scale", distribute_tensor(torch.ones(3), mesh, [Replicate()]))
    real = setup.InitialState

    def fails(*args, **kwargs):
        if rank == 1:
            raise MemoryError("no room")
        return real(*args)

    setup.InitialState = fails
    with pytest.raises(MemoryError, match="rank 1: out of memory: no room"):
        measured(sharded, own_batch(rank))
    setup.InitialState = real


def check_buffers_in_shards(rank, n, folder):
    nothing_stays()
    whole, _ = models(Elsewhere)
    sharded, mesh = copy.deepcopy(whole), init_device_mesh("cpu", (n,))
    sharded.scale = distribute_tensor(whole.scale, mesh, [Shard(0)])
    sharded.first.weight = nn.Parameter(distribute_tensor(whole.first.weight.detach(), mesh, [Shard(1)]))
    sharded.head.weight = nn.Parameter(distribute_tensor(whole.head.weight.detach(), mesh, [Replicate()]))
    check_same((whole, sharded), own_batch(rank), curvature="exact", layers=["first*", "head*"])


def check_shards_of_one_process(rank, n, folder):
    """On a mesh of one process nothing is missing: it measures alone."""
    torch.manual_seed(0)
    whole = Deep().double()
    mesh = [DeviceMesh("cpu", [r]) for r in range(n)][rank]
    sharded = fully_shard(copy.deepcopy(whole), mesh=mesh)
    if rank == 0:
        batch = own_batch(0)
        expected, found = (measure_spectra(m, batch, loss, curvature="exact", **OPTIONS) for m in (whole, sharded))
        for name, layer in found.layers.items():
            torch.testing.assert_close(layer.h, expected.layers[name].h, rtol=1e-8, atol=1e-10)
        unit = torch.eye(16, dtype=torch.float64)[:, :2]
        directions = {"layers.0.weight": SingularTriplets(unit, torch.ones(2), unit)}
        expected, found = (
            directional_curvature(m, batch, directions, loss, precision="float64") for m in (whole, sharded)
        )
        torch.testing.assert_close(found, expected)


def check_alone_is_refused(rank, n, folder):
    with pytest.raises((ValueError, MeasurementError), match="are shards over several ranks"):
        measure_spectra(models(Deep)[1], own_batch(rank), loss)


BY_THREE = [value for name, value in sorted(globals().items()) if name.startswith("check_") and name != "check_same"]
BY_TWO = [check_methods, check_everything_on_request, check_a_failure_in_one]
