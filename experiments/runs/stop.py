"""How a long run is stopped between two steps: by a time limit or a signal."""

import math
import signal
import time
from collections.abc import Callable
from typing import Any, TypeVar

from tqdm import tqdm

from dinojax.commands import answering_signals

T = TypeVar("T")


class StoppedError(Exception):
    """A signal came while nothing was trained yet."""


class Stop:
    """Tells a run to stop at the next opportunity: after `minutes`, on SIGTERM or SIGHUP, or on Ctrl-C."""

    def __init__(self, minutes: float | None):
        self._deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._signal: int | None = None
        self._waiting = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: object) -> None:
        if self._signal == signal.SIGINT == number:  # the second Ctrl-C does not wait
            raise KeyboardInterrupt
        self._signal = number
        if self._waiting:
            raise StoppedError
        tqdm.write("saving a checkpoint, then stopping")

    def wait_for(self, work: Callable[[], T]) -> T:
        """The result of `work`, such as a compilation, which a signal does not wait for.

        Raises:
            StoppedError: a signal came, now or before.
        """
        if self._signal is not None:
            raise StoppedError
        self._waiting = True
        try:
            return answering_signals(work)
        finally:
            self._waiting = False

    @property
    def wanted(self) -> bool:
        """Whether to save and stop."""
        return self._signal is not None or time.monotonic() > self._deadline

    @property
    def reason(self) -> str:
        """Words that follow "stopped"."""
        return f"by {signal.Signals(self._signal).name}" if self._signal else "after --minutes"

    def raise_interrupt(self) -> None:
        """After Ctrl-C the command ends as others do; every other stop is a clean exit."""
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
