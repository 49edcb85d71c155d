"""Functions of (rank, n, folder) in n processes that know each other, started once for many checks."""

import datetime
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_processes(functions, n, folder):
    """Call each function in every process; what one of them raises is raised here."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(_run, args=(functions, n, folder, port), nprocs=n)


def _run(rank, functions, n, folder, port):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n}
    # As torchrun names its runs, by which Lightning knows that the processes are there.
    os.environ.update({key: str(value) for key, value in {**place, "TORCHELASTIC_RUN_ID": "test"}.items()})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=n, timeout=datetime.timedelta(seconds=240))
    for function in functions:
        function(rank, n, folder)
        dist.barrier()
    dist.destroy_process_group()


def the_same_everywhere(tensors):
    """Whether all processes have these tensors, bit for bit."""
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    return all(torch.equal(flat, other) for other in others)


def largest_difference(ours, theirs):
    return max(
        float((a.detach().double() - b.detach().double()).abs().max()) for a, b in zip(ours, theirs, strict=True)
    )
