"""Who may talk to a server that a browser opens: right Host, right Origin, and a token where others can connect.

A page anywhere on the web can send requests to 127.0.0.1. The Host check stops it from reading (a name of its own
that resolves here is refused), the Origin check from writing.
"""

import hmac
import ipaddress
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clt.serve.guards import answer_with

COOKIE = "crosslayer_token"
_SAFE = ("GET", "HEAD")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-cache"),
)


class BrowserGuard:
    """ASGI middleware: refuses foreign hosts, foreign origins, large bodies and, with a token, strangers.

    Args:
        hosts: names under which this server is opened; None: any (only with a token).
        token: what the first request must bring as `?token=...`; a cookie carries it from then on.
        max_body_bytes: larger requests are refused.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: Collection[str] | None, token: str | None, max_body_bytes: int = 2**22
    ) -> None:
        self._app = app
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._token = token
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        brings_token = self._token is not None and self._matches(_query_token(scope))
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            # The application sees a client that went away; nothing large is ever kept.
            return {"type": "http.disconnect"} if received > self._max_body_bytes else message

        async def marked_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
                if brings_token:
                    cookie = f"{COOKIE}={self._token}; HttpOnly; SameSite=Strict; Path=/"
                    message["headers"].append((b"set-cookie", cookie.encode()))
            await send(message)

        refusal = self._refusal(scope, headers, brings_token)
        if refusal:
            await answer_with(marked_send, *refusal)
        else:
            await self._app(scope, limited_receive, marked_send)

    def _refusal(self, scope: Scope, headers: dict[str, str], brings_token: bool) -> tuple[int, str] | None:
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname or ""
        if self._hosts is not None and name not in self._hosts:
            return 403, f"This server does not answer to the name {name!r}. Open it as http://127.0.0.1 with its port."
        if self._token is not None and not brings_token and not self._matches(_cookie_token(headers)):
            return 401, "A token is needed: open the address with ?token=... that the server printed when it started."
        if scope["method"] in _SAFE:
            return None
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, f"A page of {origin} may not change anything here."
        if headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return 415, "Send JSON, with Content-Type: application/json."
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._max_body_bytes:
            return 413, f"The body is larger than {self._max_body_bytes:,} bytes."
        return None

    def _matches(self, given: str) -> bool:
        return self._token is not None and hmac.compare_digest(given.encode(), self._token.encode())


def hosts_of(address: str) -> set[str] | None:
    """The names a server bound to this address may be opened under; None: no telling."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return {address, "localhost", "127.0.0.1", "::1"} if address == "localhost" else {address}
    if parsed.is_loopback:
        return {"localhost", "127.0.0.1", "::1", address}
    return None if parsed.is_unspecified else {address}


def _query_token(scope: Scope) -> str:
    return parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]


def _cookie_token(headers: dict[str, str]) -> str:
    try:
        cookie = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return ""
    return cookie[COOKIE].value if COOKIE in cookie else ""
