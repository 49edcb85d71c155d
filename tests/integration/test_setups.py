"""Training as users set it up: the probe changes nothing, and measures the float32 network that is about to step."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections import OrderedDict, UserDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from cases import Block, cnn
from identical import assert_identical
from modules import fit
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from twins import block_triplets, dense_hessian, gradient, matrix_entries

from lightning_spectral import MeasurementError, SpectralProbe, SpectralWarning, measure_spectra
from lightning_spectral.layers.matrices import find_layers

# What is left out of a measurement is compared, not told.
pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")

STEPS = 5
SCALE, CLIP = 2.0**12, 1e-2


class Rows(Dataset):
    """Samples of a batch of tensors in a tuple or a dict."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(next(iter(self.batch.values() if isinstance(self.batch, dict) else self.batch)))

    def __getitem__(self, i):
        if isinstance(self.batch, dict):
            return {key: value[i] for key, value in self.batch.items()}
        return tuple(value[i] for value in self.batch)


class Module(pl.LightningModule):
    """What most users write: a network, a loss, an optimizer."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Residual(nn.Module):
    """Blocks with a residual path, checkpointed on request."""

    def __init__(self, reentrant=None, act=nn.GELU):
        super().__init__()
        self.reentrant, self.forwards = reentrant, 0
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), act(), nn.Dropout(0.1), nn.Linear(16, 8)) for _ in range(2)
        )

    def block(self, i, x):
        # A count that compiled code reads is compiled anew at each step.
        if self.reentrant is not None:
            self.forwards += 1
        return x + self.blocks[i](x)

    def forward(self, x):
        x = self.first(x)
        for i in range(2):
            block = functools.partial(self.block, i)
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


class Images(Module):
    """The memory format as PyTorch's tutorial sets it: of the model, and of each batch."""

    def __init__(self):
        super().__init__(cnn().to(memory_format=torch.channels_last))

    def training_step(self, batch, batch_idx):
        images = batch[0].to(memory_format=torch.channels_last)
        assert self.net[0](images).is_contiguous(memory_format=torch.channels_last)
        return super().training_step((images, batch[1]), batch_idx)


COMPILED = []


def counted(graph, inputs):
    COMPILED.append(graph)
    return graph.forward


class CompiledMethod(Module):
    """A compiled method, a compiled network and a compiled loss in one module."""

    def __init__(self):
        super().__init__(Residual())
        self.net = torch.compile(self.net, backend=counted)
        self.criterion = torch.compile(F.cross_entropy, backend=counted)

    @torch.compile(backend=counted)
    def scaled(self, x):
        return 2 * x - x

    def training_step(self, batch, batch_idx):
        return self.criterion(self(self.scaled(batch[0])), batch[1])


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.block, self.head = nn.Embedding(11, 8), Block(8), nn.Linear(8, 11)

    def forward(self, tokens):
        return self.head(self.block(self.tokens(tokens)))


class Encoder(nn.Module):
    """nn.TransformerEncoder with a padding mask."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.tokens, self.encoder, self.head = nn.Embedding(11, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 5)

    def forward(self, tokens):
        padding = tokens == 0
        x = self.encoder(self.tokens(tokens), src_key_padding_mask=padding)
        return self.head(x.masked_fill(padding[..., None], 0).sum(1))


class Recurrent(nn.Module):
    """Sequences of several lengths, packed, through a recurrent network and two linear layers."""

    def __init__(self, kind=nn.LSTM, width=6, **options):
        super().__init__()
        self.embed, self.rnn = nn.Linear(4, 5), kind(5, width, batch_first=True, **options)
        self.head = nn.Linear(self.rnn(torch.zeros(1, 1, 5))[0].shape[-1], 5)

    def forward(self, batch):
        packed = pack_padded_sequence(
            self.embed(batch["x"]), batch["lengths"].cpu(), batch_first=True, enforce_sorted=False
        )
        out = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]
        return self.head(out.sum(1) / batch["lengths"][:, None])


class Sequences(Module):
    """A batch as a dict, and a step that returns a dict with more in it than the loss."""

    def training_step(self, batch, batch_idx):
        logits = self(batch)
        loss = F.cross_entropy(logits, batch["y"])
        self.log_dict({"loss": loss, "lr": self.optimizers().param_groups[0]["lr"]})
        return {"loss": loss, "logits": logits.detach(), "ids": batch["lengths"]}


class ModelOutput(OrderedDict):
    """Like Hugging Face's: an ordered dict with attributes that refuses `update` and `pop`."""

    def __init__(self, **fields):
        super().__init__()
        for name, value in fields.items():
            self[name] = value

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def update(self, *args, **kwargs):
        raise TypeError("You cannot use ``update`` on a ModelOutput instance.")

    def pop(self, *args, **kwargs):
        raise TypeError("You cannot use ``pop`` on a ModelOutput instance.")


