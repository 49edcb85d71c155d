"""Ctrl-C and checkpoints within a probe: training's state is as it was, and the run ends as it would without one."""

from __future__ import annotations

import gc
import random
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from identical import assert_identical
from killed import saved_on_exception
from tiny import Small, fit_small, small_data
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from lightning_spectral import SpectralProbe, _torch_private, measure_spectra
from lightning_spectral._torch_private import FUNCTION_MODE_NAMES
from lightning_spectral.isolation.interrupts import HeldInterrupts

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning_spectral.errors.SpectralWarning",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
)


def everything(module):
    """What a measurement may not change."""
    return {
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "grads": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "flags": [m.training for m in module.modules()],
        "attributes": [sorted(m.__dict__) for m in module.modules()],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()),
        "torch": [
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), str(torch.get_default_dtype()),
            torch.is_autocast_enabled("cpu"), torch.autocast.__enter__.__name__,
            len(_get_current_function_mode_stack()),
        ],
        "kernels": [
            torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cudnn.enabled, str(getattr(torch.backends, "fp32_precision", "")),
        ],
    }  # fmt: skip


class Kept(pl.Callback):
    """The state before a probe and, if one is raised, at an exception."""

    def __init__(self):
        self.before = self.after = None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.before = everything(module)

    def on_exception(self, trainer, module, exception):
        self.after, self.exception = everything(module), exception


def interrupted_at(monkeypatch, module, where):
    """Raise KeyboardInterrupt in a probe: at the forward pass, a second derivative, or a decomposition."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    if where == "forward":
        forward = nn.GELU.forward
        original = module.backbone[2]
        monkeypatch.setattr(nn.GELU, "forward", lambda self, x: forward(self, x) if self is original else interrupt())
    elif where == "double backward":
        grad = torch.autograd.grad

        def second(outputs, *args, **kwargs):
            return grad(outputs, *args, **kwargs) if kwargs.get("create_graph") else interrupt()

        monkeypatch.setattr(torch.autograd, "grad", second)
    else:
        monkeypatch.setattr(torch.linalg, "svd", interrupt)


@pytest.fixture
def signals():
    # Ignored where the tests run in the background of a shell.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("where", ["forward", "double backward", "svd"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_an_interrupt_in_a_probe_is_not_swallowed_and_leaves_everything_as_it_was(
    where, mode, monkeypatch, tmp_path, signals
):
    class From1(SpectralProbe):
        def should_measure(self, step):
            if step == 1:
                interrupted_at(monkeypatch, module, where)
            return step == 1

    module, kept = Small(), Kept()
    saved = saved_on_exception(tmp_path)
    with pytest.raises(SystemExit) as raised:
        fit_small(module, kept, From1(curvature="exact", mode=mode), *saved, enable_checkpointing=True)
    assert raised.value.code == 1
    assert isinstance(kept.exception, KeyboardInterrupt)
    assert kept.before["grads"][0] is not None
    assert_identical(kept.before, kept.after)
    monkeypatch.undo()
    # What Lightning saved on the way out goes on as if nothing had been.
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert_identical(dict(checkpoint["state_dict"]), kept.before["state"])
    probe = SpectralProbe(every_n_steps=1)
    assert fit_small(Small(), probe, ckpt_path=tmp_path / "last.ckpt").global_step == 6
    assert probe.failed_probes == 0


def test_a_checkpoint_written_within_a_probe_holds_the_network_of_training(tmp_path):
    """As SLURM's signal of a job about to end has Lightning do, at any point."""
    module, kept = Small(), Kept()

    def saving(shadow, batch):
        if not (tmp_path / "hpc.ckpt").exists():
            module.trainer.save_checkpoint(tmp_path / "hpc.ckpt")
            kept.saved = {name: value.clone() for name, value in module.state_dict().items()}
        return Small.training_step(shadow, batch, 0)

    class At2(SpectralProbe):
        def should_measure(self, step):
            return step == 2

    fit_small(module, kept, At2(loss_fn=saving), steps=3)
    checkpoint = torch.load(tmp_path / "hpc.ckpt", weights_only=True)
    assert_identical(dict(checkpoint["state_dict"]), kept.before["state"])
    assert checkpoint["global_step"] == 2


def test_an_interrupt_that_led_to_another_error_is_no_failed_probe(signals):
    """As where Ctrl-C comes while PyTorch has a mode off its stack."""

    def masked(module, batch):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("trying to pop from empty mode stack")

    kept = Kept()
    with pytest.raises(SystemExit):
        fit_small(Small(), kept, SpectralProbe(loss_fn=masked))
    assert isinstance(kept.exception, KeyboardInterrupt)


@pytest.mark.parametrize("moment", ["lost", "put back later"])
def test_a_mode_that_an_interrupt_took_from_pytorchs_stack_is_no_trace(moment):
    """PyTorch takes a mode off its stack while it handles a call; where an interrupt comes then, it stays off."""
    model, batch = Small(), small_data().tensors

    def loss(copy, batch):
        if moment == "lost":
            torch.overrides._pop_mode()
        else:
            # What is suspended in a frame goes on when that is let go of.
            suspended = torch.overrides._pop_mode_temporarily()
            suspended.__enter__()
        raise KeyboardInterrupt

    before = everything(model)
    with pytest.raises(KeyboardInterrupt) as raised:
        measure_spectra(model, batch, loss)
    assert_identical(before, everything(model))
    del raised
    gc.collect()
    assert everything(model)["torch"] == before["torch"]


def test_an_interrupt_is_held_while_state_is_set_and_put_back(signals):
    model, seen = Small(), []

    class Noisy(nn.Dropout):
        def __getstate__(self):
            # Copied while the measurement is set up.
            signal.raise_signal(signal.SIGINT)
            seen.append("copied")
            return super().__getstate__()

    model.backbone[3] = Noisy(0.1)
    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        measure_spectra(model, small_data().tensors, lambda *args: seen.append("measured"))
    assert seen == ["copied"]
    assert_identical(before, everything(model))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    hold = HeldInterrupts()
    hold.take()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        hold.release()
    hold.release()
    worker = threading.Thread(target=lambda: (hold.take(), hold.release(), seen.append("elsewhere")))
    worker.start()
    worker.join()
    assert seen == ["copied", "elsewhere"]


@pytest.mark.parametrize("name", FUNCTION_MODE_NAMES)
def test_measurements_do_without_each_of_pytorchs_private_names(name, monkeypatch):
    model, loss = Small(), lambda m, b: m(b[0]).square().mean()
    expected = measure_spectra(model, small_data().tensors, loss)
    stack = SimpleNamespace(
        **{other: getattr(torch.overrides, other) for other in FUNCTION_MODE_NAMES if other != name}
    )
    monkeypatch.setattr(_torch_private, "FUNCTION_MODES", stack)
    before = everything(model)
    assert measure_spectra(model, small_data().tensors, loss).loss == expected.loss
    assert_identical(before, everything(model))
