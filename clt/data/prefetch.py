"""Reading the next batches in the background while the present one is worked on."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from clt.data.sources import Rows


class ReadAhead:
    """Keeps some reads under way and hands out their results in order.

    Args:
        depth: reads under way; 0 reads when asked, in the caller's thread.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._begun: deque[Future[Rows]] = deque()
        self._threads: ThreadPoolExecutor | None = None

    @property
    def n_begun(self) -> int:
        """Reads whose result has not been handed out."""
        return len(self._begun)

    def next(self, reads: Iterator[Callable[[], Rows]]) -> Rows:
        """The next result; `reads` are those not yet begun, in order."""
        if self._depth == 0:
            return next(reads)()
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._depth, thread_name_prefix="clt-read-ahead")
        while len(self._begun) <= self._depth:
            self._begun.append(self._threads.submit(next(reads)))
        first = self._begun[0]
        failed = first.exception() is not None  # waits; interrupted here, nothing has changed
        self._begun.popleft()
        if failed:
            self.forget()  # the reads behind it are no longer the next ones
        return first.result()

    def forget(self) -> None:
        """Drop what was read ahead; the order has changed."""
        while self._begun:
            self._begun.popleft().cancel()