class CausalLM(Language):
    """Computes its own loss, on shifted logits raised to float32, as Hugging Face's models do."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = super().forward(input_ids)
        if labels is None:
            return ModelOutput(logits=logits)
        shifted = logits[:, :-1].float().reshape(-1, 11)
        return ModelOutput(
            loss=F.cross_entropy(shifted, labels[:, 1:].reshape(-1), ignore_index=-100),
            logits=logits,
        )


class FineTuned(Module):
    """Returns the loss of the model's output."""

    def training_step(self, batch, batch_idx):
        output = self.net(**batch)
        self.log("loss", output.loss)
        return output.loss


class FineTunedOutput(FineTuned):
    """Returns the model's output itself, whose ``loss`` Lightning takes."""

    def training_step(self, batch, batch_idx):
        return self.net(**batch)


class GAN(pl.LightningModule):
    """Two networks with an optimizer each, stepped by hand, as in Lightning's example."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 6))
        self.discriminator = nn.Sequential(
            nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1)
        )

    def adversarial(self, scores, real):
        return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, float(real)))

    def generator_loss(self, batch):
        return self.adversarial(self.discriminator(self.generator(torch.randn(len(batch[0]), 4))), True)

    def discriminator_loss(self, batch):
        fake = self.generator(torch.randn(len(batch[0]), 4)).detach()
        losses = self.adversarial(self.discriminator(batch[0]), True), self.adversarial(self.discriminator(fake), False)
        return sum(losses) / 2

    def training_step(self, batch, batch_idx):
        for optimizer, loss in zip(self.optimizers(), (self.generator_loss, self.discriminator_loss), strict=True):
            self.toggle_optimizer(optimizer)
            value = loss(batch)
            optimizer.zero_grad()
            self.manual_backward(value)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            self.log(loss.__name__, value)

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), lr=1e-2) for net in (self.generator, self.discriminator)]


class OwnLoss(GAN):
    """Says itself what is to be measured."""

    def spectral_loss(self, batch):
        return self.generator_loss(batch)


def vectors():
    return torch.randn(96, 6), torch.randint(0, 5, (96,))


def pictures():
    return torch.randn(96, 2, 6, 6), torch.randint(0, 5, (96,))


def tokens():
    return torch.randint(0, 11, (96, 7)), torch.randint(0, 5, (96,))


def padded():
    return {"x": torch.randn(96, 7, 4), "lengths": torch.randint(2, 8, (96,)), "y": torch.randint(0, 5, (96,))}


def texts():
    ids = torch.randint(0, 11, (96, 7))
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(torch.rand(96, 7) < 0.2, -100)}


def classified(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=2)


@dataclass(frozen=True)
class Setup:
    """A training as users set it up, and what the probe must find there.

    Attributes:
        module: what is trained.
        data: the whole data set.
        trainer: options of the Trainer.
        probe: options of the probe.
        twin: from the trained module, a plain network with its weights.
        loss: (twin, batch) -> what is measured, written out.
    """

    module: Callable[[], pl.LightningModule]
    data: Callable[[], Any] = vectors
    trainer: Callable[[], dict[str, Any]] = dict
    probe: dict[str, Any] = field(default_factory=dict)
    twin: Callable[[pl.LightningModule], nn.Module] = lambda module: module.net
    loss: Callable[[nn.Module, Any], torch.Tensor] = classified


def plain_residual(module):
    net = Residual()
    net.load_state_dict({name.replace("_orig_mod.", ""): value for name, value in module.net.state_dict().items()})
    return net


def residual():
    return Module(Residual())


def own_loss(net, batch):
    return net(**batch).loss


def sequence_loss(net, batch):
    return F.cross_entropy(net(batch), batch["y"])


FLOAT64, TRAIN = {"precision": "float64"}, {"mode": "train"}
SETUPS = {
    "plain": Setup(residual),
    "bf16_mixed": Setup(residual, trainer=lambda: {"precision": "bf16-mixed"}),
    "bf16_mixed_float64": Setup(residual, trainer=lambda: {"precision": "bf16-mixed"}, probe=FLOAT64),
    "bf16_true": Setup(residual, trainer=lambda: {"precision": "bf16-true"}),
    "bf16_true_float64": Setup(residual, trainer=lambda: {"precision": "bf16-true"}, probe=FLOAT64),
    "16_mixed": Setup(
        residual, trainer=lambda: {"plugins": [MixedPrecision("16-mixed", "cpu", scaler())]}, probe=TRAIN
    ),
    "clipped_by_norm": Setup(residual, trainer=lambda: {"gradient_clip_val": CLIP}, probe=TRAIN),
    "clipped_by_value": Setup(
        residual, trainer=lambda: {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"}, probe=TRAIN
    ),
    "accumulated": Setup(residual, trainer=lambda: {"accumulate_grad_batches": 3}, probe=TRAIN),
    "compiled": Setup(CompiledMethod, twin=plain_residual),
    "checkpointed": Setup(lambda: Module(Residual(reentrant=False)), twin=plain_residual),
    "channels_last": Setup(Images, pictures, twin=lambda module: module.net.to(memory_format=torch.contiguous_format)),
    "sdpa": Setup(
        lambda: Module(nn.Sequential(Language(), nn.Flatten(), nn.Linear(77, 5))), tokens, probe={"fused_qkv": "*.qkv"}
    ),
    "transformer_encoder": Setup(lambda: Module(Encoder()), tokens),
    "lstm": Setup(lambda: Sequences(Recurrent(nn.LSTM)), padded, loss=sequence_loss),
    "gru": Setup(lambda: Sequences(Recurrent(nn.GRU)), padded, loss=sequence_loss),
    "own_loss": Setup(lambda: FineTuned(CausalLM()), texts, loss=own_loss),
    "own_loss_output": Setup(lambda: FineTunedOutput(CausalLM()), texts, loss=own_loss),
    "gan_generator": Setup(
        OwnLoss, probe={"layers": "generator.*"}, twin=lambda module: module, loss=lambda m, b: m.generator_loss(b)
    ),
    "gan_discriminator": Setup(
        GAN,
        probe={"layers": "discriminator.*", "loss_fn": lambda m, b: m.discriminator_loss(b)},
        twin=lambda module: module,
        loss=lambda m, b: m.discriminator_loss(b),
    ),
}


class Trail(pl.Callback):
    """What training leaves behind, after each batch and after each backward pass."""

    def __init__(self):
        self.batches, self.backward = [], []

    def on_after_backward(self, trainer, module):
        self.backward.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        precision = trainer.precision_plugin
        self.batches.append(
            {
                "state": {name: value.clone() for name, value in module.state_dict().items()},
                "grad": {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None},
                "optimizers": copy.deepcopy([optimizer.state_dict() for optimizer in trainer.optimizers]),
                "scaler": dict(precision.scaler.state_dict()) if getattr(precision, "scaler", None) else None,
                "random": torch.get_rng_state(),
                "logged": {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("spectral")},
                "compiled": len(COMPILED),
                "forwards": getattr(getattr(module, "net", None), "forwards", 0),
            }
        )


class Watched(SpectralProbe):
    """Keeps the module, the batch and the random state of each measurement."""

    def __init__(self, **options):
        super().__init__(every_n_steps=2, **options)
        self.seen = []

    def _measure(self, trainer, module, batches, batch_idx):
        weights = {name: value.clone() for name, value in module.state_dict().items()}
        self.seen.append((weights, copy.deepcopy(batches[0]), torch.get_rng_state()))
        return super()._measure(trainer, module, batches, batch_idx)


@dataclass
class Run:
    module: pl.LightningModule
    trail: Trail
    probe: Watched


@functools.cache
def run(name, probed, curvature="auto"):
    setup = SETUPS[name]
    torch._dynamo.reset()
    COMPILED.clear()
    pl.seed_everything(3, verbose=False)
    data = Rows(setup.data())
    built = Run(setup.module(), Trail(), Watched(top_k=5, curvature=curvature, **setup.probe))
    callbacks = [built.trail, built.probe] if probed else [built.trail]
    steps = STEPS * (2 if isinstance(built.module, GAN) else 1)
    fit(built.module, callbacks, data=data, batch_size=32, steps=steps, **setup.trainer())
    return built


by_setup = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(f"setup_{name}")) for name in SETUPS]
)
"""The tests of a setup read the same trainings, in one worker."""


@by_setup
def test_training_is_bit_identical_with_and_without_a_probe(name):
    plain, probed = run(name, False), run(name, True)
    assert (plain.probe.probes, probed.probe.probes, probed.probe.failed_probes) == (0, 3, 0)
    assert len(plain.trail.batches) >= STEPS
    assert_identical(plain.trail.batches, probed.trail.batches)
    assert_identical(plain.trail.backward, probed.trail.backward)


def raised(value, dtype):
    if isinstance(value, dict):
        return {key: raised(item, dtype) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(raised(item, dtype) for item in value)
    return value.to(dtype) if value.is_floating_point() else value


def assert_close(report, expected, rel):
    """Equal up to a relative error, of h in units of the layer's largest."""
    assert report.loss == pytest.approx(expected.loss, rel=rel)
    for layer, reference in zip(report.layers.values(), expected.layers.values(), strict=True):
        torch.testing.assert_close(layer.sigma, reference.sigma, rtol=rel, atol=reference.noise_floor)
        atol = rel * float(reference.h.abs().nan_to_num().max())
        torch.testing.assert_close(layer.h, reference.h, rtol=rel, atol=atol, equal_nan=True)


