"""`TimeBudget`: space probes so that they take a share of wall time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any


class TimeBudget:
    """Space probes so that they take at most a share f of wall time, from the second probe on.

    With P the seconds probed so far, W the wall time since the start, c the cost expected of the next probe and t the
    time since the last, the next one is due when P + c <= f (W + c), the whole run's share, and c <= f (t + c), its own
    interval's, so that time saved by a long pause is not spent at once. The clock is read only at steps predicted from
    the mean step time; rank 0 broadcasts its prediction, so all ranks decide alike.

    Args:
        max_overhead: f, between 0 and 1.
        clock: seconds, from any origin.

    >>> now = [0.0]
    >>> budget = TimeBudget(0.1, clock=lambda: now[0])
    >>> budget.start(0)
    >>> budget.is_due(0)
    True
    >>> now[0] = 1.0; budget.record_probe(0, 1.0); budget.is_due(1)
    False
    """

    def __init__(self, max_overhead: float, clock: Callable[[], float] = time.perf_counter) -> None:
        if not isinstance(max_overhead, (int, float)) or not 0 < max_overhead < 1:
            raise ValueError(f"max_overhead must be a share of wall time, between 0 and 1, got {max_overhead!r}")
        self.max_overhead = float(max_overhead)
        self.clock = clock
        self._reset()

    def _reset(self) -> None:
        self.probe_seconds = 0.0
        self.last_seconds = self.next_seconds = 0.0
        self.last_step: int | None = None
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
    def wall_seconds(self) -> float:
        """W, over all runs of this training."""
        return self._wall_before + (0.0 if self._started is None else self.clock() - self._started)

    @property
    def overhead(self) -> float:
        """P / W."""
        return self.probe_seconds / self.wall_seconds if self.wall_seconds else 0.0

    @property
    def _since(self) -> float:
        return self._since_before + (0.0 if self._started is None else self.clock() - self._probe_ended)

    def missing(self) -> float:
        """Return the seconds until the next probe is within the budget; not positive when it is."""
        if self.last_step is None:
            return 0.0
        c, f = self.next_seconds, self.max_overhead
        return max((self.probe_seconds + c) / f - (self.wall_seconds + c), c / f - (self._since + c))

    def record_step(self, step: int) -> None:
        """Record that training has reached this step."""
        self._latest_step = step

    def is_due(self, step: int, broadcast: Callable[[int], int] = int) -> bool:
        """Return whether to probe before this step.

        Args:
            step: optimizer step.
            broadcast: number of steps to wait -> rank 0's number. All ranks call it at the same steps.
        """
        if step < self.next_look:
            return False
        wait = broadcast(self._steps_to_wait(step))
        self.next_look = step + max(wait, 1)
        return wait == 0

    def _steps_to_wait(self, step: int) -> int:
        missing = self.missing()
        if missing <= 0:
            return 0
        done = step - (self.last_step or 0)
        if done <= 0 or self._since <= 0:
            return 1
        # At most as many again as were taken: the first steps are slow, and steps may become faster.
        return max(1, min(math.ceil(missing / (self._since / done)), done))

    def record_probe(self, step: int, seconds: float) -> None:
        """Record a probe before this step that took so long and has just ended."""
        self.probe_seconds += seconds
        self.last_seconds = self.next_seconds = seconds
        self.last_step = step
        self._since_before, self._probe_ended = 0.0, self.clock()

    def expect_more(self, seconds: float) -> None:
        """Expect the next probe to take so much longer than the last."""
        self.next_seconds = max(0.0, self.next_seconds + seconds)

    def record_logging(self, seconds: float) -> None:
        """Record that logging the last probe took so long and has just ended."""
        self.probe_seconds += seconds
        self.last_seconds += seconds
        self.next_seconds += seconds
        self._probe_ended = self.clock()

    def extend_probe(self, seconds: float) -> None:
        """Record that the last probe took so much longer, in steps after it, until now."""
        self.probe_seconds += seconds
        self.last_seconds += seconds
        self.next_seconds += seconds
        # Time within a probe is none since it.
        self._probe_ended += seconds

    def step_seconds(self, step: int) -> float:
        """Return the mean time of the steps since the last probe; NaN before there are any."""
        done = step - (self.last_step or 0)
        return self._since / done if self.last_step is not None and done > 0 else float("nan")

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next decision depends on."""
        return {
            "probe_seconds": self.probe_seconds,
            "wall_seconds": self.wall_seconds,
            "last_seconds": self.last_seconds,
            "next_seconds": self.next_seconds,
            "last_step": self.last_step,
            "since_seconds": self._since,
            "next_look": self.next_look,
            "latest": self._latest_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.probe_seconds, self.last_seconds = state["probe_seconds"], state["last_seconds"]
        self.next_seconds = state.get("next_seconds", state["last_seconds"])
        self.last_step, self.next_look, self._latest_step = state["last_step"], state["next_look"], state["latest"]
        self._wall_before, self._since_before = state["wall_seconds"], state["since_seconds"]
        if self._started is not None:
            # Learning rate finders restore the state in mid-training.
            self._started = self._probe_ended = self.clock()
