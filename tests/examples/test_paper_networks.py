"""The paper's networks: sizes as published, layers as in the paper's files, and small ones that train with a probe."""

import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from lightning_spectral import SpectralNewton, SpectralProbe
from lightning_spectral.layers.matrices import find_layers

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from examples.paper import networks  # noqa: E402
from examples.paper.archives import ArchiveError  # noqa: E402
from examples.paper.attention import GPT, ViT, paper_gpt  # noqa: E402
from examples.paper.data import digits_parts, fixed_batch  # noqa: E402
from examples.paper.modules import Classifier, LanguageModel, Loaders, Trained  # noqa: E402
from examples.paper.networks import RESNET50_WEIGHTS, VGG11, mlp, pretrained_resnet50, resnet18, resnet50  # noqa: E402
from examples.paper.text import python_source  # noqa: E402

RESULTS = Path(os.environ.get("PAPER_RESULTS", ROOT.parent / "shared" / "paper-results"))


def on_meta(make):
    with torch.device("meta"):
        return make()


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


PUBLISHED = {
    # He et al.'s ResNet-18 with the 3 x 3 stem, as in github.com/kuangliu/pytorch-cifar.
    "resnet18_cifar10": (resnet18, 11_173_962),
    "resnet18_imagenet": (lambda: resnet18(1000, stem="imagenet"), 11_689_512),  # torchvision
    "resnet50_imagenet": (lambda: resnet50(1000), 25_557_032),  # torchvision
    # torchvision's VGG-11 has 132,863,336, of which 123,642,856 are in its head of three layers.
    "vgg11": (VGG11, 132_863_336 - 123_642_856 + (512 + 1) * 256 + (256 + 1) * 10),
    "vit_tiny_imagenet": (lambda: ViT(1000, image_size=224, patch=16), 5_717_416),  # timm's vit_tiny_patch16_224
    "vit_tiny_cifar10": (ViT, 5_362_762),
    "gpt2_small": (GPT, 124_439_808),  # Hugging Face's gpt2
    "mlp": (lambda: mlp(3072, 10, width=512), (3072 + 1) * 512 + (512 + 1) * 10),
}


@pytest.mark.parametrize(("make", "parameters"), PUBLISHED.values(), ids=PUBLISHED)
def test_networks_are_as_large_as_published(make, parameters):
    assert size(on_meta(make)) == parameters


KINDS = {
    "resnet18": (resnet18, {"conv": 20, "head": 1}),
    "resnet50": (resnet50, {"conv": 53, "head": 1}),
    "vgg11": (VGG11, {"conv": 8, "dense": 1, "head": 1}),
    "mlp": (lambda: mlp(64, 10, depth=3), {"dense": 3, "head": 1}),
    "vit": (
        ViT,
        {"conv": 1, "attention_qkv": 12, "attention_out": 12, "mlp_up": 12, "mlp_down": 12, "head": 1},
    ),
    "gpt": (
        paper_gpt,
        {"attention_qkv": 6, "attention_out": 6, "mlp_up": 6, "mlp_down": 6, "head": 1},
    ),
    "gpt2": (
        GPT,
        {"attention_qkv": 12, "attention_out": 12, "mlp_up": 12, "mlp_down": 12, "head": 1},
    ),
}


@pytest.mark.parametrize(("make", "kinds"), KINDS.values(), ids=KINDS)
def test_the_kinds_of_their_layers_are_found(make, kinds):
    found = find_layers(on_meta(make))
    assert Counter(layer.kind for layer in found.layers.values()) == kinds
    assert set(found.skipped.values()) <= {
        "an embedding, left out by default",
        "a vector of 192 entries stored as (1, 1, 192)",
    }


# The paper's names of layers -> ours.
NAMES = [
    (r"block(\d)\.mlp\.0", r"blocks.\1.up"), (r"block(\d)\.mlp\.2", r"blocks.\1.down"), (r"output_head|head", "head"),
    (r"patch_embed", "patch_embed"), (r"attn_qkv", "blocks.0.qkv"), (r"attn_proj", "blocks.0.proj"),
    (r"mlp_up", "blocks.0.up"), (r"mlp_down", "blocks.0.down"), (r"(.*)\.weight|(.*)", r"\1\2"),
]  # fmt: skip


def ours(name):
    pattern, replacement = next(pair for pair in NAMES if re.fullmatch(pair[0], name))
    return re.sub(f"^(?:{pattern})$", replacement, name) + ".weight"


def rows(file, *keys):
    found = json.loads((RESULTS / file).read_text())
    for key in keys:
        found = found[key]
    return found


