"""Swapping the optimizer: before training, in mid-run, through checkpoints, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, TensorDataset

from lightning_spectral import SpectralNewton, SpectralProbe, SpectralWarning, SwapOptimizer
from lightning_spectral.optim.carry_over import rebind_scheduler

pytestmark = pytest.mark.filterwarnings("ignore::lightning_spectral.errors.SpectralWarning")

STEPS = 12


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))


class Module(pl.LightningModule):
    """Trains with an optimizer and a scheduler made by functions."""

    def __init__(self, optimizer=lambda p: SGD(p, lr=0.1, momentum=0.9), scheduler=None, interval="step"):
        super().__init__()
        self.net = net()
        self.make_optimizer, self.make_scheduler, self.interval = optimizer, scheduler, interval
        self.trail = []

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, *args):
        optimizer = self.trainer.optimizers[0]
        self.trail.append((type(optimizer).__name__, [group["lr"] for group in optimizer.param_groups]))

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": self.interval},
        }


def data():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 6, generator=generator), torch.randint(0, 5, (8,), generator=generator)
    # The same batch again and again, so that a resume cannot take another one.
    return DataLoader(TensorDataset(x.repeat(4, 1), y.repeat(4)), batch_size=8)


def fit(module, callbacks=(), steps=STEPS, ckpt_path=None, **options):
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, callbacks=list(callbacks), logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, **{"enable_checkpointing": False, **options},
    )  # fmt: skip
    trainer.fit(module, data(), ckpt_path=ckpt_path)
    return trainer


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def adamw(p):
    return AdamW(p, lr=0.02, weight_decay=0)


def cosine(optimizer):
    return schedulers.CosineAnnealingLR(optimizer, STEPS)


SCHEDULERS = {
    "cosine": cosine,
    "step": lambda o: schedulers.StepLR(o, 3, gamma=0.5),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one_cycle": lambda o: schedulers.OneCycleLR(o, max_lr=o.defaults["lr"], total_steps=STEPS, cycle_momentum=False),
    "warmup": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=4), schedulers.ExponentialLR(o, 0.9)], milestones=[4]
    ),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 3), schedulers.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("name", [None, *SCHEDULERS])
def test_a_swap_before_training_is_training_with_the_other_optimizer(name):
    scheduler = SCHEDULERS.get(name)
    direct, swapped = Module(adamw, scheduler), Module(scheduler=scheduler)
    fit(direct)
    fit(swapped, [SwapOptimizer("torch.optim.AdamW", {"lr": 0.02})])
    assert [kind for kind, _ in swapped.trail] == ["AdamW"] * STEPS
    for (_, a), (_, b) in zip(direct.trail, swapped.trail, strict=True):
        assert a == pytest.approx(b, rel=1e-12)
    for a, b in zip(weights(direct), weights(swapped), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_swap_in_mid_run_keeps_the_position_of_the_learning_rate(name):
    scheduler = SCHEDULERS[name]
    whole, swapped = Module(adamw, scheduler), Module(scheduler=scheduler)
    fit(whole)
    fit(swapped, [SwapOptimizer("AdamW", {"lr": 0.02}, at_step=5)])
    assert [kind for kind, _ in swapped.trail] == ["SGD"] * 5 + ["AdamW"] * 7
    for (_, a), (_, b) in list(zip(whole.trail, swapped.trail, strict=True))[5:]:
        assert a == pytest.approx(b, rel=1e-12)


def test_a_swap_at_an_epoch_and_between_windows_of_accumulation():
    module = Module()
    fit(module, [SwapOptimizer("AdamW", at_epoch=2)])
    assert [kind for kind, _ in module.trail] == ["SGD"] * 8 + ["AdamW"] * 4
    module = Module()
    fit(module, [SwapOptimizer("AdamW", at_step=3)], accumulate_grad_batches=2, steps=6)
    assert [kind for kind, _ in module.trail] == ["SGD"] * 6 + ["AdamW"] * 6


def test_spectral_newton_gets_its_groups_with_rates_of_their_own():
    module = Module(scheduler=cosine)
    trainer = fit(module, [SwapOptimizer(init_args={"lr": 0.02, "adamw_lr": 0.004})], steps=4)
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is SpectralNewton
    assert [group["name"] for group in optimizer.param_groups] == ["dense", "adamw"]
    assert optimizer.param_groups[0]["param_names"] == ["net.0.weight"]
    direct = SpectralNewton(SpectralNewton.groups(module), lr=0.02, adamw_lr=0.004)
    expected = schedulers.CosineAnnealingLR(direct, STEPS)
    for _, lrs in module.trail:
        direct.step()
        expected.step()
        assert lrs == pytest.approx([group["lr"] for group in direct.param_groups], rel=1e-9)


class Grouped(Module):
    """Decays matrices alone, with a rate of their own."""

    groups = ({"lr": 1e-3, "weight_decay": 0.1}, {"lr": 1e-4, "weight_decay": 0.0})

    def configure_optimizers(self):
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim < 2]
        of_matrices, of_vectors = self.groups
        optimizer = AdamW([{"params": matrices, **of_matrices}, {"params": vectors, **of_vectors}])
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine(optimizer), "interval": "step"}}


def rates(optimizer, module):
    """(rate, decay) of the matrices and of the vectors, each the same for all."""
    found = {True: set(), False: set()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found[parameter.ndim > 1].add((round(group["lr"], 12), group["weight_decay"]))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.parameters()))
    assert [len(values) for values in found.values()] == [1, 1]
    return found[True].pop(), found[False].pop()


@pytest.mark.parametrize("at_step", [None, 2])
@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop", "lightning_spectral.SpectralNewton"])
@pytest.mark.parametrize(
    ("init_args", "expected"),
    [
        ({}, ((1e-3, 0.1), (1e-4, 0.0))),
        ({"lr": 0.02}, ((0.02, 0.1), (0.002, 0.0))),
        ({"weight_decay": 0.3}, ((1e-3, 0.3), (1e-4, 0.0))),
    ],
    ids=["nothing", "lr", "weight_decay"],
)
def test_what_was_configured_for_each_parameter_is_kept(at_step, optimizer, init_args, expected):
    module = Grouped()
    (new,) = fit(module, [SwapOptimizer(optimizer, init_args, at_step=at_step)], steps=4).optimizers
    assert rates(new, module) == expected


def test_no_weight_decay_is_kept_as_it_is():
    class Undecayed(Module):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    for init_args, decay in ({}, 0), ({"weight_decay": 0.2}, 0.2):
        (new,) = fit(Undecayed(), [SwapOptimizer(init_args=init_args)], steps=1).optimizers
        assert {group["weight_decay"] for group in new.param_groups} == {decay}


def test_a_schedule_scales_the_rates_of_all_groups():
    plain, swapped = Grouped(scheduler=cosine), Grouped(scheduler=cosine)
    fit(plain)
    fit(swapped, [SwapOptimizer("SGD", {"lr": 0.02}, at_step=5)])
    for (_, before), (kind, after) in list(zip(plain.trail, swapped.trail, strict=True))[5:]:
        assert kind == "SGD"
        assert after == pytest.approx([20 * rate for rate in before], rel=1e-9)


def test_an_argument_of_one_update_counts_for_its_groups_alone():
    module = Grouped()
    swap = SwapOptimizer(init_args={"lr": 0.02, "adamw_lr": 0.005, "adamw_weight_decay": 0.2})
    (new,) = fit(module, [swap], steps=2).optimizers
    found = {(g["update"], g["lr"], g["weight_decay"]) for g in new.param_groups}
    assert found == {("spectral", 0.02, 0.1), ("adamw", 0.005, 0.2), ("adamw", 0.0005, 0.0)}


def test_both_optimizers_and_their_rates_are_told(monkeypatch):
    told = []
    monkeypatch.setattr("lightning_spectral.callbacks.swap.log_above_bar", lambda trainer, text: told.append(text))
    fit(Grouped(), [SwapOptimizer("SGD", {"lr": 0.1})], steps=1)
    assert told == [
        "SwapOptimizer, before training: SGD (lr 0.1, weight_decay 0.1; lr 0.01, weight_decay 0) takes the place of "
        "AdamW (lr 0.001, weight_decay 0.1; lr 0.0001, weight_decay 0)"
    ]


class Betas(Grouped):
    groups = ({"betas": (0.9, 0.95)}, {"betas": (0.8, 0.95)})


class Decayed(Module):
    def configure_optimizers(self):
        return AdamW(self.parameters(), weight_decay=0.3)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            Betas,
            r"SGD does not take over what AdamW was configured with: betas = \(0.9, 0.95\), \(0.8, 0.95\); ",
        ),
        (Decayed, r"Rprop does not take over what AdamW was configured with: weight_decay = 0.3; give it in SwapOpt"),
    ],
)
def test_what_has_no_counterpart_is_warned_about_by_name(module, message):
    with pytest.warns(SpectralWarning, match=message):
        fit(module(), [SwapOptimizer(message.partition(" ")[0])], steps=1)


class Newton(Module):
    def configure_optimizers(self):
        return SpectralNewton(SpectralNewton.groups(self), lr=0.1)


@pytest.mark.parametrize(
    ("module", "callbacks"),
    [
        (Module, lambda: [SwapOptimizer(), SpectralProbe(swap_optimizer=True, every_n_steps=9, top_k=3)]),
        (Newton, lambda: [SwapOptimizer()]),
    ],
    ids=["two swaps", "configured"],
)
def test_a_swap_for_the_optimizer_that_is_there_is_told_in_words(module, callbacks, recwarn):
    fit(module(), callbacks(), steps=1)
    (text,) = [text for w in recwarn if "SpectralNewton" in (text := str(w.message))]
    assert text == (
        "SwapOptimizer puts a SpectralNewton of default options, but for its rates, in place of a SpectralNewton, "
        "which was configured or put there by another SwapOptimizer, as by that of SpectralProbe(swap_optimizer=True); "
        "one of them is enough"
    )


def test_what_an_optimizer_sets_of_its_groups_is_not_what_was_configured(recwarn):
    fit(Newton(), [SwapOptimizer("SGD")], steps=1)
    assert [text for w in recwarn if "does not take over" in (text := str(w.message))] == []


def test_what_is_frozen_at_the_swap_is_still_optimized_when_it_thaws():
    module = Module()
    module.net[0].weight.requires_grad_(False)
    (new,) = fit(module, [SwapOptimizer()], steps=1).optimizers
    assert sum(len(group["params"]) for group in new.param_groups) == 4
    assert not module.net[0].weight.requires_grad


class HeadOnly(Module):
    def configure_optimizers(self):
        return SGD(self.net[2].parameters(), lr=0.1)


def test_only_what_was_optimized_is_optimized():
    module = HeadOnly()
    body = module.net[0].weight.detach().clone()
    for callback in (SwapOptimizer(), SwapOptimizer("AdamW")):
        trainer = fit(module, [callback], steps=2)
        held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        assert held == {id(p) for p in module.net[2].parameters()}
    assert torch.equal(module.net[0].weight, body)


@pytest.mark.parametrize("returned", ["list", "pair", "tuple", "dicts"])
def test_every_form_of_configured_optimizers(returned):
    class Form(Module):
        def configure_optimizers(self):
            optimizer = SGD(self.parameters(), lr=0.1)
            scheduler = cosine(optimizer)
            return {
                "list": [optimizer],
                "pair": ([optimizer], [{"scheduler": scheduler, "interval": "step"}]),
                "tuple": (optimizer,),
                "dicts": [{"optimizer": optimizer, "lr_scheduler": scheduler}],
            }[returned]

    module = Form()
    trainer = fit(module, [SwapOptimizer("AdamW", {"lr": 0.02})])
    assert type(trainer.optimizers[0]) is AdamW
    if returned == "pair":
        assert module.trail[5][1][0] < module.trail[0][1][0]
    assert "configure_optimizers" not in module.__dict__


@dataclass
class Halving:
    """Scheduler of the user's own, which is a container of the optimizer as well."""

    optimizer: Any
    steps: int = 0

    def step(self):
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] /= 2

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def test_a_scheduler_that_is_a_dataclass_follows():
    class Own(Module):
        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step()

    module = Own(scheduler=Halving)
    fit(module, [SwapOptimizer("AdamW", {"lr": 0.02})], steps=3)
    assert module.trail == [("AdamW", [0.02 / 2**k]) for k in range(1, 4)]


