"""What stops a run early, always between two steps: Ctrl-C, SIGTERM, the end of the time given to it."""

import signal
import threading
import time
from types import FrameType
from typing import NoReturn

from clt.errors import TrainingError


class TimeLimitReached(TrainingError):
    """The run has written a checkpoint and stopped, as asked."""


class TimeLimit:
    """How long this session may last, counted from now."""

    def __init__(self, minutes: float | None) -> None:
        self._minutes = minutes
        self._begin = time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return self._minutes is not None and time.monotonic() - self._begin >= 60 * self._minutes

    def stop(self, step: int, steps: int, interrupted: bool) -> NoReturn:
        """Say why the run ends here."""
        if interrupted:
            raise KeyboardInterrupt
        raise TimeLimitReached(
            f"Stopped at step {step:,} of {steps:,} after {self._minutes} minutes, as --time-limit-minutes asks; a "
            "checkpoint is written. The same command goes on from here."
        )


class Interrupts:
    """While active, the first SIGINT or SIGTERM only sets `requested`; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, signal.Handlers | object] = {}

    def __enter__(self) -> "Interrupts":
        # Handlers can be set in the main thread only; elsewhere (a notebook's worker) the default behaviour stays.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
