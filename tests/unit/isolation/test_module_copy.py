"""Measurements on modules that write to themselves, to what they hold, and to what their functions close over."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import deque
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from modules import fit
from pytorch_lightning.loggers import CSVLogger
from tiny import Repeated, Tiny, batch_of
from torch import nn

from lightning_spectral import MeasurementError, SpectralProbe, SpectralWarning, measure_spectra
from lightning_spectral.isolation.module_copy import copied_module
from lightning_spectral.isolation.replay import InitialState
from lightning_spectral.isolation.sandbox import copy_batch, isolated

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")

STEPS = 4


def train(module_class, probed, *, wrap=lambda module: module, **options):
    torch.manual_seed(0)
    module = module_class()
    probe = SpectralProbe(every_n_steps=1)
    fit(wrap(module), [probe] if probed else [], data=Repeated(batch_of()), batch_size=None, steps=STEPS, **options)
    assert probe.failed_probes == 0
    assert probe.probes == (STEPS if probed else 0)
    return module, probe


class Teacher(Tiny):
    """Moves a teacher's weights in the training step, as DINO and BYOL do, and clamps its own, as WGAN does."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(6, 8).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.teacher.weight.mul_(0.9).add_(self.net[0].weight, alpha=0.1)
            self.net[2].weight.clamp_(-0.2, 0.2)
        return super().training_step(batch, batch_idx) + F.mse_loss(self.net[0](batch[0]), self.teacher(batch[0]))


class Closures(Tiny):
    """Functions and hooks that close over the module and over lists."""

    def __init__(self):
        super().__init__()
        self.count, calls = 0, []
        self.calls = calls
        self.compiled = torch.compile(self.plain, backend="eager")
        self.through = lambda batch: self.plain(batch)
        self.net[0].register_forward_hook(lambda *_: calls.append(1))

    def plain(self, batch):
        self.count += 1
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.compiled(batch) + self.through(batch)


class Helper:
    """A plain object with something in it that cannot be copied."""

    def __init__(self):
        self.lines, self.seen = (i for i in range(3)), torchmetrics.MeanMetric()


class Holder(Tiny):
    """Bounded lists of losses with graphs, helpers, a Trainer, a logger, and a table keyed by modules."""

    def __init__(self):
        super().__init__()
        self.losses, self.helper, self.own_logger = deque(maxlen=100), Helper(), None
        self.table = {self.net[0]: 1.0}
        self.register_buffer("expanded", torch.ones(1).expand(5))
        self.lazy = nn.LazyLinear(3)
        self.rows = []

    def on_train_start(self):
        self.held_trainer = self.trainer

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx) * self.table[self.net[0]] + self.expanded.sum()
        self.losses.append(loss)
        self.helper.seen.update(loss)
        self.own_logger.log_metrics({"loss": loss.item()}, step=batch_idx)
        self.held_trainer.logger.log_metrics({"by_hand": 1.0}, step=batch_idx)
        return loss