def test_plateau_and_floors_follow():
    old, new = SGD(net().parameters(), lr=0.1), None
    parameters = list(old.param_groups[0]["params"])
    new = AdamW([{"params": parameters[:2], "lr": 0.02}, {"params": parameters[2:], "lr": 0.01}])
    plateau = schedulers.ReduceLROnPlateau(old, factor=0.1, patience=0, min_lr=0.05)
    rebind_scheduler(plateau, old, new)
    for value in (1.0, 2.0, 3.0, 4.0):
        plateau.step(value)
    assert [group["lr"] for group in new.param_groups] == pytest.approx([0.01, 0.005])
    old, new = SGD(parameters, lr=0.1), AdamW(parameters, lr=0.02)
    floor = schedulers.CosineAnnealingLR(old, 4, eta_min=0.05)
    rebind_scheduler(floor, old, new)
    for _ in range(4):
        new.step()
        floor.step()
    assert new.param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_scheduled_momentum_that_the_new_optimizer_does_not_have():
    parameters = list(net().parameters())
    old = SGD(parameters, lr=0.1, momentum=0.9)
    cycle = schedulers.OneCycleLR(old, max_lr=0.1, total_steps=9)
    with pytest.raises(ValueError, match="OneCycleLR also schedules 'momentum', which groups 0 of AdamW do not have; "):
        rebind_scheduler(schedulers.ChainedScheduler([cycle]), old, AdamW(parameters))
    new = SGD(parameters, lr=0.5, momentum=0.5)
    rebind_scheduler(cycle, old, new)
    assert new.param_groups[0]["max_lr"] == pytest.approx(0.5)
    assert new.param_groups[0]["max_momentum"] == 0.95
    cycle.step()
    assert new.param_groups[0]["momentum"] < 0.95


