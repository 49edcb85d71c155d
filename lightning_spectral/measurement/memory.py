"""Again with smaller micro-batches where memory runs out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import TracebackType

from lightning_spectral.errors import MeasurementError, is_out_of_memory
from lightning_spectral.isolation.devices import release_memory
from lightning_spectral.measurement.objective import Objective, largest_size

TRIES = 3
"""Number of tries where memory runs out, each with micro-batches half as large."""


class Attempt:
    """One try: a context that ends without an error where memory runs out inside.

    Args:
        max_size: samples of the largest micro-batch to measure by; None: full batches.
        failures: what earlier tries used.
    """

    def __init__(self, max_size: int | None, failures: Sequence[str]) -> None:
        self.max_size, self.out_of_memory = max_size, False
        self._failures = failures

    def __enter__(self) -> Attempt:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Note that memory ran out; let other errors pass, with the reason for smaller micro-batches."""
        self.out_of_memory = error is not None and is_out_of_memory(error)
        if self._failures and isinstance(error, MeasurementError) and not self.out_of_memory:
            raise MeasurementError(
                f"out of memory with {self._failures[0]}, and no smaller micro-batches: {error}"
            ) from None
        return self.out_of_memory


def attempts(objective: Objective, max_size: int | None) -> Iterator[Attempt]:
    """Yield tries until one ends with memory left.

    Args:
        max_size: samples of the largest micro-batch in the first try; None: full batches.
    """
    failures: list[str] = []
    while len(failures) < TRIES:
        attempt = Attempt(max_size, failures)
        yield attempt
        if not attempt.out_of_memory:
            return
        largest, smaller = halve(objective, objective.size_in_use if objective.full_batches() else 0)
        failures.append(f"{largest or 'all'} samples at once")
        release_memory(objective.parameters.values())
        if smaller is None:
            break
        max_size = smaller
    raise MeasurementError(
        f"out of memory with {', with '.join(failures)}; measure fewer samples (max_samples), fewer layers (layers), "
        "or set micro_batch_size"
    )


def halve(objective: Objective, size: int | None) -> tuple[int | None, int | None]:
    """Return the largest size that any rank used, and half of it; None for what is not known or cannot be cut.

    Args:
        size: samples of the largest micro-batch on this rank; None: not known.
    """
    sizes, divisible = zip(*objective.group.all_gather_object((size, objective.divisible)), strict=True)
    largest = largest_size(sizes)
    return largest, math.ceil(largest / 2) if largest is not None and largest > 1 and all(divisible) else None