@by_setup
def test_a_report_is_that_of_the_float32_weights_before_the_step(name):
    setup, found = SETUPS[name], run(name, True, "exact")
    dtype = torch.float64 if setup.probe.get("precision") == "float64" else torch.float32
    options = {key: value for key, value in setup.probe.items() if key in ("fused_qkv", "layers", "mode")}
    for (weights, batch, random), report in zip(found.probe.seen, found.probe.history, strict=True):
        module = setup.module().to(dtype)
        module.load_state_dict(raised(weights, dtype))
        torch.set_rng_state(random)
        expected = measure_spectra(
            setup.twin(module), raised(batch, dtype), setup.loss, curvature="exact", top_k=5, **options
        )
        assert_close(report, expected, 1e-9 if dtype is torch.float64 else 1e-3)
        for layer in report.layers.values():
            assert layer.noise_floor == pytest.approx(layer.sigma[0].item() * max(layer.shape) * torch.finfo(dtype).eps)


@by_setup
def test_the_method_chosen_agrees_with_exact_products(name):
    chosen, exact = run(name, True), run(name, True, "exact")
    sampled = [layer.h_stderr.any() for report in chosen.probe.history for layer in report.layers.values()]
    if not any(sampled):
        for report, expected in zip(chosen.probe.history, exact.probe.history, strict=True):
            assert_close(report, expected, 1e-3)
        return
    assert chosen.probe.last_report.chosen.startswith("sketch")
    within = []
    for report, expected in zip(chosen.probe.history, exact.probe.history, strict=True):
        for layer, reference in zip(report.layers.values(), expected.layers.values(), strict=True):
            known = (layer.h_stderr > 0) & reference.h.isfinite()
            within += (((layer.h - reference.h) / layer.h_stderr)[known].abs() < 1.96).tolist()
    assert sum(within) >= 0.8 * len(within) > 30