def states(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_weights_are_put_back_from_the_originals_without_a_second_copy():
    model = nn.Linear(3, 2).double()
    before = model.weight.detach().clone()
    with isolated(model) as copied:
        beginning = InitialState(copied.module, copied.originals)
        assert beginning._values[0].data_ptr() == model.weight.data_ptr()
        beginning.restore()
        copied.module.weight.data.mul_(2)
        beginning.restore()
        assert torch.equal(copied.module.weight, before)
    assert torch.equal(model.weight, before)


def test_weights_that_stand_in_for_others_are_put_back_by_who_gave_them():
    model, whole = nn.Linear(3, 2), nn.Parameter(torch.ones(2, 3))
    with isolated(model, stand_ins={id(model.weight): whole}) as copied:
        beginning = InitialState(copied.module, copied.originals, lambda: whole.data.fill_(1.0))
        assert beginning._tensors[0] is not whole
        beginning.restore()
        copied.module.weight.data[0, 0] += 1e-6
        beginning.restore()
        assert torch.equal(whole, torch.ones(2, 3))


def test_weights_written_in_the_training_step():
    (plain, _), (probed, _) = train(Teacher, False), train(Teacher, True)
    for name, value in states(plain).items():
        assert torch.equal(value, probed.state_dict()[name]), name


def test_functions_and_hooks_that_close_over_the_module():
    (plain, _), (probed, probe) = train(Closures, False), train(Closures, True)
    assert probed.count == plain.count == 2 * STEPS
    assert len(probed.calls) == len(plain.calls)
    assert not any("cannot be copied" in text for text in probe.last_report.warnings)


def test_a_whole_compiled_lightning_module():
    _, probe = train(Tiny, True, wrap=lambda module: torch.compile(module, backend="eager"))
    torch.manual_seed(0)
    expected = measure_spectra(Tiny(), batch_of())
    for name, layer in probe.history[0].layers.items():
        torch.testing.assert_close(layer.h, expected.layers[name].h, equal_nan=True)


def test_what_a_module_holds_stays_as_it_was(tmp_path):
    counts = []
    for probed in (False, True):
        own = CSVLogger(tmp_path / f"own{probed}")
        seen = []
        own.log_metrics = lambda *args, seen=seen, **kwargs: seen.append(args)

        class Module(Holder):
            def __init__(self, own=own):
                super().__init__()
                self.own_logger = own

        module = Module.__new__(Module)
        Module.__init__(module)
        logger = CSVLogger(tmp_path / f"trainer{probed}")
        probe = SpectralProbe(every_n_steps=1)
        # The lazy layer has no optimizer state to build, so only the network trains.
        module.configure_optimizers = lambda m=module: torch.optim.SGD(m.net.parameters(), lr=1e-2)
        fit(module, [probe] if probed else [], data=Repeated(batch_of()), batch_size=None, steps=STEPS, logger=logger)
        assert probe.failed_probes == 0
        counts.append((len(module.losses), float(module.helper.seen.weight), len(seen)))
    assert counts == [(STEPS, STEPS, STEPS)] * 2


def test_functions_share_their_variables_in_the_copy_as_in_the_original():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            count = 0

            def add(times):
                nonlocal count
                count += 1
                return add(times - 1) if times > 1 else count

            self.add, self.count, self.plain = add, lambda: count, F.relu

    model = Counted()
    with copied_module(model) as copied:
        assert copied.module.add(3) == copied.module.count() == 3
        assert copied.module.plain is F.relu
    assert model.count() == 0


def test_features_taken_by_a_hook_reach_the_loss():
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
            self.features = {}

            def hook(module, inputs, output):
                self.features["h"] = output

            self.net[0].register_forward_hook(hook)

        def forward(self, x):
            return self.net(x)

    def hooked(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]) + 10 * model.features["h"].square().mean()

    def direct(model, batch):
        h = model.net[0](batch[0])
        return F.cross_entropy(model.net[2](torch.tanh(h)), batch[1]) + 10 * h.square().mean()

    model = Hooked()
    model(batch_of()[0])
    found, expected = (measure_spectra(model, batch_of(), loss) for loss in (hooked, direct))
    for name, layer in expected.layers.items():
        torch.testing.assert_close(found.layers[name].h, layer.h, equal_nan=True)


def test_a_module_that_cannot_be_copied_is_refused_and_left_alone():
    class Stubborn(Tiny):
        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    module, probe = Stubborn(), SpectralProbe(every_n_steps=1)
    with pytest.warns(SpectralWarning, match="Stubborn, cannot be copied .no copies., and a measurement"):
        fit(module, [probe], data=Repeated(batch_of()), batch_size=None, steps=2)
    assert probe.failed_probes == 2
    assert "log" not in module.__dict__
    with pytest.raises(MeasurementError, match="cannot be copied"):
        measure_spectra(nn.Sequential(module, nn.Linear(5, 5)), batch_of(), lambda m, b: m[1](m[0].net(b[0])).sum())


def test_no_graph_outlives_a_measurement():
    class Metered(Tiny):
        def __init__(self):
            super().__init__()
            self.mean = torchmetrics.MeanMetric()
            self.graphs = []

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            alive.append(weakref.ref(loss))
            self.mean(loss)
            return loss

    alive = []
    module = Metered()
    gc.collect()
    gc.disable()
    try:
        measure_spectra(module, batch_of())
        assert alive
        assert all(loss() is None for loss in alive)
    finally:
        gc.enable()


def test_training_step_is_told_the_batch_index():
    class Indexed(Tiny):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (1 + batch_idx)

    _, probe = train(Indexed, True)
    losses = [report.loss for report in probe.history]
    assert losses[2] > 2 * losses[0]


def test_attributes_of_parameters_are_kept():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))
            self.weight.scale = 3.0

        def forward(self, x):
            return x @ (self.weight * self.weight.scale)

    model, x = Scaled(), batch_of()[0]
    assert measure_spectra(model, x, lambda m, x: m(x).square().mean()).loss == pytest.approx(
        model(x).square().mean().item()
    )


def test_mixed_precisions_are_raised_tensor_by_tensor():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(6, 6).bfloat16()
            self.register_buffer("wide", torch.ones(6, dtype=torch.float64))
            self.phase = nn.Parameter(torch.randn(6, dtype=torch.complex64))

        def forward(self, x):
            return self.net(x) * self.wide.float() * self.phase.abs()

    model = Mixed()
    with copied_module(model) as plain, isolated(model) as raised:
        assert plain.module.net.weight.dtype is torch.bfloat16
        assert raised.module.net.weight.dtype is torch.float32
        assert raised.module.wide.dtype is torch.float64
        assert torch.equal(raised.module.phase, model.phase)
    measure_spectra(model, batch_of()[0].bfloat16(), lambda m, x: m(x).square().mean())


