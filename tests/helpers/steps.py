"""The step of an optimizer by other means: the loss along it as a function of a factor on each parameter's part."""

import copy

import pytorch_lightning as pl
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


def derivatives(loss, module, before, after):
    """Return g . Delta, the matrix of Delta_p^T H_pq Delta_q, the losses before and after, and the names p, in float64.

    loss: module, parameters and buffers by name -> scalar. before, after: state dicts.
    """
    module = copy.deepcopy(module).double()
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    start = {name: value.double() if value.is_floating_point() else value for name, value in before.items()}
    delta = {name: after[name].double() - start[name] for name in names}

    def moved(factors):
        state = start | {name: start[name] + t * delta[name] for name, t in zip(names, factors, strict=True)}
        return loss(lambda *inputs: functional_call(module, state, inputs))

    zero, one = torch.zeros(len(names), dtype=torch.float64), torch.ones(len(names), dtype=torch.float64)
    # No other attention has second derivatives.
    with sdpa_kernel([SDPBackend.MATH]):
        slope = torch.autograd.functional.jacobian(moved, zero).sum()
        matrix = torch.autograd.functional.hessian(moved, zero)
    return float(slope), matrix, float(moved(zero)), float(moved(one)), names


class StepRecorder(pl.Callback):
    """Keeps the state before and after each optimizer step, and its micro-batches, the first one apart."""

    def __init__(self):
        self.steps, self.global_step = [], None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step != self.global_step:
            self.global_step = trainer.global_step
            self.steps.append({"before": self.state(module), "batch": [part.clone() for part in batch], "all": []})
        self.steps[-1]["all"].append([part.clone() for part in batch])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step != self.global_step:
            self.steps[-1]["after"] = self.state(module)

    def state(self, module):
        return {name: value.clone() for name, value in module.state_dict().items()}
