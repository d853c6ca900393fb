"""Progress on standard error: a bar where somebody looks, a line now and then in a pipe or a file.

A terminal and a notebook with ipywidgets get tqdm's bar with the time left. Anywhere else a bar would be one endless
line of carriage returns, so there a line is written every half minute, with the same numbers.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 30.0


@runtime_checkable
class Progress(Protocol):
    """What a loop tells whoever watches."""

    def __enter__(self) -> Progress: ...

    def __exit__(self, *failure: Any) -> Any: ...

    def update(self, n: int = 1) -> Any:
        """So many more are done."""

    def set_postfix(self, values: Mapping[str, Any]) -> Any:
        """Numbers to show beside the count."""

    def close(self) -> Any:
        """Nothing more comes."""


class Lines:
    """A line every so often: how many, how long, how long still."""

    def __init__(
        self,
        total: int | None,
        title: str,
        unit: str,
        initial: int = 0,
        seconds: float = SECONDS_BETWEEN_LINES,
    ) -> None:
        """Nothing is written before `seconds` have passed; a loop that is over by then stays silent."""
        self._total, self._title, self._unit, self._seconds = total, title, unit, seconds
        self._done = self._initial = initial
        self._began = self._last = time.monotonic()
        self._values: Mapping[str, Any] = {}

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *failure: Any) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """So many more are done; writes the line if it is time."""
        self._done += n
        now = time.monotonic()
        if now - self._last >= self._seconds:
            self._last = now
            self._write(now)

    def set_postfix(self, values: Mapping[str, Any]) -> None:
        """Numbers to show beside the count."""
        self._values = values

    def close(self) -> None:
        """The last line, if there were others."""
        if self._last > self._began:
            self._write(time.monotonic())

    def _write(self, now: float) -> None:
        gone, new = now - self._began, self._done - self._initial
        of = "" if self._total is None else f" of {self._total:,}"
        line = f"{self._title}: {self._done:,}{of} {self._unit}, {_clock(gone)} gone"
        if self._total is not None and new > 0 and self._done < self._total:
            line += f", {_clock(gone / new * (self._total - self._done))} left"
        numbers = "".join(f", {name} {value}" for name, value in self._values.items())
        sys.stderr.write(line + numbers + "\n")


def progress_bar(
    total: int | None,
    title: str,
    unit: str = "steps",
    *,
    initial: int = 0,
    fleeting: bool = False,
    hidden: bool = False,
) -> Progress:
    """A bar or lines, whichever suits where standard error goes.

    Args:
        total: how many there will be; None: nobody knows.
        initial: how many were done before this process began.
        fleeting: the bar disappears at the end, and does not appear in the first second.
        hidden: show nothing at all.
    """
    if hidden:
        return Lines(total, title, unit, initial, seconds=math.inf)
    if in_notebook():
        from tqdm.notebook import tqdm
    elif sys.stderr.isatty():
        from tqdm import tqdm
    else:
        return Lines(total, title, unit, initial)
    bar: Any = tqdm(
        total=total,
        desc=title,
        unit=f" {unit}",
        unit_scale=total is None or total >= 100_000,
        initial=initial,
        leave=not fleeting,
        delay=1 if fleeting else 0,
    )
    return bar


def watched(items: Iterable[Item], total: int | None, title: str, unit: str = "steps") -> Iterator[Item]:
    """The items, one after the other, with their progress shown."""
    with progress_bar(total, title, unit) as bar:
        for item in items:
            yield item
            bar.update(1)


class RetryLines(logging.Handler):
    """What stamina logs as `stamina.retry_scheduled`, said in words: why, and when the next attempt is.

    Reads in flight fail together, so a line every few seconds is enough.
    """

    def __init__(self, seconds: float = 2.0) -> None:
        """Nothing is written within `seconds` of the line before."""
        super().__init__()
        self._seconds, self._last = seconds, -math.inf

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, if it is time."""
        if record.created - self._last < self._seconds:
            return
        self._last = record.created
        why, wait, number = (getattr(record, f"stamina.{name}", "?") for name in ("caused_by", "wait_for", "retry_num"))
        sys.stderr.write(f"no answer: {why}; trying again in {wait} s (retry {number})\n")


def announce_retries() -> None:
    """Let retries be told in words on standard error, once however often this is called."""
    logger = logging.getLogger("stamina")
    if not any(isinstance(handler, RetryLines) for handler in logger.handlers):
        logger.addHandler(RetryLines())
        logger.propagate = False


def in_notebook() -> bool:
    """Whether this is a notebook's kernel that can draw tqdm's widget."""
    return "ipykernel" in sys.modules and importlib.util.find_spec("ipywidgets") is not None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