@pytest.mark.parametrize(
    ("optimizer", "at_step"), [("AdamW", None), ("AdamW", 5), ("lightning_spectral.SpectralNewton", 5)]
)
@pytest.mark.parametrize("stop", [4, 8])
def test_resume_on_both_sides_of_the_swap_is_bit_identical(tmp_path, optimizer, at_step, stop):
    def callback():
        return SwapOptimizer(optimizer, {"lr": 0.02}, at_step=at_step)

    whole = Module(scheduler=cosine)
    fit(whole, [callback()])
    head = Module(scheduler=cosine)
    fit(head, [callback()], steps=stop).save_checkpoint(tmp_path / "a.ckpt")
    tail = Module(scheduler=cosine)
    fit(tail, [callback()], ckpt_path=tmp_path / "a.ckpt")
    assert head.trail + tail.trail == whole.trail
    assert same(weights(whole), weights(tail))


def test_a_checkpoint_of_the_configured_optimizer(tmp_path):
    fit(Module(), steps=4).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"holds the state of the configured optimizer, with which AdamW .* at_step=4"):
        fit(Module(), [SwapOptimizer("AdamW")], ckpt_path=tmp_path / "a.ckpt")
    module = Module()
    fit(module, [SwapOptimizer("AdamW", at_step=4)], ckpt_path=tmp_path / "a.ckpt")
    assert [kind for kind, _ in module.trail] == ["AdamW"] * 8


