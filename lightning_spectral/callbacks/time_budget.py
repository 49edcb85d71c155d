"""When to probe, so that a run has enough probes in a small share of its wall time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from lightning_spectral._validation import number, positive_int
from lightning_spectral.report.terminal.formatting import duration

MAX_OVERHEAD = 0.05
"""Share of wall time that probes take by default."""

MIN_PROBES = 8
"""Probes that a run gets at least, beside the one of its final weights."""

LARGEST_SHARE = 0.2
"""Share of a run's wall time within which its min_probes come."""


class TimeBudget:
    """Decide when to probe: before the first step, and then by whichever of two rules asks for it first.

    1. At most a share f of wall time: with P the seconds probed so far, W the wall time since the start, c the cost
       expected of the next probe and t the time since the last, P + c <= f (W + c), the whole run's share, and
       c <= f (t + c), its own interval's, so that time saved by a long pause is not spent at once.
    2. At least `min_probes`, evenly over a run of known length, with one more of the final weights: of the n that are
       to come, the next is due after 1/n of the steps that are left. They are so many that all probes together are
       predicted to take at most F = max(`LARGEST_SHARE`, f) of the whole run's wall time. In a run of unknown length
       they come as soon as F takes the place of f in the first rule.

    The clock is read only at steps predicted from the mean step time; rank 0 broadcasts its prediction, so all ranks
    decide alike.

    Args:
        max_overhead: f, between 0 and 1.
        min_probes: 0: the first rule alone, and none of the final weights.
        clock: seconds, from any origin.

    Attributes:
        total_steps: optimizer steps of the whole run, as far as can be told; infinity where it is not known.
        probes: number of probes of this training.

    >>> now = [0.0]
    >>> budget = TimeBudget(0.1, min_probes=0, clock=lambda: now[0])
    >>> budget.start(0)
    >>> budget.is_due(0)
    True
    >>> now[0] = 1.0; budget.record_probe(0, 1.0); budget.is_due(1)
    False
    """

    def __init__(
        self,
        max_overhead: float = MAX_OVERHEAD,
        min_probes: int = MIN_PROBES,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        rule = "be a share of wall time, between 0 and 1"
        self.max_overhead = float(number("max_overhead", max_overhead, lambda share: 0 < share < 1, rule))
        self.min_probes = positive_int("min_probes", min_probes, 0)
        self.clock = clock
        self.total_steps = math.inf
        self._reset()

    def _reset(self) -> None:
        self.probes = 0
        self.probe_seconds = 0.0
        self.last_seconds = self.next_seconds = 0.0
        self.last_step: int | None = None
        self._due_step = 0
        self._latest_step = 0
        self.next_look = 0
        self._wall_before = 0.0
        self._since_before = 0.0
        self._started: float | None = None
        self._probe_ended = 0.0

    def start(self, step: int) -> None:
        """Count wall time from this optimizer step on, on top of the time up to `stop` or before a resume."""
        if self._started is not None:
            # The last run ended in an error, without `stop`.
            self.stop()
        if step < self._latest_step:
            # Another training: its steps begin anew.
            self._reset()
        self._started = self._probe_ended = self.clock()
        self.next_look = max(self.next_look, step)

    def stop(self) -> None:
        """Count no wall time until the next `start`."""
        self._wall_before, self._since_before = self.wall_seconds, self._since
        self._started = None

    @property
    def share(self) -> float:
        """Share of a run's wall time that its probes may take until there are `min_probes` of them."""
        return max(LARGEST_SHARE, self.max_overhead) if self.min_probes else self.max_overhead

    @property
    def wall_seconds(self) -> float:
        """W, over all runs of this training."""
        return self._wall_before + (0.0 if self._started is None else self.clock() - self._started)

    @property
    def overhead(self) -> float:
        """P / W; NaN before the first step is taken, when there is no training to compare with."""
        return self.probe_seconds / self.wall_seconds if self._latest_step and self.wall_seconds else math.nan

    @property
    def _since(self) -> float:
        return self._since_before + (0.0 if self._started is None else self.clock() - self._probe_ended)

    def missing(self, share: float) -> float:
        """Return the seconds until the next probe is within a share of wall time; not positive when it is."""
        if self.last_step is None:
            return 0.0
        c = self.next_seconds
        return max((self.probe_seconds + c) / share - (self.wall_seconds + c), c / share - (self._since + c))

    def has_room(self) -> bool:
        """Return whether one more probe, of the final weights, is within the share of the whole run."""
        c = self.next_seconds
        return self.last_step is None or self.probe_seconds + c <= self.share * (self.wall_seconds + c)

    def probes_to_come(self, step: int) -> int:
        """Return how many probes are to come at least, with that of the final weights; all before times are known.

        With R the time of the whole run without its probes, there is room for n where P + n c <= F (R + P + n c).
        """
        training = self.wall_seconds - self.probe_seconds + (self.total_steps - step) * self.step_seconds(step)
        asked = self.min_probes + 1 - self.probes
        if math.isnan(training) or not math.isfinite(self.total_steps):
            return asked
        room = self.share / (1 - self.share) * training - self.probe_seconds
        return min(asked, max(0, math.floor(room / max(self.next_seconds, 1e-9))))

    def room(self, step: int) -> float:
        """Return how many steps the probe that is due may wait for its batches until the next is due."""
        others = self.probes_to_come(step) - 1
        return (self.total_steps - step) / max(1, others) if self.min_probes >= self.probes else math.inf

    def record_step(self, step: int) -> None:
        """Record that training has reached this step."""
        self._latest_step = step

    def is_due(self, step: int, broadcast: Callable[[int], int] = int) -> bool:
        """Return whether to probe before this step.

        Args:
            broadcast: number of steps to wait -> rank 0's number. All ranks call it at the same steps.
        """
        if step < self.next_look:
            return False
        wait = broadcast(self._steps_to_wait(step))
        self.next_look = step + max(wait, 1)
        if wait == 0:
            self._due_step = step
        return wait == 0

    def _steps_to_wait(self, step: int) -> int:
        if self.last_step is None:
            return 0
        done = step - self.last_step
        if done <= 0 or self._since <= 0:
            return 1
        seconds = self._since / done
        wait = self.missing(self.max_overhead) / seconds
        if self.probes <= self.min_probes:
            wait = min(wait, self._steps_of_minimum(step, seconds))
        # At most as many again as were taken: the first steps are slow, and steps may become faster.
        return math.ceil(min(max(wait, 0.0), done))

    def _steps_of_minimum(self, step: int, seconds: float) -> float:
        if not math.isfinite(self.total_steps):
            return self.missing(self.share) / seconds
        n = self.probes_to_come(step)
        # The last of them is that of the final weights.
        return self._due_step + (self.total_steps - self._due_step) / n - step if n > 1 else math.inf

    def record_probe(self, step: int, seconds: float) -> None:
        """Record a probe before this step that took so long and has just ended."""
        self.probes += 1
        self.probe_seconds += seconds
        self.last_seconds = self.next_seconds = seconds
        self.last_step = step
        self._since_before, self._probe_ended = 0.0, self.clock()

    def expect_more(self, seconds: float) -> None:
        """Expect the next probe to take so much longer than the last."""
        self.next_seconds = max(0.0, self.next_seconds + seconds)

    def extend_probe(self, seconds: float) -> None:
        """Record that the last probe took so much longer, in logging it or in steps after it, until now."""
        self.probe_seconds += seconds
        self.last_seconds += seconds
        self.next_seconds += seconds
        # Time within a probe is none since it.
        self._probe_ended += seconds

    def step_seconds(self, step: int) -> float:
        """Return the mean time of the steps since the last probe; NaN before there are any."""
        done = step - (self.last_step or 0)
        return self._since / done if self.last_step is not None and done > 0 else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next decision depends on."""
        return {
            "probes": self.probes,
            "probe_seconds": self.probe_seconds,
            "wall_seconds": self.wall_seconds,
            "last_seconds": self.last_seconds,
            "next_seconds": self.next_seconds,
            "last_step": self.last_step,
            "due_step": self._due_step,
            "since_seconds": self._since,
            "next_look": self.next_look,
            "latest": self._latest_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.probe_seconds, self.last_seconds = state["probe_seconds"], state["last_seconds"]
        self.next_seconds = state.get("next_seconds", state["last_seconds"])
        self.last_step, self.next_look, self._latest_step = state["last_step"], state["next_look"], state["latest"]
        self.probes, self._due_step = state["probes"], state.get("due_step", self.last_step or 0)
        self._wall_before, self._since_before = state["wall_seconds"], state["since_seconds"]
        if self._started is not None:
            # Learning rate finders restore the state in mid-training.
            self._started = self._probe_ended = self.clock()


def too_short_for_two(budget: TimeBudget) -> str:
    """Return what to tell of a run that has ended and had room for one probe alone."""
    cost, share = budget.last_seconds, budget.share
    rule = f"min_probes={budget.min_probes}" if budget.min_probes else f"max_overhead={budget.max_overhead:g}"
    remedy = f"a max_overhead above {share:g}" if budget.min_probes else "min_probes, a larger max_overhead"
    return (
        f"a run of {duration(budget.wall_seconds)} has room for one probe alone: one takes {duration(cost)}, and "
        f"together they may take {100 * share:g} % of the time ({rule}). For a curve set max_samples (but not below "
        f"32), fewer layers or directions (layers, top_k), {remedy} or every_n_steps; or train longer: from "
        f"{duration(2 * cost / share)} on there are two"
    )
