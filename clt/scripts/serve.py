"""Serve activations to other machines: `clt serve activations --root FOLDER`.

Set CLT_SERVER_TOKEN to the token clients must send; without one the server only listens on this machine.
"""

import os
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
import uvicorn

from clt.data.client import TOKEN_VARIABLE
from clt.serve.activation_server import MAX_BODY_BYTES, create_app, require_token_off_loopback


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to serve, and where."""

    what: Annotated[Literal["activations"], tyro.conf.Positional] = "activations"
    """What to serve."""
    root: str = "./server_data"
    """Folder of the data sets."""
    host: str = "127.0.0.1"
    """Address to listen on; others than this machine's own need a token."""
    port: int = 8000
    """Port to listen on."""
    max_body_bytes: int = MAX_BODY_BYTES
    """Largest request."""
    quota_bytes: int | None = None
    """The root may hold this much; None: as much as the disk."""


def main(options: Options) -> None:
    """Serve until interrupted."""
    token = os.environ.get(TOKEN_VARIABLE)
    require_token_off_loopback(options.host, token)
    app = create_app(options.root, token=token, max_body_bytes=options.max_body_bytes, quota_bytes=options.quota_bytes)
    uvicorn.run(app, host=options.host, port=options.port)
