"""What a benchmark was run on."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import lightning_spectral


def environment(**own: Any) -> dict[str, Any]:
    """Versions and machine, and what a benchmark tells of itself."""
    return {
        "lightning_spectral": lightning_spectral.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        **own,
    }