def singular_values(gradients):
    return torch.linalg.svdvals(gradients["net.head.weight"].float())[:5].double()


@pytest.mark.parametrize(
    ("name", "divided_by", "rel"),
    [
        ("clipped_by_norm", 1, 1e-4),
        ("clipped_by_value", 1, 1e-4),
        ("accumulated", 3, 1e-4),
        ("16_mixed", None, 2e-2),
    ],
)
def test_sigma_is_of_the_gradient_that_training_divides_scales_or_clips(name, divided_by, rel):
    found = run(name, True)
    scales = [SCALE, *((batch["scaler"] or {"scale": 1.0})["scale"] for batch in found.trail.batches)]
    for report in found.probe.history:
        first = report.step * (divided_by or 1)
        factor = divided_by or 1 / scales[report.step]
        sigma = report.layers["net.head.weight"].sigma
        trained = factor * singular_values(found.trail.backward[first])
        torch.testing.assert_close(trained, sigma, rtol=rel, atol=rel * float(sigma[0]))
    assert name != "16_mixed" or scales[-1] == 4 * SCALE


def test_training_takes_the_clipped_gradient():
    found = run("clipped_by_norm", True)
    for report in found.probe.history:
        norm = torch.cat([g.flatten() for g in found.trail.backward[report.step].values()]).norm()
        sigma = report.layers["net.head.weight"].sigma
        clipped = singular_values(found.trail.batches[report.step]["grad"])
        torch.testing.assert_close(clipped, sigma * CLIP / norm, rtol=1e-3, atol=1e-4 * CLIP)
        assert norm > 10 * CLIP


