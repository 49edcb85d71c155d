"""SpectralNewton saved, loaded, copied, resumed; and in the hands of schedulers, Lightning and its command line."""

import copy
import io
import pickle
import re

import pytest
import pytorch_lightning as pl
import torch
from cases import mlp
from modules import ConvNet, fit
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.loggers import CSVLogger
from torch import nn

from lightning_spectral import SpectralNewton
from lightning_spectral.optim.adam_size import size_state
from lightning_spectral.optim.placement import whole_layout


def train(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 6, generator=generator)).square().mean().backward()
        optimizer.step()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("make", [lambda m: m.parameters(), lambda m: m.named_parameters(), SpectralNewton.groups])
def test_a_resumed_run_is_the_uninterrupted_one(make):
    model = mlp()
    optimizer = SpectralNewton(make(model), lr=0.05, alpha=1.5)
    train(model, optimizer, 3, 0)
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    train(model, optimizer, 3, 1)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    resumed = mlp()
    resumed.load_state_dict(state["model"])
    again = SpectralNewton(make(resumed), lr=9.0)
    again.load_state_dict(state["optimizer"])
    train(resumed, again, 3, 1)
    assert same(model, resumed)
    assert again.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_as_the_original(how):
    model = mlp()
    optimizer = SpectralNewton(SpectralNewton.groups(model), lr=0.05)
    train(model, optimizer, 2, 0)
    other, other_optimizer = how((model, optimizer))
    train(model, optimizer, 2, 1)
    assert not same(model, other)
    train(other, other_optimizer, 2, 1)
    assert same(model, other)
    other_optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 3))], "param_names": ["new"]})


def test_counts_survive_a_checkpoint_in_bfloat16():
    weight = nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16))
    optimizer = SpectralNewton([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.state[weight]["skipped"] += 1001
    other = SpectralNewton([nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16))])
    other.load_state_dict(optimizer.state_dict())
    assert other.skipped_updates == 1001
    weight.grad = torch.full_like(weight, float("nan"))
    optimizer.step()
    assert (optimizer.skipped_updates, other.skipped_updates) == (1002, 1001)


@pytest.mark.parametrize("after", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", [torch.float64, torch.float32, torch.bfloat16])
def test_state_goes_on_in_another_type(before, after):
    weights = [nn.Parameter(torch.zeros(4, 6, dtype=dtype)) for dtype in (before, after)]
    optimizer, other = (SpectralNewton([weight], lr=0.1) for weight in weights)
    for weight in weights:
        weight.grad = torch.eye(4, 6, dtype=weight.dtype)
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    weights[0].detach().zero_()
    for each in (optimizer, other):
        each.step()
    torch.testing.assert_close(weights[1], weights[0].to(after), rtol=1e-2, atol=1e-6)
    fresh = SpectralNewton([weights[1]])
    fresh.step()
    sizes = [
        {key: optimizer.state[weights[1]][key].dtype for key in ("mean_square", "step")} for optimizer in (other, fresh)
    ]
    assert sizes[0] == sizes[1]


class Homemade(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "trust": 3})

    def step(self, closure=None):
        pass


@pytest.mark.parametrize(
    ("other", "keys"),
    [
        (lambda p: torch.optim.AdamW(p), "amsgrad, betas, "),
        (lambda p: torch.optim.SGD(p, lr=0.1), ".*momentum, nesterov"),
        (Homemade, "initial_lr, lr, trust"),
    ],
)
def test_state_of_another_class_is_refused(other, keys):
    weights = [nn.Parameter(torch.ones(3, 3))]
    optimizer = SpectralNewton(weights)
    foreign = other(weights)
    torch.optim.lr_scheduler.ConstantLR(foreign)
    with pytest.raises(ValueError, match=f"got the state of another optimizer: group 0 has no 'update' but {keys}"):
        optimizer.load_state_dict(foreign.state_dict())
    weights[0].grad = torch.ones(3, 3)
    optimizer.step()


def test_state_of_another_split_is_refused():
    model = mlp()
    state = SpectralNewton(SpectralNewton.groups(model)).state_dict()
    with pytest.raises(ValueError, match=r"different number of parameter groups|doesn't match the size"):
        SpectralNewton(model.parameters()).load_state_dict(state)
    weights = [nn.Parameter(torch.ones(6, 3))]
    split = SpectralNewton([{"params": weights, "update": "spectral", "layouts": [{"input_first": 0, "rows": [3, 3]}]}])
    with pytest.raises(
        ValueError, match=r"group 0 \(spectral\) has layouts=.*build the optimizer from the same groups"
    ):
        SpectralNewton(weights).load_state_dict(split.state_dict())
    with pytest.raises(ValueError, match="has update='spectral', its saved state update='adamw'"):
        SpectralNewton(weights).load_state_dict(SpectralNewton([{"params": weights, "update": "adamw"}]).state_dict())