def test_a_checkpoint_of_another_swap(tmp_path):
    fit(Module(), [SwapOptimizer("AdamW")], steps=4).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"holds the state of torch.optim.adamw.AdamW, and .* torch.optim.sgd.SGD"):
        fit(Module(), [SwapOptimizer("SGD")], ckpt_path=tmp_path / "a.ckpt")


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Two(Module):
    def configure_optimizers(self):
        return [SGD(self.net[0].parameters(), lr=0.1), SGD(self.net[2].parameters(), lr=0.1)]


class NoOptimizer(Module):
    def configure_optimizers(self):
        return None


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Manual, "SwapOptimizer needs automatic optimization, and Manual optimizes manually"),
        (Two, "SwapOptimizer swaps one optimizer, and configure_optimizers gave 2"),
        (NoOptimizer, "SwapOptimizer swaps one optimizer, and configure_optimizers gave none"),
    ],
)
def test_what_is_refused(module, message):
    made = module()
    with pytest.raises(ValueError, match=message):
        fit(made, [SwapOptimizer("AdamW")], steps=1)


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_own_the_parameters_are_refused(name):
    trainer = type("Trainer", (), {"strategy": type(name, (), {})()})()
    with pytest.raises(ValueError, match=f"SwapOptimizer cannot swap under {name}"):
        SwapOptimizer("AdamW").setup(trainer, Module(), "fit")
    SwapOptimizer("AdamW").setup(trainer, Module(), "validate")