def test_float64_training_that_makes_tensors():
    class Noisy(Tiny):
        def training_step(self, batch, batch_idx):
            return super().training_step(
                (batch[0] + torch.randn(32, 6) @ self.net[0].weight.T @ self.net[0].weight, batch[1]), batch_idx
            )

    train(Noisy, True, precision="64-true")


def test_autocast_inside_the_network_does_not_lower_the_measurement():
    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(x)

    model, inside = Autocast(), torch.autocast("cpu", torch.bfloat16)
    loss = lambda m, b: F.cross_entropy(m(b[0]).float(), b[1])  # noqa: E731
    expected = measure_spectra(model, batch_of(), lambda m, b: F.cross_entropy(m.net(b[0]), b[1]))
    with inside:
        found = measure_spectra(model, batch_of(), loss)
        assert torch.is_autocast_enabled("cpu")
        assert model.net(batch_of()[0]).dtype is torch.bfloat16
    for name, layer in expected.layers.items():
        assert torch.equal(found.layers[name].h.nan_to_num(), layer.h.nan_to_num())


def test_measuring_under_no_grad_and_inference_mode():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
    expected = measure_spectra(model, batch_of(), loss)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = measure_spectra(model, batch_of(), loss)
            assert not torch.is_grad_enabled()
        assert torch.equal(found.layers["0.weight"].h, expected.layers["0.weight"].h)


def precisions():
    backends = torch.backends
    parts = (
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    )
    return [part.fp32_precision for part in parts]


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9 has other switches")
def test_float32_products_are_exact_inside_and_as_they_were_after():
    start = torch.backends.fp32_precision
    try:
        for level in ("none", "tf32"):
            torch.backends.fp32_precision = level
            before = precisions()
            with isolated(nn.Linear(2, 2)):
                assert set(precisions()) <= {"ieee", "none"}
            assert precisions() == before
        # What followed the common switch still follows it.
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = start


def test_backward_hooks_of_parametrized_modules_do_not_run():
    calls = []
    model = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    model.register_full_backward_hook(lambda *_: calls.append(1))
    measure_spectra(model, batch_of()[0], lambda m, x: m(x).square().mean())
    assert calls == []


def test_parametrized_layers_have_their_layer_s_kind():
    norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Conv2d(1, 4, 3)), nn.Flatten(), norm(nn.Linear(16, 5)))
    report = measure_spectra(model, torch.randn(24, 1, 4, 4), lambda m, x: m(x).square().mean())
    assert {name: layer.kind for name, layer in report.layers.items()} == {
        "0.parametrizations.weight.original1": "conv",
        "2.parametrizations.weight.original1": "head",
    }
    assert "a vector of 4 entries" in report.skipped["0.parametrizations.weight.original0"]


def test_a_batch_that_makes_its_tensors_on_access_is_copied_right():
    class Lazy(Mapping):
        def __init__(self, filled=None):
            self.filled = filled

        def __getitem__(self, key):
            return torch.full((3,), float(key))

        def __iter__(self):
            return iter(range(5))

        def __len__(self):
            return 5

    copied = copy_batch([Lazy() for _ in range(20)])
    for part in copied:
        for key, value in part.filled.items():
            assert torch.equal(value, torch.full((3,), float(key)))


def test_warnings_as_errors_do_not_end_training(caplog):
    class Broken(Tiny):
        def spectral_loss(self, batch):
            raise ValueError("no loss today")

    probe = SpectralProbe(every_n_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpectralWarning)
        trainer = fit(Broken(), [probe], data=Repeated(batch_of()), batch_size=None, steps=3)
    assert (trainer.global_step, probe.failed_probes) == (3, 3)
    assert sum("no loss today" in record.message for record in caplog.records) == 1


def test_a_checkpoint_with_a_report_of_another_version_is_no_obstacle():
    probe = SpectralProbe()
    state = probe.state_dict() | {"last_report": {"format": "lightning-spectral-report", "version": 99}, "probes": 3}
    with pytest.warns(SpectralWarning, match="last report cannot be read"):
        probe.load_state_dict(state)
    assert (probe.probes, probe.last_report) == (3, None)


def test_a_probe_that_was_off_is_on_again_in_the_next_fit():
    class Switch(Tiny):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if self.automatic_optimization else self.optimizers().step()

    module, probe = Switch(), SpectralProbe(every_n_steps=1)
    fit(module, [probe], data=Repeated(batch_of()), batch_size=None, steps=1)
    assert probe.probes == 0
    module.automatic_optimization = True
    fit(module, [probe], data=Repeated(batch_of()), batch_size=None, steps=2)
    assert (probe.probes, probe.failed_probes) == (2, 0)


def test_processes_measure_alike_and_the_first_one_logs():
    class Rank:
        is_global_zero, loggers, callback_metrics = False, ["never asked"], {}

    SpectralProbe().outputs.write(Rank(), 0, [], (1, 1), report=None, alphas={}, later=[])
