"""Trainers of two processes that share SpectralNewton's matrices with nothing set; run in each of them."""

import logging

import pytorch_lightning as pl
from optimizer_ddp import net
from optimizer_fsdp import wholes
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import optim, randn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from world import largest_difference, same_everywhere

from lightning_spectral import SpectralNewton, SwapOptimizer

STEPS = 4


class Lit(pl.LightningModule):
    def __init__(self, own=True):
        super().__init__()
        self.own, self.net = own, None

    def configure_model(self):
        if self.net is None:
            self.net = net()
            if isinstance(self.trainer.strategy, ModelParallelStrategy):
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        if self.own:
            return SpectralNewton(SpectralNewton.groups(self), lr=1e-2)
        return optim.SGD(self.parameters(), lr=0.1)


def sharded():
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def fit(strategy, folder, steps=STEPS, own=True, callbacks=(), **options):
    module = Lit(own)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=steps, max_epochs=-1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=folder, callbacks=list(callbacks),
    )  # fmt: skip
    # One sample over and over: with which of them a resumed loader goes on is Lightning's business.
    trainer.fit(module, DataLoader(randn(1, 3, 6, 6).repeat(32, 1, 1, 1), 4), **options)
    optimizer = trainer.optimizers[0]
    while not isinstance(optimizer, SpectralNewton):
        optimizer = optimizer.optimizer
    return trainer, module, optimizer


def check_ddp(rank, n, folder):
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for own, callbacks in ((True, []), (False, [SwapOptimizer()])):
        pl.seed_everything(0, verbose=False)
        _, module, optimizer = fit("ddp", folder, own=own, callbacks=callbacks)
        assert optimizer.sharing_processes == 2
        assert same_everywhere(list(module.parameters()))


def check_model_parallel(rank, n, folder):
    """Saved after two steps and resumed, and with the optimizer swapped in."""
    pl.seed_everything(0, verbose=False)
    _, whole, optimizer = fit(sharded(), folder)
    assert type(next(iter(whole.parameters()))).__name__ == "DTensor"
    momentum = optimizer.state[whole.net.dense[0].weight]["momentum_buffer"]
    assert momentum.to_local().numel() == momentum.numel() // 2
    pl.seed_everything(0, verbose=False)
    trainer, _, _ = fit(sharded(), folder, steps=2)
    trainer.save_checkpoint(folder / "half.ckpt")
    pl.seed_everything(0, verbose=False)
    _, resumed, _ = fit(sharded(), folder, ckpt_path=folder / "half.ckpt")
    assert largest_difference(wholes(whole), wholes(resumed)) == 0
    pl.seed_everything(0, verbose=False)
    swap = {"lr": 1e-2, "weight_decay": 1e-2}
    _, swapped, _ = fit(sharded(), folder, own=False, callbacks=[SwapOptimizer(init_args=swap)])
    assert largest_difference(wholes(whole), wholes(swapped)) == 0


BY_TWO = [check_ddp, check_model_parallel]