IN_THE_PAPER = {
    "resnet18": (resnet18, ("results_alpha_triangle.json", 0, "results")),
    "gpt": (paper_gpt, ("results_alpha_triangle.json", 1, "results")),
    "vgg11": (VGG11, ("results_alpha_triangle.json", 2, "results")),
    "resnet18_large_stem": (lambda: resnet18(stem="imagenet"), ("results_conv_gap_v2.json", "conv_results")),
    "vit_cifar10": (ViT, ("results_hypothesis.json", "output_dim", "CIFAR-10")),
    "vit_cifar100": (lambda: ViT(100), ("results_hypothesis.json", "output_dim", "CIFAR-100")),
    "gpt_lm": (paper_gpt, ("results_hypothesis.json", "task_structure", "GPT2_LM")),
    "resnet50_tiny": (resnet50, ("results_tiny_imagenet_alpha_map.json", "results")),
    "resnet50_imagenet": (lambda: resnet50(1000), ("results_imagenet1k_pretrained.json", "results")),
    "resnet50_kronecker": (resnet50, ("results_kronecker_spectral.json", "layers")),
}


@pytest.mark.skipif(not RESULTS.is_dir(), reason="the paper's result files are not beside this project")
@pytest.mark.parametrize(("make", "where"), IN_THE_PAPER.values(), ids=IN_THE_PAPER)
def test_layers_are_those_of_the_papers_files(make, where):
    layers = find_layers(on_meta(make)).layers
    found = rows(*where)
    for row in found:
        shape = row.get("shape") or row["shape_G"]
        assert layers[ours(row["name"])].shape == (shape[0], math.prod(shape[1:])), row["name"]
    if where[0] == "results_tiny_imagenet_alpha_map.json":
        assert {ours(row["name"]) for row in found} == set(layers)


# --- small ones

SMALL_IMAGES = {
    "resnet18": lambda: resnet18(width=4, depths=(1, 1, 1, 1), channels=1),
    "resnet18_large_stem": lambda: resnet18(width=4, channels=1, stem="imagenet"),
    "resnet50": lambda: resnet50(10, width=4, depths=(1, 2, 1, 1), channels=1),
    "vgg11": lambda: VGG11(width=4, channels=1),
    "mlp": lambda: mlp(64, 10, width=16, depth=2),
    "vit": lambda: ViT(image_size=8, patch=2, width=12, heads=3, depth=1, channels=1),
}


@pytest.mark.parametrize("make", SMALL_IMAGES.values(), ids=SMALL_IMAGES)
def test_small_ones_run_on_digits(make):
    model = make().eval()
    images = torch.randn(5, 1, 8, 8)
    logits = model(images)
    assert logits.shape == (5, 10)
    assert torch.allclose(model(images[2:3]), logits[2:3], atol=1e-5)


@pytest.mark.parametrize(
    ("make", "image"),
    [(resnet18, 32), (VGG11, 32), (ViT, 32), (resnet50, 64), (lambda: resnet50(1000), 224)],
    ids=["resnet18", "vgg11", "vit", "resnet50_tiny", "resnet50_imagenet"],
)
def test_large_ones_take_their_images(make, image):
    model = on_meta(make)
    logits = model(torch.empty(2, 3, image, image, device="meta"))
    assert logits.shape[0] == 2
    assert logits.shape[1] in (10, 200, 1000)


def test_gpt_predicts_from_the_past_alone():
    torch.manual_seed(0)
    model = GPT(11, length=8, width=12, heads=3, depth=2)
    tokens = torch.randint(11, (3, 8))
    logits = model(tokens)
    assert logits.shape == (3, 8, 11)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    assert torch.allclose(model(changed)[:, :5], logits[:, :5], atol=1e-6)
    assert not torch.allclose(model(changed)[:, 5:], logits[:, 5:], atol=1e-3)
    assert torch.allclose(model(tokens[:, :4]), logits[:, :4], atol=1e-6)


def test_a_vision_transformer_sees_every_patch():
    torch.manual_seed(0)
    model = SMALL_IMAGES["vit"]()
    images = torch.randn(1, 1, 8, 8, requires_grad=True)
    F.cross_entropy(model(images), torch.tensor([3])).backward()
    assert (images.grad.abs() > 0).all()