def test_compiled_code_is_compiled_once_and_not_by_the_probe():
    compiled = [batch["compiled"] for batch in run("compiled", True).trail.batches]
    assert compiled[0] >= 3
    assert len(set(compiled)) == 1


def test_checkpointing_computes_again_in_training():
    forwards = [batch["forwards"] for batch in run("checkpointed", True).trail.batches]
    assert forwards == [4 * (step + 1) for step in range(STEPS)]


def train_checkpointed(probed, **options):
    """Reentrant checkpointing as in PyTorch's examples: of the blocks, whose input needs a gradient."""
    torch.manual_seed(3)
    module = Module(Residual(reentrant=True))
    trail, probe = Trail(), Watched(top_k=5, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, [trail, probe] if probed else [trail], data=Rows(vectors()), batch_size=32, steps=STEPS)
    return trail, probe, [str(w.message) for w in caught if "checkpoint" in str(w.message).lower()]


@pytest.mark.parametrize("curvature", ["auto", "exact", "ggn"])
def test_reentrant_checkpointing_is_skipped_with_a_reason_and_training_goes_on(curvature):
    plain, _, _ = train_checkpointed(False)
    trail, probe, told = train_checkpointed(True, curvature=curvature)
    assert_identical(plain.batches, trail.batches)
    # Of two layers, and of the step.
    assert len(told) == 3
    assert all("use_reentrant=False" in text for text in told)
    assert (probe.probes, probe.failed_probes) == (3, 0)
    for (weights, batch, _), report in zip(probe.seen, probe.history, strict=True):
        assert list(report.failed) == [name for name in report.layers if name != "net.head.weight"]
        assert all(math.isnan(report.layers[name].alpha.exponent) for name in report.failed)
        module = residual()
        module.load_state_dict(weights)
        expected = measure_spectra(module.net, batch, classified, curvature="exact", top_k=5, layers="head")
        found = report.layers["net.head.weight"]
        torch.testing.assert_close(found.h, expected.layers["head.weight"].h, rtol=1e-3, atol=1e-6, equal_nan=True)


