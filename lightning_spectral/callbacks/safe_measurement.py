"""`SafeMeasurement`: measure in the midst of training, and never end it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from lightning_spectral.distributed.process_group import Group
from lightning_spectral.errors import first_line
from lightning_spectral.isolation.interrupts import interruption
from lightning_spectral.measurement.loss import LossFunction
from lightning_spectral.measurement.pipeline import measure_noise_scale, run_measurement
from lightning_spectral.options import Options
from lightning_spectral.records.report import SpectralReport

logger = logging.getLogger(__name__)

T = TypeVar("T")


def attempt(measure: Callable[[], T], warn: Callable[[str], None], failure: str) -> T | None:
    """Return what ``measure`` returns; None after an error, of which it warns, ``failure`` first.

    Raises:
        BaseException: KeyboardInterrupt, SystemExit and the like, also where they surfaced as another error.
    """
    try:
        return measure()
    except Exception as error:
        # A failed probe must not end training; an interrupt that surfaced as another error must.
        if end := interruption(error):
            raise end from error
        warn("; ".join([f"{failure}: {first_line(error)}", *getattr(error, "__notes__", ())]))
        return None


class SafeMeasurement:
    """Measure a module; what fails is warned of and missing, and only an interrupt goes on."""

    def __init__(self, options: Options, loss_fn: LossFunction | None, warn: Callable[[str], None]) -> None:
        self.options, self.loss_fn, self.warn = options, loss_fn, warn
        self._chosen = ""
        self._has_measured = False

    def report(
        self,
        trainer: Any,
        module: Any,
        batches: Sequence[Any],
        *,
        batch_idx: int,
        step: int,
        n_batches: int,
        group: Group,
    ) -> SpectralReport | None:
        """Return the report of a measurement before a step; None if it failed."""
        where: dict[str, Any] = {"batch_idx": batch_idx, "n_batches": n_batches, "group": group}
        # Once is enough.
        where["compare_modes"] = not self._has_measured
        measure = partial(run_measurement, module, batches, self.options, self.loss_fn, **where)
        if (report := attempt(measure, self.warn, f"nothing was measured at step {step}")) is None:
            return None
        self._has_measured = True
        report = report.at(step=step, epoch=trainer.current_epoch)
        for text in report.problems():
            self.warn(text)
        if report.chosen not in ("", self._chosen):
            logger.info("step %d, curvature by %s", step, report.chosen)
        self._chosen = report.chosen
        return report

    def noise_scale(self, module: Any, batch_idx: int, group: Group, batches: Sequence[Any]) -> float:
        """Return the noise scale of the gradient of batches; NaN where it cannot be told."""
        where: dict[str, Any] = {"batch_idx": batch_idx, "group": group}
        measure = partial(measure_noise_scale, module, batches, self.options, self.loss_fn, **where)
        # The measurement that follows says what is wrong.
        noise_scale = attempt(measure, lambda text: None, "")
        return float("nan") if noise_scale is None else noise_scale
