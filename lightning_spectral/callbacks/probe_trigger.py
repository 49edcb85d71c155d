"""`ProbeTrigger`: when a probe is due, and with which batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lightning_spectral._validation import positive_int
from lightning_spectral.callbacks._lightning import (
    TrainingPass,
    averages_after,
    optimizer_steps,
    repeats_batch,
    to_device,
    total_steps,
)
from lightning_spectral.callbacks.batch_source import FIRST_BATCHES, BatchSource
from lightning_spectral.callbacks.time_budget import MAX_OVERHEAD, TimeBudget, too_short_for_two
from lightning_spectral.distributed.process_group import SINGLE_PROCESS, Group
from lightning_spectral.errors import text_of
from lightning_spectral.isolation.batch_tree import batch_size
from lightning_spectral.isolation.devices import synchronize
from lightning_spectral.measurement.gradient_samples import samples_for_aim
from lightning_spectral.numerics.statistics import median
from lightning_spectral.records.report import SpectralReport


class ProbeTrigger:
    """Give the batches of a probe when it is due and they are complete, on all ranks at the same step.

    Attributes:
        off: reason why there are no probes in this run; empty while there are.
        group: ranks that measure together.
        is_resumed: True in a run that goes on from a checkpoint with probes.
        is_pending: True from when a probe is due until it is done; it may wait for its batches.
    """

    def __init__(
        self, every_n_steps: int | None, budget: TimeBudget, source: BatchSource, warn: Callable[[str], None]
    ) -> None:
        self.every_n_steps = None if every_n_steps is None else positive_int("every_n_steps", every_n_steps)
        self.budget, self.source, self.warn = budget, source, warn
        self.reset()

    def reset(self) -> None:
        """Begin a run, before a checkpoint is loaded."""
        self.off = self._batch_error = ""
        self.group: Group = SINGLE_PROCESS
        self.is_resumed = self.is_pending = self._is_over = False
        self._first_step = 0
        self._step: int | None = None
        self._has_aim = False
        self._in_epoch = math.inf
        self._noise_scale = self._affordable = math.nan
        self._seconds = self._started = 0.0

    def turn_off(self, reason: str) -> None:
        """Probe no more in this run, and warn."""
        self.off = reason
        self.warn(f"SpectralProbe is off: {reason}")

    def prepare(self, trainer: Any, module: Any, probe: Any) -> None:
        """Drop the last run's batches; warn of options that contradict each other, and of callbacks after the probe."""
        if self.is_resumed and self.source.choice == "fixed":
            self.warn(
                "batch='fixed' keeps the first batches after the resume, not those before it; "
                "a DataLoader as batch gives the same ones"
            )
        self.source.reset()
        self.source.check_loader()
        every, n_batches = self.every_n_steps, self.source.takes_per_probe
        if every is not None and self.budget.max_overhead != MAX_OVERHEAD:
            self.warn(
                f"max_overhead={self.budget.max_overhead:g} has no effect beside every_n_steps={every}, "
                "which probes at fixed steps whatever it costs; give one of them"
            )
        if every is not None and every * trainer.accumulate_grad_batches < n_batches:
            self.warn(
                f"a probe takes n_batches={n_batches} batches of training, more than there are in "
                f"every_n_steps={every} steps, so probes come less often"
            )

        if self.budget.min_probes and (later := averages_after(trainer, probe, module)):
            self.warn(
                f"{later[0]} stands after the probe in the Trainer's callbacks, so the probe of the final weights sees "
                "those that are not averaged; put the probe after it to measure the average"
            )

    def start(self, trainer: Any) -> None:
        """Start the clock, and turn off on all ranks if one of them is."""
        for rank, reason in enumerate(self.group.all_gather_object(self.off)):
            if reason and not self.off:
                self.turn_off(f"rank {rank}: {reason}")
        self._first_step = optimizer_steps(trainer)
        self.budget.total_steps = total_steps(trainer)
        self.budget.start(self._first_step)
        in_epoch = trainer.num_training_batches
        if self._of_one_step(trainer) and in_epoch < self.source.n_batches:
            self.warn(
                f"n_batches={self.source.n_batches} batches of one optimizer step are more than an epoch has; a probe "
                f"takes the {in_epoch} of an epoch"
            )
            self.source.n_batches = int(in_epoch)
        # A second pass over an epoch's samples brings none that are new.
        self.source.most_batches = self._in_epoch = max(in_epoch, self.source.n_batches)

    def _of_one_step(self, trainer: Any) -> bool:
        """Return whether a probe takes batches of one optimizer step alone."""
        return bool(1 < self.source.takes_per_probe <= trainer.accumulate_grad_batches)

    def end(self, trainer: Any) -> None:
        """Warn when training has ended without a second probe, or while the first was waiting for its batches."""
        if self.off:
            return
        if self.is_pending and not self.budget.probes:
            self.warn(
                "training ended before there were the batches that a probe takes "
                f"({self.source.describe_size()}): there was none"
            )
        elif self.every_n_steps is None and self.budget.probes == 1 and not trainer.fast_dev_run:
            self.warn(too_short_for_two(self.budget))

    def is_due(self, step: int) -> bool:
        """Return whether to probe before this step by the schedule; the same on all ranks."""
        if self.every_n_steps is None:
            return self.budget.is_due(step, lambda wait: self.group.all_gather_object(wait)[0])
        return step % self.every_n_steps == 0

    def enter_step(self, trainer: Any) -> bool:
        """Return whether this micro-batch is the first of its optimizer step, and record the step."""
        step = optimizer_steps(trainer)
        if step == self._step:
            return False
        self._step = step
        self.budget.record_step(step)
        every, source = self.every_n_steps, self.source
        # How many steps so many samples take is known of the batches alone.
        if every is not None and self.is_pending and step % every == 0 and source.collects_samples:
            self.warn(
                f"a probe takes {source.describe_size()} of training, more than there are in every_n_steps={every} "
                "steps, so probes come less often"
            )
        if self.every_n_steps is None and step >= self.budget.next_look:
            self.budget.total_steps = total_steps(trainer, self.budget.step_seconds(step))
        if self.source.samples is None and self._of_one_step(trainer):
            # An epoch's end cut the last step's micro-batches short; a probe takes those of one step.
            self.source.reset()
        return True

    def batches(
        self, trainer: Any, module: Any, batch: Any, noise_scale: Callable[[Sequence[Any]], float]
    ) -> Sequence[Any] | None:
        """Return the batches of the probe that is due; None while none is, or its batches are incomplete."""
        if not (self.is_pending or self.source.collects):
            return None
        synchronize(module.parameters())
        self._started = self.budget.clock()
        if self.is_pending and self.source.follows_noise and not self._has_aim:
            self._aim(trainer, module, batch, noise_scale)
        batches = self._collect(trainer, module, batch)
        if not (self.is_pending and self._all_have(batches)):
            self._seconds += self.budget.clock() - self._started
            return None
        return [] if self.group.size > 1 and repeats_batch(trainer) else batches

    def final_batches(
        self, trainer: Any, module: Any, noise_scale: Callable[[Sequence[Any]], float]
    ) -> Sequence[Any] | None:
        """Return the batches of the probe of the final weights, when training ends; None if there is to be none.

        In place of the batches that training would go on with, they are the first of a further pass over its data.
        """
        step = optimizer_steps(trainer)
        if self.off or step <= self._first_step:
            return None
        self.budget.record_step(step)
        if not self.budget.min_probes or not self._has_room():
            return None
        reading = TrainingPass(trainer) if self.source.choice == "train" else None
        if not all(self.group.all_gather_object(reading is None or reading.ends)):
            self.warn(
                "no probe of the final weights: it reads the training data once more, and a stream without a length "
                "may have stopped and never give another batch; batch=DataLoader(...) measures them on other data"
            )
            return None
        self.is_pending = self._is_over = True
        # One that was collecting batches begins anew, with those of the final weights.
        self._has_aim = False
        if reading is not None:
            self.source.read(reading, trainer.num_training_batches)
        return self.batches(trainer, module, None, noise_scale)

    def _has_room(self) -> bool:
        """Return whether the final weights are measured: at any cost at fixed steps, or as the probe that is due."""
        if self.every_n_steps is not None or self.is_pending:
            return True
        return bool(self.group.all_gather_object(self.budget.has_room())[0])

    def _aim(self, trainer: Any, module: Any, batch: Any, noise_scale: Callable[[Sequence[Any]], float]) -> None:
        """Have the probe that begins take as many samples as the noise of its first batch or of the last probe asks."""
        self._has_aim = True
        own = math.nan
        first: Sequence[Any] | None = [batch]
        # A loader's batches are kept, and so many that the last probe's noise is known well.
        if self.source.choice == "train" or math.isnan(self._noise_scale):
            first = self._collect(trainer, module, batch) if self.source.is_read else first
            if not self._all_have(first):
                return
            own = noise_scale([] if self.group.size > 1 and repeats_batch(trainer) else first or [])
        size = (batch_size((first or [None])[0]) or 0) * self.group.size
        most = FIRST_BATCHES * size if math.isnan(self._affordable) else self._affordable
        # An epoch's end ends a step.
        per_step = min(trainer.accumulate_grad_batches, trainer.num_training_batches)
        most_batches = min(self._room(optimizer_steps(trainer)) * per_step, self._in_epoch)
        self.source.most_batches = max(most_batches, self.source.n_batches)
        self.source.aim(max((own, self._noise_scale), key=lambda scale: -1.0 if math.isnan(scale) else scale), most)

    def _room(self, step: int) -> float:
        """Return how many steps a probe may take to collect batches, the same on all ranks.

        The first is to have them before training ends. Any other that has not is that of the final weights.
        """
        budget = self.budget
        room = budget.room(step) if self.every_n_steps is None else self.every_n_steps
        if budget.last_step is None or not budget.min_probes:
            room = min(room, budget.total_steps - step)
        return float(self.group.all_gather_object(room)[0])

    def finish(self, module: Any, step: int, report: SpectralReport | None) -> None:
        """Record that the probe before this step is done; its noise tells how many samples the next one takes."""
        synchronize(module.parameters())
        self.budget.record_probe(step, self._seconds + self.budget.clock() - self._started)
        self.is_pending, self._seconds = False, 0.0
        self.source.finish()
        self._has_aim = False
        self.follow(report)

    def follow(self, report: SpectralReport | None) -> None:
        """Take note of a report's noise and cost: the next gradient may cost as much as its curvature did."""
        if report is None or not self.source.follows_noise or not report.n_samples:
            return
        own = report.gradient_seconds, report.seconds - report.gradient_seconds
        gradient_seconds, other_seconds = self.group.all_gather_object(own)[0]
        per_sample = max(gradient_seconds, 1e-9) / report.n_samples
        self._noise_scale = median(layer.gradient_noise.noise_scale for layer in report.layers.values())
        self._affordable = other_seconds / per_sample + (report.curvature_samples or 0)
        samples = samples_for_aim(self._noise_scale, self.source.gradient_samples_max)
        if samples is not None:
            self.budget.expect_more(per_sample * (min(samples, self._affordable) - report.n_samples))

    def state_dict(self) -> dict[str, Any]:
        """Return the schedule and its state."""
        return {"every_n_steps": self.every_n_steps, "budget": self.budget.state_dict(), "collecting": self.is_pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a probe, and warn where its schedule is not this one's."""
        every = state_dict.get("every_n_steps", self.every_n_steps)
        if every != self.every_n_steps:
            self.warn(f"the checkpoint was written with every_n_steps={every}; going on with {self.every_n_steps}")
        try:
            self.budget.load_state_dict({"probes": state_dict.get("probes", 0), **state_dict["budget"]})
        except KeyError as error:
            self.warn(f"the checkpoint says nothing of the time probes took ({error}); it is counted from here on")
        self.is_resumed = bool(state_dict.get("probes"))
        # The batches are not in the checkpoint: a probe that was collecting them begins anew.
        self.is_pending = state_dict.get("collecting", False)

    def _collect(self, trainer: Any, module: Any, batch: Any) -> Sequence[Any] | None:
        if self._batch_error:
            return None
        try:
            if self.source.collects and not self._is_over:
                self.source.collect(batch)
            if not self.is_pending:
                return None
            return self.source.batches(batch, module, partial(to_device, trainer, module), self.group)
        except Exception as error:
            self._batch_error = text_of(error) or type(error).__name__
            return None

    def _all_have(self, batches: Sequence[Any] | None) -> bool:
        """Return whether every rank has its batches; turn off, and warn, where one cannot have them."""
        answers = self.group.all_gather_object((batches is not None, self._batch_error))
        for rank, (_, error) in enumerate(answers):
            if error:
                where = f"rank {rank}: " if len(answers) > 1 else ""
                reason = f"{where}its batches cannot be had: {error}"
                if self._is_over:
                    self.warn(f"no probe of the final weights: {reason}")
                else:
                    self.turn_off(reason)
                return False
        return all(ready for ready, _ in answers)