def test_reentrant_checkpointing_and_a_sketch():
    _, probe, told = train_checkpointed(True, curvature="sketch")
    assert (probe.probes, probe.failed_probes) == (3, 3)
    assert len(told) == 1
    assert "custom autograd functions (CheckpointFunction); use curvature='exact'" in told[0]


@pytest.mark.parametrize("samples", [8, 40])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("curvature", ["exact", "ggn", "sketch", "auto"])
def test_checkpointing_changes_no_measurement(curvature, mode, samples):
    # With as many samples as features, activations and weights look alike to what recomputes.
    batch = torch.randn(samples, 6), torch.randint(0, 5, (samples,))
    plain, checkpointed = Residual(), Residual(reentrant=False)
    checkpointed.load_state_dict(plain.state_dict())
    reports = []
    for model in (plain, checkpointed):
        torch.manual_seed(2)
        reports.append(measure_spectra(model, batch, classified, curvature=curvature, mode=mode, top_k=4))
    # What is not checkpointed is sketched with other, equal formulas of GELU.
    sketched = any(layer.method == "sketch" for layer in reports[0].layers.values())
    assert_close(*reports, 1e-4 if sketched else 1e-5)
    assert {layer.method for layer in reports[0].layers.values()} == {
        layer.method for layer in reports[1].layers.values()
    }


class Forced(nn.Module):
    """Attention whose kernel the network chooses itself, as fast training code does."""

    def __init__(self, kernels):
        super().__init__()
        self.kernels, self.block, self.head = kernels, Block(8), nn.Linear(8, 5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        with sdpa_kernel(self.kernels):
            x = self.block(x)
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("curvature", ["exact", "sketch"])
def test_attention_kernels_that_the_network_chooses_have_a_second_derivative(curvature):
    batch = torch.randn(32, 4, 8), torch.randint(0, 5, (32,))
    math_only = Forced([SDPBackend.MATH])
    forced = Forced([SDPBackend.FLASH_ATTENTION])
    forced.load_state_dict(math_only.state_dict())
    expected, found = (measure_spectra(m, batch, classified, curvature=curvature, top_k=4) for m in (math_only, forced))
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {"width": 4}),
        (nn.LSTM, {"num_layers": 2, "bidirectional": True, "width": 3}),
        (nn.LSTM, {"proj_size": 3}),
        (nn.GRU, {}),
        (nn.GRU, {"num_layers": 2, "bidirectional": True, "bias": False, "width": 3}),
        (nn.RNN, {}),
    ],
)
def test_recurrent_weights_equal_their_dense_hessians(kind, options):
    model = Recurrent(kind, **options).double()
    batch = {key: value[:8].double() if value.is_floating_point() else value[:8] for key, value in padded().items()}
    report = measure_spectra(model, batch, sequence_loss, curvature="exact", top_k=4)
    assert any("weight_hh" in name for name in report.layers)
    for name, layer in find_layers(model).layers.items():
        hessian = dense_hessian(model, batch, sequence_loss, name)
        grad = gradient(model, batch, sequence_loss, name)
        matrix = grad.flatten()[matrix_entries(layer, grad.shape)]
        for k, (sigma, direction) in enumerate(block_triplets(matrix, 1, 4)):
            assert report.layers[name].sigma[k].item() == pytest.approx(sigma, rel=1e-9)
            expected = (direction.flatten() @ hessian @ direction.flatten()).item()
            assert report.layers[name].h[k].item() == pytest.approx(expected, rel=1e-8, abs=1e-14), (name, k)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_networks_in_float32_and_by_the_method_chosen(kind):
    model, batch = Recurrent(kind), padded()
    expected = measure_spectra(model, batch, sequence_loss, curvature="exact", top_k=4, precision="float64")
    found = measure_spectra(model, batch, sequence_loss, top_k=4)
    methods = {name: layer.method for name, layer in found.layers.items()}
    assert methods["rnn.weight_ih_l0"] == methods["rnn.weight_hh_l0"] == "sketch"
    for name in ("rnn.weight_ih_l0", "rnn.weight_hh_l0"):
        layer, reference = found.layers[name], expected.layers[name]
        rounding = 1e-3 * float(reference.h.abs().max())
        assert ((layer.h - reference.h).abs() < 6 * layer.h_stderr + rounding).all()


