"""A measurement that hangs, or takes many times as long as predicted, says once where it is."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from types import CodeType, FrameType
from weakref import WeakSet

from torch import nn

logger = logging.getLogger(__name__)

SLOW = 20.0
"""Times the predicted duration from which on a measurement says that it takes longer."""

LEAST_SECONDS = 60.0
"""What it waits for at least: a busy machine is no reason to say something."""

FIRST_SECONDS = 600.0
"""What it waits for before its gradient is there, after which its duration is predicted."""

GRADIENTS = 10.0
"""Times that of its gradients and their singular vectors that a measurement takes, beside its products."""

_told: WeakSet[nn.Module] = WeakSet()
_PIPELINE = Path(__file__).parent
_OURS, _TORCH, _PYTHON = Path(__file__).parents[1], Path(nn.__file__).parents[1], Path(threading.__file__).parent


class Watch:
    """Context of one measurement; what it says, it logs, once for each network."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._thread, self._started = model, threading.get_ident(), time.perf_counter()
        self._copy: nn.Module | None = None
        self._layers: Collection[str] = ()
        self._root: CodeType = sys._getframe(1).f_code
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Watch:
        self._wait(FIRST_SECONDS, "before its gradient was there")
        return self

    def __exit__(self, *error: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def names(self, copy: nn.Module, layers: Collection[str]) -> None:
        """Take what to name a place by: the copy that is computed on, and the layers measured."""
        self._copy, self._layers = copy, layers

    def expect(self, gradient_seconds: float, products: float) -> None:
        """Take the prediction of the rest: of a gradient that took so long, and products of so many times its cost."""
        seconds = gradient_seconds * (GRADIENTS + products)
        self._wait(max(LEAST_SECONDS, SLOW * seconds), f"where about {seconds:.2g} s were to follow on its gradient")

    def _wait(self, seconds: float, expected: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(seconds, self._say, (expected,))
        self._timer.daemon = True
        self._timer.start()

    def _say(self, expected: str) -> None:
        if self._model in _told:
            return
        _told.add(self._model)
        seconds = time.perf_counter() - self._started
        logger.warning("a measurement has taken %.0f s, %s, and goes on; it is %s", seconds, expected, self._place())

    def _place(self) -> str:
        frames = list(_frames(sys._current_frames().get(self._thread), self._root))
        modules = {} if self._copy is None else {id(module): name for name, module in self._copy.named_modules()}
        # Before Python 3.13 a frame keeps its variables, once asked for them, until it ends; those of this folder let
        # go of gradients as large as the network.
        variables = [frame.f_locals for frame in frames if Path(frame.f_code.co_filename).parent != _PIPELINE]
        called = [modules.get(id(of_frame.get("self"))) for of_frame in variables]
        measured = [name for of_frame in variables if isinstance(name := of_frame.get("name"), str)]
        layer = next(filter(None, called), None) or next((name for name in measured if name in self._layers), None)
        theirs = [frame for frame in frames if not any(_is_in(frame, folder) for folder in (_OURS, _TORCH, _PYTHON))]
        where = (theirs or [frame for frame in frames if _is_in(frame, _OURS)] or frames)[:1]
        at = [f"at {f.f_code.co_filename}:{f.f_lineno} in {f.f_code.co_name}" for f in where]
        return ", ".join([*([f"in layer {layer}"] if layer else []), *at]) or "over"


def _frames(frame: FrameType | None, root: CodeType) -> Iterator[FrameType]:
    """Yield the frames of a thread, the innermost first, down to a function."""
    while frame is not None and frame.f_code is not root:
        yield frame
        frame = frame.f_back


def _is_in(frame: FrameType, folder: Path) -> bool:
    """Return whether a frame's code is in a folder, but not in one of packages below it."""
    path = Path(frame.f_code.co_filename)
    return folder in path.parents and "site-packages" not in path.relative_to(folder).parts