def test_one_schedule_scales_both_rates():
    optimizer = SpectralNewton(mlp().parameters(), lr=0.1, adamw_lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.005]


def test_a_tensor_as_rate_is_scheduled_once_for_each_group():
    rate = torch.tensor([0.1])
    optimizer = SpectralNewton(mlp().parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(2):
        scheduler.step(1.0)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.05, 0.05])
    assert float(rate) == pytest.approx(0.1)


def test_one_cycle():
    model = mlp()
    optimizer = SpectralNewton(model.parameters(), lr=0.1, adamw_lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.01], total_steps=10)
    for _ in range(5):
        train(model, optimizer, 1, 0)
        scheduler.step()
    assert optimizer.param_groups[0]["momentum"] != 0.95
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates[0] == pytest.approx(10 * rates[1])


class Trained(ConvNet):
    how = "groups"

    def configure_optimizers(self):
        params = SpectralNewton.groups(self) if self.how == "groups" else self.parameters()
        return SpectralNewton(params, lr=1e-2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_lightning_trains_clips_accumulates_and_shows_the_rates(tmp_path, precision):
    logger = CSVLogger(tmp_path)
    module = Trained()
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "precision": precision}
    data = None
    if precision == "bf16-true":
        x, y = ConvNet.data().tensors
        data = torch.utils.data.TensorDataset(x.bfloat16(), y)
    trainer = fit(module, [LearningRateMonitor()], logger=logger, data=data, **options)
    text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    assert "lr-SpectralNewton/conv" in text
    assert "lr-SpectralNewton/adamw" in text
    assert trainer.optimizers[0].skipped_updates == 0
    assert all(p.isfinite().all() for p in module.parameters())


class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        data = torch.utils.data.TensorDataset(torch.randn(16, 6, generator=generator))
        return torch.utils.data.DataLoader(data, 16)


class Configured(Plain):
    def configure_optimizers(self):
        return SpectralNewton(SpectralNewton.groups(self.net), lr=1e-2)


QUIET = {"max_epochs": -1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False}


def test_lightning_resumes_bit_identically(tmp_path):
    whole, half, resumed = Configured(), Configured(), Configured()
    half.load_state_dict(whole.state_dict())
    pl.Trainer(max_steps=6, enable_checkpointing=False, **QUIET).fit(whole)
    trainer = pl.Trainer(max_steps=4, enable_checkpointing=False, **QUIET)
    trainer.fit(half)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer = pl.Trainer(max_steps=6, enable_checkpointing=False, **QUIET)
    trainer.fit(resumed, ckpt_path=tmp_path / "half.ckpt")
    assert trainer.global_step == 6
    assert same(whole, resumed)


@pytest.mark.filterwarnings("ignore:.*")
def test_lightning_cli_builds_it_from_a_config(tmp_path, capsys):
    trainer = {**QUIET, "max_steps": 2, "default_root_dir": str(tmp_path), "enable_checkpointing": False}
    arguments = {
        "trainer": trainer,
        "optimizer": {
            "class_path": "lightning_spectral.SpectralNewton",
            "init_args": {"lr": 0.02, "alpha": 1.5, "damping": "auto", "adamw_betas": [0.9, 0.95], "update_rms": None},
        },
    }
    cli = LightningCLI(Plain, args={"fit": arguments}, save_config_callback=None)
    (optimizer,) = cli.trainer.optimizers
    assert isinstance(optimizer, SpectralNewton)
    assert cli.trainer.global_step == 2
    spectral, adamw = optimizer.param_groups
    assert (spectral["lr"], spectral["alpha"], spectral["update_rms"]) == (0.02, 1.5, None)
    assert adamw["betas"] == (0.9, 0.95)
    with pytest.raises(SystemExit):
        LightningCLI(Plain, args=["fit", "--optimizer.help=lightning_spectral.SpectralNewton"])
    printed = capsys.readouterr().out
    assert re.search(r"--optimizer\.(init_args\.)?max_gain\b", printed)
    assert "how many times the spectral norm" in " ".join(printed.split())


def test_steps_are_counted_on_the_cpu_wherever_the_weights_are():
    state = size_state(torch.empty(4, 6, device="meta"), whole_layout())
    assert (state["step"].device.type, state["mean_square"].device.type) == ("cpu", "meta")
