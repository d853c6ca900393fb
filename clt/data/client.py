"""Requests to an activation server: the token, retries with growing pauses, and errors that say what to do."""

import os
import weakref
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import stamina
from jaxtyping import UInt8
from torch import Tensor

from clt.data.files import sha256_of
from clt.data.transport import body_of, direct_transport
from clt.errors import DatasetError

TOKEN_VARIABLE = "CLT_SERVER_TOKEN"
_TRY_AGAIN = (408, 429, 500, 502, 503, 504)
UPLOAD_BLOCK = 8 * 2**20
"""Bytes per request of an upload; what a broken connection can cost."""


class ServerClient:
    """One data set on one server; our own server or crosslayer-coding's.

    Args:
        server_url: such as `http://127.0.0.1:8000`.
        dataset_id: `<model>/<corpus>_<split>`.
        token: None: from the environment variable CLT_SERVER_TOKEN, if it is set.
        timeout_seconds: for each request.
        attempts: how often a request is tried before giving up.
        first_pause_seconds: before the second attempt; doubled each time, with jitter.
        longest_pause_seconds: between attempts.
        transport: for tests: answers without a network.
    """

    def __init__(
        self,
        server_url: str,
        dataset_id: str,
        *,
        token: str | None = None,
        timeout_seconds: float = 60.0,
        attempts: int = 4,
        first_pause_seconds: float = 0.5,
        longest_pause_seconds: float = 10.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.where = f"{server_url.rstrip('/')}/datasets/{dataset_id}"
        self._dataset_url = f"/datasets/{quote(dataset_id, safe='')}"
        self._retries = {
            "attempts": attempts,
            "timeout": None,
            "wait_initial": first_pause_seconds,
            "wait_max": longest_pause_seconds,
        }
        token = token or os.environ.get(TOKEN_VARIABLE)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        address: dict[str, Any] = {"base_url": server_url.rstrip("/"), "headers": headers, "timeout": timeout_seconds}
        self._client = httpx.Client(**address, transport=transport)
        self._rows = httpx.Client(**address, transport=transport or direct_transport())
        self._closing = weakref.finalize(self, _close, self._client, self._rows)

    def close(self) -> None:
        """Close the connections."""
        self._closing()

    def is_ours(self) -> bool:
        """Whether the server knows more than crosslayer-coding's routes."""
        answer = self._send("GET", "/api/v1/health").json()
        return isinstance(answer, dict) and "crosslayer" in answer

    def get(self, name: str) -> bytes:
        """`info`, `norm_stats` or `manifest`."""
        return self._send("GET", f"{self._dataset_url}/{name}").content

    def rows(self, name: str, content: Any) -> UInt8[Tensor, " byte"]:
        """Ask for rows, by the route `rows` or `slice`."""
        return body_of(self._send("POST", f"{self._dataset_url}/{name}", through=self._rows, json=content))

    def upload(self, path: Path) -> None:
        """Send a shard in blocks, going on where an earlier upload broke off; the server compares its SHA-256.

        Raises:
            DatasetError: the server refuses it, or cannot be reached after all attempts.
        """
        url = f"{self._dataset_url}/uploads/{path.name}"
        size, checksum = path.stat().st_size, sha256_of(path)
        if self._send("GET", url).json().get("sha256") == checksum:
            return
        with path.open("rb") as file:
            while (received := self._send("GET", url).json()["received"]) < size:
                file.seek(received)
                self._send("PUT", f"{url}?offset={received}", content=file.read(UPLOAD_BLOCK), accept=(409,))
        self._send("POST", url, json={"sha256": checksum})

    def checksum_of(self, name: str) -> str | None:
        """SHA-256 of a shard as it lies on the server, which reads it through; None: it is not there."""
        return self._send("GET", f"{self._dataset_url}/uploads/{name}").json().get("sha256")

    def upload_the_seeds_way(self, number: int, path: Path) -> None:
        """Send a chunk in one multipart request, as crosslayer-coding's server wants it."""
        url = f"{self._dataset_url}/chunks/{number}"
        headers = {"X-Checksum-SHA256": sha256_of(path)}
        with path.open("rb") as file:
            self._send("POST", url, files={"chunk_file": (path.name, file, "application/x-hdf5")}, headers=headers)

    def put_json(self, name: str, content: Any) -> None:
        """Send `metadata` or `norm_stats`."""
        self._send("POST", f"{self._dataset_url}/{name}", json=content)

    def put_manifest(self, data: bytes) -> None:
        """Send `index.bin`."""
        self._send("POST", f"{self._dataset_url}/manifest", files={"manifest_file": ("index.bin", data)})

    def _send(
        self,
        method: str,
        url: str,
        *,
        accept: tuple[int, ...] = (),
        through: httpx.Client | None = None,
        **content: Any,
    ) -> httpx.Response:
        try:
            for attempt in stamina.retry_context(on=_is_worth_another_try, **self._retries):
                with attempt:
                    answer = (through or self._client).request(method, url, **content)
                    if answer.status_code not in accept:
                        answer.raise_for_status()
                    return answer
        except httpx.HTTPStatusError as error:
            raise DatasetError(self._explain(error.response)) from None
        except httpx.HTTPError as error:
            tried = self._retries["attempts"]
            raise DatasetError(
                f"{self.where}: no answer after {tried} attempts ({type(error).__name__}: {error}).\n"
                "Is the server running and the address right? `clt serve activations` starts one."
            ) from error
        raise AssertionError("stamina either returns or raises")  # pragma: no cover

    def _explain(self, answer: httpx.Response) -> str:
        ways_out = {
            401: f"Give the server's token in the environment variable {TOKEN_VARIABLE}.",
            404: "Is the data set's id right? GET /datasets lists what the server has.",
            409: "The server has something else under that name; choose another id.",
            413: "The server's limit for one request is smaller than this one.",
            507: "The server's disk or quota is full; make space there and run the same command again.",
        }
        asked = f"{answer.request.method} {answer.request.url.path}"
        return (
            f"{self.where}: the server answered {answer.status_code} to {asked}: "
            f"{answer.text[:500]}\n{ways_out.get(answer.status_code, 'Its log may say more.')}"
        )


def _close(*clients: httpx.Client) -> None:
    for client in clients:
        client.close()


def _is_worth_another_try(error: Exception) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in _TRY_AGAIN
    return isinstance(error, httpx.TransportError)
