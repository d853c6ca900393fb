"""Work that goes on behind the caller's back, in order."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Background:
    """Runs calls one after the other in a thread while the caller goes on; at most `depth` wait.

    Leaving the block waits for what was begun; an error in a call is raised at the next `do` or on leaving.
    """

    def __init__(self, depth: int = 2) -> None:
        self._depth = depth
        self._calls: deque[Future[Any]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="clt-background")

    def do(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Run `call` after those before it."""
        while len(self._calls) >= self._depth:
            self._calls.popleft().result()
        self._calls.append(self._thread.submit(call, *arguments, **options))

    def __enter__(self) -> "Background":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for call in self._calls:
                call.result()
