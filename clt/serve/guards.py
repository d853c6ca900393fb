"""What stands before every request: who asks, how much is sent, and what is counted."""

import hmac
import json
import time
from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = ("/", "/api/v1/health")
"""Answered without a token: they say nothing about the data."""


class _TooLarge(Exception):
    """The body grew beyond the limit while it was read."""


class Guards:
    """ASGI middleware: bearer token, largest body, counters.

    Args:
        token: what clients must send as `Authorization: Bearer TOKEN`; None: nobody is asked.
        max_body_bytes: larger requests are refused with 413, whatever they claim their length to be.
    """

    def __init__(self, app: ASGIApp, token: str | None, max_body_bytes: int) -> None:
        self._app = app
        self._token = token
        self._max_body_bytes = max_body_bytes
        self.requests: Counter[tuple[str, int]] = Counter()
        self.bytes: Counter[str] = Counter()
        self.seconds = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        begin, status, received, is_too_large = time.perf_counter(), 0, 0, False

        async def counting_receive() -> Message:
            nonlocal received, is_too_large
            message = await receive()
            received += len(message.get("body", b""))
            is_too_large = received > self._max_body_bytes
            if is_too_large:
                raise _TooLarge
            return message

        async def counting_send(message: Message) -> None:
            nonlocal status
            if is_too_large and not status:  # the application's own answer to a body that broke off
                raise _TooLarge
            status = message.get("status", status)
            self.bytes["sent"] += len(message.get("body", b""))
            await send(message)

        refusal = self._refusal(scope["path"], headers)
        try:
            if refusal:
                await answer_with(counting_send, *refusal)
            else:
                await self._app(scope, counting_receive, counting_send)
        except _TooLarge:
            is_too_large = False
            if status == 0:
                await answer_with(counting_send, 413, f"The body is larger than {self._max_body_bytes:,} bytes.")
        self.requests[scope["method"], status] += 1
        self.bytes["received"] += received
        self.seconds += time.perf_counter() - begin

    def prometheus(self) -> str:
        """The counters in Prometheus' text format."""
        lines = ["# TYPE clt_requests_total counter"]
        lines += [
            f'clt_requests_total{{method="{method}",status="{status}"}} {count}'
            for (method, status), count in sorted(self.requests.items())
            if method.isalpha()
        ]
        for name in ("received", "sent"):
            lines += [f"# TYPE clt_{name}_bytes_total counter", f"clt_{name}_bytes_total {self.bytes[name]}"]
        lines += ["# TYPE clt_request_seconds_total counter", f"clt_request_seconds_total {self.seconds:.6f}"]
        return "\n".join(lines) + "\n"

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        given = headers.get(b"authorization", b"")
        if self._token and path not in OPEN_PATHS:
            wanted = f"Bearer {self._token}".encode()
            if not hmac.compare_digest(given, wanted):
                return 401, "A token is needed: send the header Authorization: Bearer TOKEN."
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return 400, "Content-Length is no number."
        if int(length) > self._max_body_bytes:
            return 413, f"The body is larger than {self._max_body_bytes:,} bytes."
        return None


async def answer_with(send: Send, status: int, detail: str) -> None:
    """A whole JSON answer."""
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
