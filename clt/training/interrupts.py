"""Ctrl-C and SIGTERM between steps instead of in the middle of one."""

import signal
import threading
from types import FrameType


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
