"""Serve activations to other machines, or attribution graphs to a browser.

clt serve activations --root ./server_data
clt serve graphs --root graphs --features features --model gpt2 --transcoder runs/gpt2/final

Set CLT_SERVER_TOKEN to the token clients must send; without one the server only listens on this machine.
"""

import os
import socket
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
import uvicorn
from fastapi import FastAPI
from rich.console import Console

from clt.data.client import TOKEN_VARIABLE
from clt.errors import ConfigError
from clt.serve.activation_server import MAX_BODY_BYTES, create_app, require_token_off_loopback


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to serve, and where."""

    what: Annotated[Literal["activations", "graphs"], tyro.conf.Positional] = "activations"
    """What to serve."""
    root: str | None = None
    """Folder of the data sets (default ./server_data) or of the graphs (default ./graphs); also one single graph."""
    host: str = "127.0.0.1"
    """Address to listen on; others than this machine's own need a token."""
    port: int = 8000
    """Port to listen on."""
    max_body_bytes: int = MAX_BODY_BYTES
    """activations: largest request."""
    quota_bytes: int | None = None
    """activations: the root may hold this much; None: as much as the disk."""
    features: str | None = None
    """graphs: folder of the transcoder's feature examples; labels are kept there too."""
    images: str | None = None
    """graphs: folder of the images that the examples name."""
    model: Annotated[str | None, tyro.conf.arg(aliases=("--model-name",))] = None
    """graphs: host to steer live, a Hugging Face id, a folder or world:NAME; with --transcoder."""
    transcoder: Annotated[str | None, tyro.conf.arg(aliases=("--clt",))] = None
    """graphs: folder of the transcoder whose features are steered."""
    device: str | None = None
    """graphs: where the host runs; None: the GPU if there is one."""
    max_new_tokens: int = 24
    """graphs: length of the answers shown when steering."""
    open: bool = False
    """graphs: open the page in this machine's browser."""

    def __post_init__(self) -> None:
        if not 0 < self.port < 2**16:
            raise ConfigError(f"port = {self.port} must be between 1 and 65535.")
        if (self.model is None) != (self.transcoder is None):
            raise ConfigError("Live steering needs both --model and --transcoder, but only one of them is given.")
        given = [
            f"--{name}" for name in ("features", "images", "model", "transcoder") if getattr(self, name) is not None
        ]
        if self.what == "activations" and given:
            raise ConfigError(f"{', '.join(given)} belongs to `clt serve graphs`, not to `clt serve activations`.")


def main(options: Options) -> None:
    """Serve until interrupted."""
    token = os.environ.get(TOKEN_VARIABLE)
    require_token_off_loopback(options.host, token)
    if options.what == "activations":
        root = options.root or "./server_data"
        limits = {"max_body_bytes": options.max_body_bytes, "quota_bytes": options.quota_bytes}
        uvicorn.run(create_app(root, token=token, **limits), host=options.host, port=options.port)
        return
    _require_free_port(options.host, options.port)
    app = _graph_app(options, token)
    name = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{name}:{options.port}/" + (f"?token={token}" if token else "")
    Console().print(f"Graphs of {options.root or './graphs'}: {address}   (Ctrl-C stops)", soft_wrap=True, markup=False)
    if options.open:
        webbrowser.open(address)
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")


def _require_free_port(host: str, port: int) -> None:
    """Before a model is loaded and an address printed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"Cannot listen on {host}, port {port}: {error.strerror}. Try --port {port + 1}."
            ) from None


def _graph_app(options: Options, token: str | None) -> FastAPI:
    from clt.serve import graph_server
    from clt.serve.browser_guard import hosts_of
    from clt.serve.graph_library import GraphLibrary

    features, images = (None if name is None else Path(name) for name in (options.features, options.images))
    library = GraphLibrary(Path(options.root or "./graphs"), features, images)
    steering = None
    if options.model is not None and options.transcoder is not None:
        from clt.replacement.loading import open_pair
        from clt.serve.live_steering import LiveSteering

        adapter, transcoder = open_pair(options.model, options.transcoder, {"device": options.device})
        steering = LiveSteering(adapter, transcoder, options.max_new_tokens)
    return graph_server.create_app(library, steering=steering, hosts=hosts_of(options.host), token=token)
