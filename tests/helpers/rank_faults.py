"""Functions that go wrong in a rank."""

import os
import time

import torch
from world import patches


def fail_in_second(rank, n):
    if rank == 1:
        raise KeyError("lost")


def end_second(rank, n):
    if rank == 1:
        os._exit(3)


def sleep(rank, n, seconds):
    time.sleep(seconds)


def process_and_sum(rank, n, start):
    """Return the process's number and a sum over ranks."""
    total = torch.tensor(start + rank)
    torch.distributed.all_reduce(total)
    return os.getpid(), int(total)


def patch(rank, n):
    """Return a value that this call changes, as it found it."""
    value = torch.nn.Linear.__doc__
    patches.setattr(torch.nn.Linear, "__doc__", "changed")
    return value != "changed"
