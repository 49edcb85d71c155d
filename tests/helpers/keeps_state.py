"""Modules whose training step keeps state of every kind."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, deque

import numpy as np
import torch
from tiny import Tiny


class Schedule:
    """An annealed weight that is no module."""

    def __init__(self):
        self.step, self.values = 0, Counter()

    def __call__(self):
        self.step += 1
        self.values["calls"] += 1
        return 1 + self.step + self.values["calls"]


class Stateful(Tiny):
    """Scales its loss by a state of some kind, and moves the state on at each call."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.n, self.schedule, self.queue = kind, 0, Schedule(), deque(maxlen=4)
        self.settings, self.seen, self.ordered = {"weight": 1.0}, set(), OrderedDict(a=1.0, b=2.0)
        self.memory, self.array, self.hidden = torch.ones(4), np.ones(3), None
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("ranges", torch.zeros(0))
        self.generator, self.python, self.numpy = (
            torch.Generator().manual_seed(1),
            random.Random(2),
            np.random.default_rng(3),
        )
        calls = 0

        def count():
            nonlocal calls
            calls += 1
            return calls

        self.count = count

    def factor(self, features):  # noqa: C901
        if self.kind == "number":
            self.n += 1
            return 1 + self.n
        if self.kind == "schedule":
            return self.schedule()
        if self.kind == "closure":
            return 1 + self.count()
        if self.kind == "queue":
            self.queue.append(features.detach().mean())
            return 1 + len(self.queue) + sum(self.queue)
        if self.kind == "containers":
            self.settings["weight"] += 1
            self.seen.add(len(self.seen))
            self.ordered.move_to_end("a" if next(iter(self.ordered)) == "a" else "b")
            return self.settings["weight"] + len(self.seen) + next(iter(self.ordered.values()))
        if self.kind == "memory":
            self.memory[0] += 1
            return self.memory.sum()
        if self.kind == "memory_with_a_graph":
            self.memory[:2] = features.mean(0)[:2]
            loss = self.memory.sum()
            self.memory = self.memory.detach()
            return 1 + loss.detach()
        if self.kind == "array":
            self.array += 1
            return float(self.array.sum())
        if self.kind == "buffer_replaced":
            self.average = 0.9 * self.average + 0.1 * (1 + features.detach().mean(0))
            return 1 + self.average.sum()
        if self.kind == "buffer_resized":
            self.ranges.resize_(len(self.ranges) + 1).fill_(2.0)
            return self.ranges.sum()
        if self.kind == "generators":
            return 1 + torch.rand(1, generator=self.generator) + self.python.random() + self.numpy.random()
        before = 0 if self.hidden is None else self.hidden.mean()
        self.hidden = torch.tanh(features).detach() + 1
        return 1 + before

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.factor(self.net[0](batch[0]))


KINDS = (
    "number", "schedule", "closure", "queue", "containers", "memory", "memory_with_a_graph", "array", "buffer_replaced",
    "buffer_resized", "generators", "hidden",
)  # fmt: skip
