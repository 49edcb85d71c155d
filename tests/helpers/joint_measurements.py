"""Measurements of three ranks together, and of ranks of which one fails; run in each of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from world import patches

from lightning_spectral import MeasurementError, ProcessError, measure_spectra
from lightning_spectral.distributed import process_group as processes
from lightning_spectral.layers.matrices import MatrixLayer
from lightning_spectral.measurement import directions
from lightning_spectral.measurement.factor_sums import FactorSums
from lightning_spectral.measurement.pipeline import run_measurement
from lightning_spectral.measurement.sharded import on_demand_weights as gathering
from lightning_spectral.numerics.second_moment import SecondMoment
from lightning_spectral.options import Options

SIZES = (30, 18, 0)
"""Samples of each rank: unequal, and of the last one none."""


class Routed(nn.Module):
    """Two experts; a sample with a positive first entry goes to the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 10)

    def forward(self, x):
        right = x[:, 0] > 0
        hidden = x.new_zeros(len(x), 8)
        if right.any():
            hidden[right] = self.first(x[right])
        if not right.all():
            hidden[~right] = self.second(x[~right])
        return self.head(hidden.relu())


class Blend(nn.Module):
    """Attention and an MLP whose layers have no names."""

    def __init__(self):
        super().__init__()
        self.w, self.d, self.p, self.q = nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(12, 20), nn.Linear(20, 12)
        self.z = nn.Linear(12, 10)

    def forward(self, x):
        x = x + self.d(F.scaled_dot_product_attention(*self.w(x).chunk(3, dim=-1)))
        return self.z((x + self.q(F.gelu(self.p(x)))).mean(1))


def conv():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 20), nn.ReLU(), nn.Linear(20, 10),
    )  # fmt: skip


def smooth():
    layers = [nn.Linear(12, 24), *(nn.Linear(24, 24) for _ in range(3)), nn.Linear(24, 10)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))


NETWORKS = {"conv": (conv, (3, 6, 6)), "smooth": (smooth, (12,)), "routed": (Routed, (12,)), "blend": (Blend, (4, 12))}


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def network(name, dtype=torch.float64):
    """The network, and the joined batch of all processes; those of the first process go to the first expert alone."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().to(dtype)
    x, y = torch.randn(sum(SIZES), *shape, dtype=dtype), torch.randint(0, 10, (sum(SIZES),))
    if name == "routed":
        x[: SIZES[0], 0] = x[: SIZES[0], 0].abs()
    return model, (x, y)


def part(batch, rank):
    start = sum(SIZES[:rank])
    return tuple(tensor[start : start + SIZES[rank]] for tensor in batch)


OPTIONS = {"top_k": 5, "precision": "float64"}

FEW = 8
"""Samples of each rank that curvature is measured on, of fewer than the gradient's."""

FEW_OF_ONE = {"gradient_samples": sum(SIZES), "max_samples": FEW, **OPTIONS}
"""Of a batch that one rank alone has."""

EVERYTHING = {"alignment": True, "weight_spectra": True, "curvature_fraction": 4, "spectrum_top_k": 8}
METHODS = ("exact", "ggn", "auto")
MEASURED = {
    **{f"{name} {m}": (name, {"curvature": m}) for name in ("conv", "smooth", "routed") for m in METHODS},
    "blend exact": ("blend", {"curvature": "exact"}),
    "smooth sketch": ("smooth", {"curvature": "sketch"}),
    "smooth of many and few": ("smooth", {"curvature": "exact", "gradient_samples": 90, "max_samples": FEW}),
    "conv in pieces": ("conv", {"curvature": "exact", "micro_batch_size": 7}),
    "conv everything": ("conv", {"curvature": "ggn", **EVERYTHING}),
    "conv everything in pieces": ("conv", {"curvature": "ggn", "micro_batch_size": 7, **EVERYTHING}),
}


class Fails:
    """The loss, which in one process raises at its n-th call, or from it on."""

    def __init__(self, rank, error, *, at, often=1):
        self.rank, self.error, self.at, self.often, self.calls = rank, error, at, often, 0

    def __call__(self, model, batch):
        if dist.get_rank() == self.rank:
            self.calls += 1
            if self.at <= self.calls < self.at + self.often:
                raise self.error
        return loss(model, batch)


def coupled(model, batch):
    """No sum over samples."""
    return model(batch[0]).logsumexp((0, 1))


def talks(model, batch):
    total = loss(model, batch)
    dist.all_reduce(total.detach())
    return total


def gathering_by_name(model, batch):
    total = loss(model, batch)
    all_reduce(total.detach())
    return total


def sending(model, batch):
    dist.isend(torch.zeros(1), (dist.get_rank() + 1) % dist.get_world_size())
    return loss(model, batch)


class OddError(Exception):
    def __str__(self):
        raise TypeError("no text")


class Grows(nn.Module):
    """A cache that grows with what was seen, as of rotary embeddings."""

    def __init__(self, net, size):
        super().__init__()
        self.net = net
        self.register_buffer("cache", torch.ones(size, dtype=torch.float64))

    def forward(self, x):
        return self.net(x) * self.cache[0]


def broken(where):
    """Curvature of a network, with an error in one process at a step that is none of the loss."""
    owner, name = where
    original = getattr(owner, name)
    if dist.get_rank() == 1:
        setattr(owner, name, lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError("out of memory")))
    try:
        model, batch = network("conv")
        own = part(batch, dist.get_rank())
        options = OPTIONS | {"curvature": "ggn", "alignment": True, "top_k": 3}
        return attempt(lambda: measure_spectra(model, own, loss, process_group=dist.group.WORLD, **options))
    finally:
        setattr(owner, name, original)


