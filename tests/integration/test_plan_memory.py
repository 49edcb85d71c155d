"""A plan of a network of seven billion parameters takes no memory for them."""

import subprocess
import sys
from pathlib import Path

import pytest

HUGE = """
import re, torch
from pathlib import Path
import torch.nn.functional as F
from torch import nn
from lightning_spectral.plan.fake_run import weightless
from lightning_spectral.plan.planner import plan_spectra

class Block(nn.Module):
    def __init__(self, d, f, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.RMSNorm(d), nn.RMSNorm(d)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def forward(self, x):
        b, t, d = x.shape
        y = self.norm1(x)
        q, k, v = (p(y).view(b, t, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))
        y = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))

class Llama(nn.Module):
    def __init__(self, d=4096, f=11008, heads=32, depth=32, words=32000):
        super().__init__()
        self.embed, self.norm = nn.Embedding(words, d), nn.RMSNorm(d)
        self.blocks = nn.ModuleList([Block(d, f, heads) for _ in range(depth)])
        self.lm_head = nn.Linear(d, words, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))

with weightless():
    model = Llama()
tokens = torch.zeros(64, 128, dtype=torch.long)
plan = plan_spectra(model, tokens, lambda m, x: F.cross_entropy(m(x).flatten(0, 1), x.flatten()), world_size=8)
# What getrusage tells is that of the process that started this one, if it is more.
most = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(plan.parameters, len(plan.layers), plan.method, plan.step_flops, most)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc, which is Linux's")
def test_seven_billion_parameters_take_less_than_a_gigabyte():
    done = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    parameters, layers, method, flops, kilobytes = done.stdout.split()
    assert (int(parameters), int(layers), method) == (6_738_415_616, 225, "sketch")
    # 6 N FLOPs per token, attention aside; the embedding multiplies nothing.
    assert int(flops) == pytest.approx(6 * (int(parameters) - 32000 * 4096) * 64 * 128, rel=0.02)
    assert int(kilobytes) < 2**20
