"""A measurement that takes many times as long as predicted says once where it is."""

import logging
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_spectral import measure_spectra
from lightning_spectral.measurement import watch

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")


# Not in closures, which a measurement copies.
TIMERS = []


class Timer:
    """Waits for a test to let its time pass."""

    def __init__(self, seconds, function, args):
        self.seconds, self.function, self.args, self.is_on = seconds, function, args, False
        TIMERS.append(self)

    def start(self):
        self.is_on = True

    def cancel(self):
        self.is_on = False

    def pass_time(self):
        """As the clock does: in a thread of its own, while what is measured waits."""
        thread = threading.Thread(target=self.function, args=self.args)
        thread.start()
        thread.join()


@pytest.fixture
def timers(monkeypatch):
    TIMERS.clear()
    monkeypatch.setattr(watch.threading, "Timer", Timer)
    return TIMERS


def pass_time():
    TIMERS[-1].pass_time()


def pass_time_after_the_gradient():
    if len(TIMERS) == 3:
        pass_time()


class Slow(nn.Module):
    def __init__(self, hang):
        super().__init__()
        self.first, self.slow, self.hang = nn.Linear(6, 8), Sluggish(hang), hang

    def forward(self, x):
        return self.slow(torch.tanh(self.first(x)))


class Sluggish(nn.Module):
    def __init__(self, hang):
        super().__init__()
        self.last, self.hang = nn.Linear(8, 4), hang

    def forward(self, h):
        self.hang()
        return self.last(h)


X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


def square(model, x):
    return model(x).square().mean()


def test_the_layer_that_hangs_is_named_once(timers, caplog):
    model = Slow(pass_time)
    for _ in range(2):
        measure_spectra(model, X, square, top_k=3)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    text = record.getMessage()
    assert text.startswith(
        "a measurement has taken 0 s, before its gradient was there, and goes on; it is in layer slow"
    )
    assert f"at {__file__}:" in text
    assert timers[0].seconds == watch.FIRST_SECONDS


def test_what_follows_the_gradient_is_predicted_from_it(timers, caplog, monkeypatch):
    monkeypatch.setattr(watch, "LEAST_SECONDS", 0.0)

    measure_spectra(Slow(pass_time_after_the_gradient), X, square, top_k=3, curvature="ggn", micro_batch_size=16)
    (record,) = caplog.records
    first, *predicted = timers
    assert all(0 < timer.seconds < first.seconds for timer in predicted)
    assert "s were to follow on its gradient, and goes on; it is in layer slow, at " in record.getMessage()


def test_the_layer_whose_products_are_taken_is_named(timers, caplog):
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return Backward.apply(g)

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, g):
            return g.clone()

        @staticmethod
        def backward(ctx, gg):
            pass_time()
            return gg

    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    measure_spectra(model, X, lambda m, x: Product.apply(m(x)).square().mean(), top_k=3, curvature="exact")
    (record,) = caplog.records
    assert "it is in layer 0.weight, at " in record.getMessage()


@pytest.mark.parametrize("fails", [False, True])
def test_a_measurement_that_ends_says_nothing(timers, caplog, fails):
    def hang():
        if fails:
            raise RuntimeError("the step failed")

    if fails:
        with pytest.raises(RuntimeError, match="the step failed"):
            measure_spectra(Slow(hang), X, square, top_k=3)
    else:
        measure_spectra(Slow(hang), X, square, top_k=3)
    assert timers
    assert not any(timer.is_on for timer in timers)
    assert not caplog.records


def test_a_busy_machine_has_a_minute(timers):
    measure_spectra(Slow(lambda: None), X, square, top_k=3)
    assert [timer.seconds for timer in timers[1:]] == [watch.LEAST_SECONDS] * (len(timers) - 1)


def test_what_a_measurement_lets_go_of_is_not_kept_by_the_report(timers):
    source = "def measure(box, wait, after):\n    gradients = box.pop()\n    wait()\n    del gradients\n    after()"
    exec(compile(source, str(Path(watch.__file__).with_name("pipeline.py")), "exec"), scope := {})
    gradients = torch.ones(3)
    kept, box, alive = weakref.ref(gradients), [gradients], []
    del gradients
    with watch.Watch(nn.Linear(2, 2)):
        scope["measure"](box, pass_time, lambda: alive.append(kept() is not None))
    assert alive == [False]
