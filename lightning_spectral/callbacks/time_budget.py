"""When to probe: at fixed steps, or as often as a share of wall time allows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any


class TimeBudget:
    """Space probes so that they take at most a share f of wall time, from the second probe on.

    With P the seconds probed so far, W the wall time since the start, c the cost of the last probe and t the time since
    it, the next one is due when P + c <= f (W + c), the whole run's share, and c <= f (t + c), its own interval's, so
    that what long pauses save is not spent at once. The time is looked at on steps that are planned ahead from the
    mean time of a step, so that processes which are told the plan of one of them take the same decisions.

    Args:
        max_overhead: f, between 0 and 1.
        clock: seconds, from any origin.

    >>> now = [0.0]
    >>> budget = TimeBudget(0.1, clock=lambda: now[0])
    >>> budget.start(0)
    >>> budget.due(0)
    True
    >>> now[0] = 1.0; budget.probed(0, 1.0); budget.due(1)
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
        self.last_seconds = 0.0
        self.last_step: int | None = None
        self._latest = 0
        self.next_look = 0
        self._earlier = 0.0
        self._since_earlier = 0.0
        self._running_since: float | None = None
        self._last_ended = 0.0

    def start(self, step: int) -> None:
        """Count wall time from this optimizer step on, on top of what was counted up to `stop` or before a resume."""
        if self._running_since is not None:
            # The last run ended without `stop`, in an error.
            self.stop()
        if step < self._latest:
            # Another training, whose steps begin anew.
            self._reset()
        self._running_since = self._last_ended = self.clock()
        self.next_look = max(self.next_look, step)

    def stop(self) -> None:
        """Count no wall time until the next `start`."""
        self._earlier, self._since_earlier = self.wall_seconds, self._since
        self._running_since = None

    @property
    def wall_seconds(self) -> float:
        """W, of all runs that make up this training."""
        return self._earlier + (0.0 if self._running_since is None else self.clock() - self._running_since)

    @property
    def overhead(self) -> float:
        """P / W."""
        return self.probe_seconds / self.wall_seconds if self.wall_seconds else 0.0

    @property
    def _since(self) -> float:
        return self._since_earlier + (0.0 if self._running_since is None else self.clock() - self._last_ended)

    def missing(self) -> float:
        """Seconds until the next probe is within the budget; not positive when it is."""
        if self.last_step is None:
            return 0.0
        c, f = self.last_seconds, self.max_overhead
        return max((self.probe_seconds + c) / f - (self.wall_seconds + c), c / f - (self._since + c))

    def seen(self, step: int) -> None:
        """Note that training has come to this step."""
        self._latest = step

    def due(self, step: int, agreed: Callable[[int], int] = int) -> bool:
        """Whether to probe before this step.

        Args:
            step: optimizer step.
            agreed: what all processes take for the number of steps to wait, from that of one of them; they look at the
                same steps.
        """
        if step < self.next_look:
            return False
        wait = agreed(self._wait(step))
        self.next_look = step + max(wait, 1)
        return wait == 0

    def _wait(self, step: int) -> int:
        missing = self.missing()
        if missing <= 0:
            return 0
        done = step - (self.last_step or 0)
        if done <= 0 or self._since <= 0:
            return 1
        # No more than as many again as were seen: the first steps are slow, and steps may become faster.
        return max(1, min(math.ceil(missing / (self._since / done)), done))

    def probed(self, step: int, seconds: float) -> None:
        """A probe before this step took so long, and has just ended."""
        self.probe_seconds += seconds
        self.last_seconds = seconds
        self.last_step = step
        self._since_earlier, self._last_ended = 0.0, self.clock()

    def logged(self, seconds: float) -> None:
        """Writing down the last probe took so long, and has just ended."""
        self.probe_seconds += seconds
        self.last_seconds += seconds
        self._last_ended = self.clock()

    def step_seconds(self, step: int) -> float:
        """The mean time of the steps since the last probe; NaN before there are any."""
        done = step - (self.last_step or 0)
        return self._since / done if self.last_step is not None and done > 0 else float("nan")

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next decision depends on."""
        return {
            "probe_seconds": self.probe_seconds,
            "wall_seconds": self.wall_seconds,
            "last_seconds": self.last_seconds,
            "last_step": self.last_step,
            "since_seconds": self._since,
            "next_look": self.next_look,
            "latest": self._latest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.probe_seconds, self.last_seconds = state["probe_seconds"], state["last_seconds"]
        self.last_step, self.next_look, self._latest = state["last_step"], state["next_look"], state["latest"]
        self._earlier, self._since_earlier = state["wall_seconds"], state["since_seconds"]
        if self._running_since is not None:
            # In mid-training, as learning rate finders do, who put back the state that they found.
            self._running_since = self._last_ended = self.clock()