STEPS = {
    "the matrices of gradients": (MatrixLayer, "to_matrix"),
    "noise floors": (directions, "_count_above_noise"),
    "what is shared": (processes, "local_device"),
    "sums told": (FactorSums, "to_cpu"),
    "sums joined": (SecondMoment, "add_moment"),
}


def not_a_number(model, batch):
    return loss(model, batch) * (float("nan") if dist.get_rank() == 1 else 1.0)


def custom_in_one(model, batch):
    """Of a network that one process runs through a function which a sketch refuses."""
    logits = model(batch[0])
    return F.cross_entropy(Same.apply(logits) if dist.get_rank() == 1 else logits, batch[1])


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def failures():
    """name -> a loss, options, and the network."""
    found = {}
    for method in ("exact", "ggn", "sketch", "auto"):
        for call in (1, 2, 3, 4):
            found[f"{method}, call {call}"] = (
                Fails(1, KeyError("lost"), at=call, often=10**6),
                {"curvature": method},
                "smooth",
            )
    found["the first, no sample"] = Fails(0, ValueError("bad value"), at=1), {}, "smooth"
    memory = MemoryError("out of memory")
    found["memory once"] = Fails(1, memory, at=1), {"curvature": "exact"}, "smooth"
    found["memory twice"] = Fails(1, memory, at=2, often=2), {"curvature": "exact"}, "smooth"
    found["memory always"] = Fails(1, memory, at=1, often=10**6), {"curvature": "exact"}, "smooth"
    found["another option"] = loss, {"top_k": 3 + dist.get_rank()}, "smooth"
    found["gathers by name"] = gathering_by_name, {}, "smooth"
    found["sends"] = sending, {}, "smooth"
    found["no text"] = Fails(1, OddError(), at=1), {}, "smooth"
    found["memory in factors"] = Fails(1, memory, at=4), {"curvature": "ggn", "alignment": True}, "conv"
    found["gathers"] = talks, {}, "smooth"
    found["not a number"] = not_a_number, {}, "smooth"
    found["refused in one"] = custom_in_one, {"curvature": "auto"}, "smooth"
    found["another selection"] = loss, {"layers": ["0.*", "2.*"][: 1 + (dist.get_rank() == 1)]}, "smooth"
    return found


def sharded():
    """Networks whose weights are shards over all processes, by FSDP2 and by tensor parallelism."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, batch = network("conv")
    for part_of_it in (model[0], model[6]):
        fully_shard(part_of_it, mesh=mesh)
    yield "conv", "FSDP2", fully_shard(model, mesh=mesh), batch
    model, batch = network("routed")
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    # As after a validation, which leaves the outermost weights gathered, and in bfloat16.
    with torch.no_grad():
        model(batch[0][:2])
    yield "routed", "FSDP2 in bfloat16", model, batch
    model, batch = network("smooth")
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(), "6": RowwiseParallel()}
    yield "smooth", "tensor parallel", parallelize_module(model, mesh, plan), batch


def attempt(measure):
    try:
        return measure().to_dict()
    except (MeasurementError, MemoryError, ProcessError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def measure_joined(rank, n):
    """Return the reports of what is measured of whole networks."""
    result = {}
    for label, (name, options) in MEASURED.items():
        model, batch = network(name)
        if name == "conv" and rank:
            # As DDP's running statistics before the next step: the first process's are the ones that count.
            model[1].running_mean += rank
        report = measure_spectra(model, part(batch, rank), loss, process_group=dist.group.WORLD, **OPTIONS | options)
        result[label] = report.to_dict()
    return result


def fail_in_one(rank, n):
    """Return what comes of failures in one rank: a report, or the text of an error."""
    result = {}
    for label, (failing, options, name) in failures().items():
        model, batch = network(name)
        result[label] = attempt(
            lambda model=model, batch=batch, failing=failing, options=options: measure_spectra(
                model, part(batch, rank), failing, process_group=dist.group.WORLD, **OPTIONS | options
            )
        )
    for label, where in STEPS.items():
        result[label] = broken(where)
    return result


def measure_shards(rank, n):
    """Return the reports of networks in shards, of which nothing stays that is not read."""
    patches.setattr(gathering, "RESIDENT", 0)
    patches.setattr(gathering, "SMALL", 0)
    result = {}
    for name, how, model, batch in sharded():
        for method in ("exact", "ggn", "sketch"):
            options = OPTIONS | {"curvature": method}
            own, group = part(batch, rank), dist.group.WORLD
            result[f"{name} {method}, {how}"] = measure_spectra(
                model, own, loss, process_group=group, **options
            ).to_dict()
        result[f"{how} alone"] = attempt(lambda model=model, own=own: measure_spectra(model, own, loss))
        weight = next(model.parameters())
        result[f"{how} kept"] = [type(weight).__name__, list(weight.to_local().shape), type(model).__name__]
    return result


def measure_odd_groups(rank, n):
    """Return what comes of a cache of another size in each rank, and of a group of two ranks."""
    result = {}
    model, batch = network("smooth")
    grown = Grows(model, 4 + rank)
    result["grown"] = attempt(
        lambda: measure_spectra(
            grown, part(batch, rank), loss, process_group=dist.group.WORLD, curvature="exact", **OPTIONS
        )
    )
    model, batch = network("smooth")
    result["batch of one"] = attempt(lambda: run_measurement(
        model, [batch] if rank == 1 else [], Options(curvature="exact", **FEW_OF_ONE), coupled,
        group=processes.joint_group(),
    ))  # fmt: skip
    pair = dist.new_group([0, 1])
    model, batch = network("conv")
    result["two of them"] = attempt(
        lambda: measure_spectra(model, part(batch, rank), loss, process_group=pair, curvature="exact", **OPTIONS)
    )
    return result