def test_spectral_newton_is_known_by_its_name():
    assert SwapOptimizer("SpectralNewton").optimizer_class is SpectralNewton


def test_a_class_will_do():
    assert SwapOptimizer(AdamW).optimizer_class is AdamW


def test_a_swap_that_never_came_is_told():
    with pytest.warns(SpectralWarning, match="training ended before at_step=500: no optimizer was"):
        fit(Module(), [SwapOptimizer(AdamW, at_step=500)], steps=3)
    with pytest.warns(SpectralWarning, match="training ended before at_epoch=9: no optimizer was"):
        fit(Module(), [SwapOptimizer(AdamW, at_epoch=9)], steps=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optimizer": torch.optim.SGD([torch.zeros(2)])},
            "optimizer must be a class of optimizers, got an object of SGD$",
        ),
        ({"optimizer": nn.Linear}, "optimizer must be a class of optimizers, got <class 'torch.nn"),
        (
            {"optimizer": "torch.optim.Nothing"},
            "optimizer must be the import path of a class, or a name in torch.optim",
        ),
        ({"optimizer": "no_such_module.Thing"}, "optimizer must be the import path of a class"),
        ({"optimizer": "torch.nn.Linear"}, "optimizer must be a class of optimizers, got 'torch.nn.Linear'"),
        ({"at_step": 3, "at_epoch": 1}, "give at_step or at_epoch, not both"),
        ({"at_step": -1}, "at_step must be None or a whole number of at least 0, got -1"),
        ({"at_epoch": 0.5}, "at_epoch must be None or a whole number of at least 0, got 0.5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SwapOptimizer(**options)


def test_a_second_fit_swaps_again_and_the_module_is_as_it_was():
    module, callback = Module(), SwapOptimizer("AdamW", at_step=2)
    for _ in range(2):
        module.trail.clear()
        fit(module, [callback], steps=4)
        assert [kind for kind, _ in module.trail] == ["SGD"] * 2 + ["AdamW"] * 2
    assert "configure_optimizers" not in module.__dict__
    assert type(copy.deepcopy(module).configure_optimizers()) is SGD


def test_an_own_configure_optimizers_on_the_instance_comes_back():
    module = Module()
    own = module.__dict__["configure_optimizers"] = lambda: AdamW(module.parameters())
    fit(module, [SwapOptimizer("SGD", {"lr": 0.1})], steps=2)
    assert module.trail[0][0] == "SGD"
    assert module.__dict__["configure_optimizers"] is own


def test_the_probes_short_form(tmp_path):
    module = Module(scheduler=cosine)
    trainer = fit(module, [SpectralProbe(swap_optimizer=True, every_n_steps=4, top_k=3)], steps=6)
    assert type(trainer.optimizers[0]) is SpectralNewton
    assert "configure_optimizers" not in module.__dict__
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    whole, tail = Module(scheduler=cosine), Module(scheduler=cosine)
    fit(whole, [SpectralProbe(swap_optimizer=True, every_n_steps=4, top_k=3)])
    fit(tail, [SpectralProbe(swap_optimizer=True, every_n_steps=4, top_k=3)], ckpt_path=tmp_path / "a.ckpt")
    assert same(weights(whole), weights(tail))
    fit(Module(), [SpectralProbe(every_n_steps=4, top_k=3)], steps=4).save_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="holds the state of the configured optimizer, with which SpectralNewton"):
        fit(Module(), [SpectralProbe(swap_optimizer=True)], ckpt_path=tmp_path / "b.ckpt")


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("at_step", [None, 3])
def test_a_swapped_in_optimizer_takes_the_probes_exponents(at_step):
    swap = SwapOptimizer(SpectralNewton, {"lr": 0.02, "alpha": "probe"}, at_step=at_step)
    module, probe = Module(), SpectralProbe(every_n_steps=2, top_k=5)
    (optimizer,) = fit(module, [swap, probe], steps=7).optimizers
    name = "net.0.weight"
    measured = [report.layers[name].alpha.exponent for report in probe.history if report.step >= (at_step or 0)]
    measured = [min(max(alpha, 0.5), 2.0) for alpha in measured]
    average = measured[0]
    for alpha in measured[1:]:
        average = 0.5 * average + 0.5 * alpha
    assert len(measured) > 1
    assert optimizer.alpha_of(module.net[0].weight) == pytest.approx(round(average, 1))