def test_two_probes_of_a_gan_each_on_its_loss():
    module = GAN()
    probes = {
        name: SpectralProbe(
            every_n_steps=2, layers=f"{name}.*", prefix=name, loss_fn=lambda m, b, n=name: getattr(m, f"{n}_loss")(b)
        )
        for name in ("generator", "discriminator")
    }
    data = Rows(vectors())
    fit(module, probes.values(), data=data, steps=12)
    for name, probe in probes.items():
        assert [report.step for report in probe.history] == [0, 2, 4]
        assert all(layer.startswith(f"{name}.") for report in probe.history for layer in report.layers)
        assert all(report.layers[layer].h.isfinite().any() for report in probe.history for layer in report.layers)
    with pytest.warns(SpectralWarning, match=r"generator.0.weight, generator.2.weight: the loss of loss_fn does not"):
        measure_spectra(module, data.batch, lambda m, b: m.discriminator_loss(b))


class Detector(Module):
    """Has losses in train mode and detections in eval mode, as torchvision's models do."""

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        found = {"classes": F.cross_entropy(logits, batch[1])} if self.training else [logits]
        return sum(found.values())


def test_a_training_step_that_needs_train_mode():
    with pytest.raises(
        MeasurementError,
        match=r"in eval mode \(AttributeError: .*if the mode is the cause.* mode='train'",
    ):
        measure_spectra(Detector(Residual()), vectors())
    probe = SpectralProbe(mode="train")
    fit(Detector(Residual()), [probe], data=Rows(vectors()), steps=1)
    assert probe.failed_probes == 0
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        measure_spectra(Detector(nn.Linear(3, 5)), vectors(), mode="train")


@pytest.mark.parametrize(
    ("cast", "precision", "told"),
    [
        (lambda z: z.float(), "float64", "casts to float32 by itself"),
        (lambda z: z.to(torch.bfloat16).float(), "float32", "casts to bfloat16 by itself"),
        (lambda z: z.half().type(torch.float32), "float64", "casts to float16 by itself"),
        (lambda z: z.float(), "float32", ""),
        (lambda z: z.double(), "float32", ""),
        (lambda z: z.detach().half() * 0 + z, "float32", ""),
    ],
)
def test_a_cast_of_the_network_s_own_is_told_and_no_direction_below_float32_counts(cast, precision, told):
    model, batch = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 5)), vectors()
    report = measure_spectra(
        model, batch, lambda m, b: F.cross_entropy(cast(m(b[0])), b[1]), precision=precision, curvature="exact"
    )
    assert any(told in text for text in report.warnings) if told else report.warnings == ()
    layer = report.layers["4.weight"]
    assert layer.noise_floor == pytest.approx(layer.sigma[0].item() * 8 * torch.finfo(torch.float32).eps)
    if "bfloat16" not in told and "float16" not in told:
        # The gradient of a cross-entropy sums to zero over the classes.
        assert layer.n_usable == 4


class Returned(Module):
    def __init__(self, kind):
        super().__init__(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)))
        self.kind = kind

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        return self.kind(loss=F.cross_entropy(logits, batch[1]), logits=logits)


@pytest.mark.parametrize("kind", [dict, OrderedDict, ModelOutput, UserDict])
def test_every_mapping_that_lightning_takes_from_a_training_step(kind):
    probe = SpectralProbe()
    trainer = fit(Returned(kind), [probe], data=Rows(vectors()), steps=2)
    assert (trainer.global_step, probe.failed_probes) == (2, 0)
    assert probe.last_report.loss > 0
