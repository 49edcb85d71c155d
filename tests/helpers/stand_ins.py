"""Stand-ins for what a test cannot wait for: time that passes, and memory that is full."""

import weakref

import torch
from cases import cross_entropy


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class OutOfMemory:
    """Raises in ``torch.autograd.grad`` while a graph of more than so many samples is differentiated."""

    def __init__(self, monkeypatch, most, error=torch.OutOfMemoryError, second_order_only=False):
        self.sizes, self.graphs, self.failed, grad = [], [], [], torch.autograd.grad
        self.current = 0

        def limited(*args, **kwargs):
            if self.current > most and (kwargs.get("create_graph") or not second_order_only):
                self.failed.append(self.current)
                raise error("out of memory: tried to allocate 2.00 GiB")
            return grad(*args, **kwargs)

        monkeypatch.setattr(torch.autograd, "grad", limited)

    def loss(self, model, batch):
        self.current = len(batch[0])
        value = cross_entropy(model, batch)
        if torch.is_grad_enabled():
            self.sizes.append(self.current)
            self.graphs.append(weakref.ref(value))
        return value
