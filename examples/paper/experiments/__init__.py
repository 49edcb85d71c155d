"""The experiments of the paper: functions of the outcomes of trainings that return a `Finding`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from examples.paper.experiments.ablations import layer_norm, output_size, task
from examples.paper.experiments.alphas import architectures, dynamics, transfer_identity
from examples.paper.experiments.control import scalar_control
from examples.paper.experiments.factors import alignment, concentration, kronecker
from examples.paper.experiments.noise import sampling_noise
from examples.paper.experiments.spectra import participation, rank_models, width_scaling
from examples.paper.finding import Finding, Outcomes

EXPERIMENTS: Mapping[str, Callable[[Outcomes], Finding]] = {
    "architectures": architectures,
    "sampling_noise": sampling_noise,
    "transfer_identity": transfer_identity,
    "participation": participation,
    "width_scaling": width_scaling,
    "dynamics": dynamics,
    "layer_norm": layer_norm,
    "output_size": output_size,
    "task": task,
    "rank_models": rank_models,
    "kronecker": kronecker,
    "alignment": alignment,
    "concentration": concentration,
    "scalar_control": scalar_control,
}
"""Name -> experiment, in the order of the page."""
