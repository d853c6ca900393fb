"""An answer made of several pieces of memory, sent as they are."""

from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

BLOCK_BYTES = 2**20
"""Sent at once; what does not fit into the connection is copied, so this should not be much larger than it."""


class PartsResponse(Response):
    """Parts one after the other, without being joined to one body.

    Args:
        parts: the body.
    """

    media_type = "application/octet-stream"

    def __init__(self, parts: Sequence[memoryview]) -> None:
        super().__init__()
        self._parts = parts
        self.headers["content-length"] = str(sum(part.nbytes for part in parts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for part in self._parts:
            for start in range(0, part.nbytes, BLOCK_BYTES):
                await send({"type": "http.response.body", "body": part[start : start + BLOCK_BYTES], "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