@torch.no_grad()
def test_initial_weights():
    torch.manual_seed(0)
    model = GPT(211, length=16, width=96, heads=4, depth=8)
    assert model.head.weight is model.tokens.weight
    assert model.tokens.weight.std() == pytest.approx(0.02, rel=0.05)
    for block in model.blocks:
        for layer, std in ((block.qkv, 0.02), (block.up, 0.02), (block.proj, 0.005), (block.down, 0.005)):
            assert layer.weight.std() == pytest.approx(std, rel=0.05)
            assert not layer.bias.any()
    assert paper_gpt(50, depth=1).head.weight is not paper_gpt(50, depth=1).tokens.weight
    network = resnet18(width=32)
    for layer in (network.conv1, network.layer2[0].conv2, network.layer2[0].downsample[0]):
        out, kernel = layer.weight.shape[0], layer.weight[0, 0].numel()
        assert layer.weight.std() == pytest.approx(math.sqrt(2 / (out * kernel)), rel=0.1)
    assert ViT(depth=1).positions.std() == pytest.approx(0.02, rel=0.1)
    assert not any(layer.bias.any() for layer in VGG11(width=2).features if hasattr(layer, "bias"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resnet18(stem="small"), "stem must be 'cifar' or 'imagenet', got 'small'"),
        (lambda: resnet50(depths=(1, 1)), r"depths must be the numbers of blocks of four stages, got \[1, 1\]"),
        (lambda: ViT(patch=5), "patch must divide image_size, got 5 and 32"),
        (lambda: ViT(heads=5), "heads must divide width, got 5 and 192"),
        (lambda: GPT(heads=5), "heads must divide width, got 5 and 768"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        on_meta(make)


def test_torchvisions_weights_load(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "resnet50", lambda classes: resnet50(classes, width=2, depths=(1, 1, 1, 1)))
    made = networks.resnet50(1000).requires_grad_(False)
    made.fc.weight[0, 0] = 42.0
    path = tmp_path / RESNET50_WEIGHTS.name
    torch.save(made.state_dict(), path)
    own = replace(RESNET50_WEIGHTS, digest=f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}")
    assert pretrained_resnet50(tmp_path, archive=own).fc.weight[0, 0] == 42.0
    with pytest.raises(ArchiveError, match="its sha256 must be 0676ba61"):
        pretrained_resnet50(tmp_path)


@pytest.mark.parametrize(
    ("name", "make"), [("resnet18", lambda: resnet18(1000, stem="imagenet")), ("resnet50", lambda: resnet50(1000))]
)
def test_resnets_are_torchvisions(name, make):
    models = pytest.importorskip("torchvision.models")
    theirs, mine = getattr(models, name)(), make()
    mine.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 48)
    assert torch.allclose(mine(images), theirs(images), atol=1e-5)


# --- training


def trainer(steps, callbacks=()):
    return pl.Trainer(
        max_epochs=1, limit_train_batches=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), limit_val_batches=1,
        limit_test_batches=1,
    )  # fmt: skip


def test_a_classifier_trains_with_a_probe():
    pl.seed_everything(0, verbose=False)
    parts = digits_parts()
    probe = SpectralProbe(every_n_steps=2, top_k=8, batch=fixed_batch(parts.plain, 64))
    module = Classifier(resnet18(width=4, depths=(1, 1, 1, 1), channels=1), lr=1e-2)
    run, data = trainer(3, [probe]), Loaders(parts, 32)
    before = module.network.fc.weight.detach().clone()
    run.fit(module, datamodule=data)
    assert not torch.equal(before, module.network.fc.weight)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert probe.probes == 3
    assert Counter(layer.kind for layer in probe.last_report.layers.values()) == {"conv": 12, "head": 1}
    assert probe.last_report.n_samples == 64
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy"} <= set(run.callback_metrics)
    (tested,) = run.test(module, datamodule=data, verbose=False)
    images, labels = parts.test.images[:32], parts.test.labels[:32]
    with torch.no_grad():
        logits = module.eval()(images)
    assert tested == {
        "test_loss": pytest.approx(-logits.log_softmax(1)[range(32), labels].mean().item(), rel=1e-5),
        "test_accuracy": pytest.approx((logits.argmax(1) == labels).double().mean().item()),
    }


def test_a_language_model_trains_with_an_optimizer_of_its_own():
    pl.seed_everything(0, verbose=False)
    parts = python_source(16, limit=10_000)
    network = GPT(parts.classes, length=16, width=16, heads=2, depth=1)
    module = LanguageModel(network, optimizer=lambda model: SpectralNewton(SpectralNewton.groups(model), lr=1e-2))
    run = trainer(2)
    run.fit(module, datamodule=Loaders(parts, 8, eval_batch_size=4))
    assert isinstance(run.optimizers[0], SpectralNewton)
    batch = torch.stack([parts.val[i] for i in range(4)])
    with torch.no_grad():
        logits = network(batch[:, :-1])
    expected = -logits.log_softmax(-1).gather(-1, batch[:, 1:, None]).mean()
    assert run.callback_metrics["val_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert set(run.callback_metrics) == {"train_loss", "val_loss"}
    (tested,) = run.test(module, datamodule=Loaders(parts, 8), verbose=False)
    assert set(tested) == {"test_loss"}


def test_what_is_measured_is_left_to_the_task():
    with pytest.raises(NotImplementedError):
        Trained(mlp(4, 2)).training_step(torch.zeros(2, 4), 0)


def test_too_few_samples_for_a_batch_are_refused():
    with pytest.raises(ValueError, match="batch_size: 2000 samples were asked for, and there are 1294; take fewer"):
        Loaders(digits_parts(), 2000)
