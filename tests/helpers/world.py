"""A world: ranks in processes of their own, started once, that run functions of helpers by name.

`World(2).run("module:function", *args)` calls `function(rank, n, *args)` in each rank and returns what each returns. An
error in a rank, and a call that does not end in time, end the world; the next call starts a new one.
"""

from __future__ import annotations

import datetime
import gc
import importlib
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
import warnings
from multiprocessing.connection import wait

import pytest
import torch
import torch.distributed as dist

PRELOADED = [
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "pytorch_lightning",
    "torchmetrics",
    "lightning_spectral.callbacks",
    "lightning_spectral.measure",
    "lightning_spectral.plan",
    "pytest",
    "wandb",
]
"""Modules that the process from which ranks are forked imports once."""

GRACE_SECONDS = 10
"""How long the other ranks may take to end a call after one has failed in it."""

patches = pytest.MonkeyPatch()
"""Changes that a function makes to modules of a rank, undone at its end."""


class RankError(AssertionError):
    """Error in a rank, with its traceback."""


class World:
    """`n` ranks of a gloo group; started by the first call."""

    def __init__(self, n):
        self.n, self.ranks, self.pipes = n, [], []

    def start(self):
        context = forkserver()
        port = free_port()
        for rank in range(self.n):
            pipe, of_rank = context.Pipe()
            process = context.Process(target=serve, args=(rank, self.n, port, of_rank, sys.path), daemon=True)
            process.start()
            of_rank.close()
            self.ranks.append(process)
            self.pipes.append(pipe)

    def run(self, name, *args, timeout=200):
        """Return what each rank's function returns, and raise RankError where one fails or does not end in time."""
        if not self.ranks:
            self.start()
        results, errors = {}, {}
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((name, args)))
        end = time.monotonic() + timeout
        while len(results) + len(errors) < self.n:
            pending = [p for rank, p in enumerate(self.pipes) if rank not in results and rank not in errors]
            ready = wait(pending, max(0.0, end - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = self.pipes.index(pipe)
                succeeded, value = receive(pipe)
                (results if succeeded else errors)[rank] = value
            if errors:
                end = min(end, time.monotonic() + GRACE_SECONDS)
        if len(results) < self.n:
            self.kill()
            silent = [rank for rank in range(self.n) if rank not in results and rank not in errors]
            told = [f"rank {rank}: {text}" for rank, text in sorted(errors.items())]
            raise RankError("\n".join([f"{name} in {self.n} ranks", *told, *(f"rank {r} did not end" for r in silent)]))
        return [results[rank] for rank in range(self.n)]

    def kill(self):
        for process in self.ranks:
            process.kill()
            process.join()
        self.ranks, self.pipes = [], []

    def close(self):
        """End the ranks together, which destroy their group first."""
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps(None))
        for process in self.ranks:
            process.join(20)
        self.kill()


def forkserver():
    """Return the context whose processes are forks of one that has imported all that takes time to import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def receive(pipe):
    """Return (True, result) or (False, text of an error)."""
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, "the process ended"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def serve(rank, n, port, pipe, path):
    """Run in a rank: call what is sent until None is."""
    sys.path[:] = path
    # What has been imported is left out of collections of garbage, of which a failing measurement asks for several.
    gc.freeze()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n}
    # The name that torchrun gives to its runs tells Lightning that the ranks have been started.
    os.environ.update({key: str(value) for key, value in {**address, "TORCHELASTIC_RUN_ID": "test"}.items()})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=n, timeout=datetime.timedelta(seconds=180))
    while (task := pickle.loads(pipe.recv_bytes())) is not None:
        pipe.send_bytes(pickle.dumps(call(rank, n, *task)))
    dist.barrier()
    # Threads of gloo that outlive the interpreter abort the process.
    dist.destroy_process_group()
    os._exit(0)


def call(rank, n, name, args):
    """Return (True, result) of a call, or (False, traceback)."""
    module, _, function = name.partition(":")
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = getattr(importlib.import_module(module), function)(rank, n, *args)
        dist.barrier()
        # A result that cannot be sent is an error of the call.
        pickle.dumps(result)
    except BaseException:
        return False, traceback.format_exc()
    finally:
        patches.undo()
    return True, result


def same_everywhere(tensors):
    """Return True where all ranks have these tensors, bit for bit."""
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    of_ranks = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, flat)
    return all(torch.equal(flat, of_rank) for of_rank in of_ranks)


def largest_difference(values, expected):
    return max(
        float((a.detach().double() - b.detach().double()).abs().max()) for a, b in zip(values, expected, strict=True)
    )
