"""Large answers read straight into memory that is used again; httpx's own way takes them 64 KiB at a time."""

import http.client
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import getproxies

import httpx
import torch
from jaxtyping import UInt8
from torch import Tensor

from clt.data.buffers import BufferPool

_BODY = "clt_body"
_STALE = (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError)


def direct_transport() -> httpx.BaseTransport | None:
    """A `DirectTransport`; None, which means httpx's own, where a proxy is configured: it speaks to none."""
    return None if {"http", "https", "all"} & set(getproxies()) else DirectTransport()


def body_of(answer: httpx.Response) -> UInt8[Tensor, " byte"]:
    """The body of an answer; without a copy if a `DirectTransport` brought it."""
    if _BODY in answer.extensions:
        return answer.extensions[_BODY]
    return torch.frombuffer(bytearray(answer.content), dtype=torch.uint8)


class DirectTransport(httpx.BaseTransport):
    """An httpx transport over the standard library's connections; they stay open, and several threads may use it.

    The body of a successful answer is read by `body_of`; that of any other is where httpx has it.

    Raises:
        httpx.TransportError: no connection, or it broke.
    """

    def __init__(self) -> None:
        self._idle: deque[http.client.HTTPConnection] = deque()
        self._pool = BufferPool(keep=20)  # a store may have as many answers under way

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Ask over a connection that is open, or else over a new one."""
        with _as_httpx_errors(request):
            while (connection := self._take_idle()) is not None:
                try:
                    return self._ask(connection, request)
                except _STALE:  # servers close connections that nobody used for some seconds
                    continue
            return self._ask(_new_connection(request), request)

    def close(self) -> None:
        """Close the connections that are not in use."""
        while (connection := self._take_idle()) is not None:
            connection.close()

    def _take_idle(self) -> http.client.HTTPConnection | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _ask(self, connection: http.client.HTTPConnection, request: httpx.Request) -> httpx.Response:
        is_reusable = False
        try:
            headers = dict(request.headers.items()) | {"accept-encoding": "identity"}
            connection.request(request.method, request.url.raw_path.decode("ascii"), request.read(), headers)
            answer = connection.getresponse()
            is_success = answer.status < 400
            response = httpx.Response(
                answer.status,
                headers=answer.getheaders(),
                content=b"" if is_success else answer.read(),
                extensions={_BODY: self._read(answer)} if is_success else {},
            )
            is_reusable = not answer.will_close
        finally:
            if is_reusable:
                self._idle.append(connection)
            else:
                connection.close()
        return response

    def _read(self, answer: http.client.HTTPResponse) -> Tensor:
        if answer.length is None:
            return torch.frombuffer(bytearray(answer.read()), dtype=torch.uint8)
        body = self._pool.empty((answer.length,), torch.uint8)
        rest = body.numpy().data
        while rest:
            n_bytes = answer.readinto(rest)
            if n_bytes == 0:
                raise http.client.IncompleteRead(b"", len(rest))
            rest = rest[n_bytes:]
        return body


def _new_connection(request: httpx.Request) -> http.client.HTTPConnection:
    kind = http.client.HTTPSConnection if request.url.scheme == "https" else http.client.HTTPConnection
    return kind(request.url.host, request.url.port, timeout=request.extensions.get("timeout", {}).get("read"))


@contextmanager
def _as_httpx_errors(request: httpx.Request) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise httpx.ReadTimeout(str(error), request=request) from error
    except http.client.HTTPException as error:
        raise httpx.RemoteProtocolError(f"the connection broke ({error!r})", request=request) from error
    except OSError as error:
        raise httpx.ReadError(str(error), request=request) from error
