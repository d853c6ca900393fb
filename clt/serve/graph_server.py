"""The graph browser's server: a page, graphs from a folder, edges on request, notes kept, features steered."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from importlib import resources
from typing import Annotated, Any, Literal

from fastapi import Body, FastAPI, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.middleware.gzip import GZipMiddleware

from clt import __version__
from clt.errors import CLTError, ConfigError, GraphError
from clt.serve.browser_guard import BrowserGuard
from clt.serve.dose import Dose, Steering
from clt.serve.graph_library import GraphLibrary

PAGE = resources.files("clt").joinpath("viz", "static")
"""Built by `make web` from web/."""
_TYPES = {"index.html": "text/html", "graphs.js": "text/javascript", "graphs.css": "text/css"}
MOST_PINNED = 2000

Number = Annotated[int, PathParameter(ge=0, le=10**9)]


class AmongRequest(BaseModel):
    """Between which nodes."""

    nodes: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MOST_PINNED)]


class SteerRequest(BaseModel):
    """A dose as the page sends it."""

    layer: Annotated[int, Field(ge=0, le=10**6)]
    feature: Annotated[int, Field(ge=0, le=10**9)]
    position: Annotated[int, Field(ge=0, le=10**9)] | None
    mode: Literal["scale", "add", "set"]
    value: Annotated[float, Field(allow_inf_nan=False)]


def create_app(
    library: GraphLibrary,
    *,
    steering: Steering | None = None,
    hosts: Collection[str] | None = ("127.0.0.1", "localhost", "::1"),
    token: str | None = None,
) -> FastAPI:
    """The application.

    Args:
        library: the graphs.
        steering: host and transcoder, if features are to be steered.
        hosts: names the server may be opened under; None: any, which needs a token.
        token: what a browser must bring once; None only where nobody else can connect.

    Raises:
        ConfigError: any name without a token.
    """
    if hosts is None and token is None:
        raise ConfigError("A server that others can reach needs a token. Set CLT_SERVER_TOKEN, or bind to 127.0.0.1.")
    app = FastAPI(title="crosslayer graphs", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app)
    _add_page(app)
    _add_reading(app, library, steering)
    _add_writing(app, library, steering)
    app.add_middleware(GZipMiddleware, minimum_size=2**14, compresslevel=3)
    app.add_middleware(BrowserGuard, hosts=hosts, token=token)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = "; ".join(f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors())
        return JSONResponse({"detail": problems}, status_code=422)

    @app.exception_handler(GraphError)
    async def no_graph(_: Request, error: GraphError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=404 if "There is no" in str(error) else 422)

    @app.exception_handler(CLTError)
    async def refused(_: Request, error: CLTError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=422)

    @app.exception_handler(OSError)
    async def disk(_: Request, error: OSError) -> JSONResponse:
        return JSONResponse({"detail": f"The server cannot do that ({error.strerror})."}, status_code=500)


def _add_page(app: FastAPI) -> None:
    def file(name: str) -> Response:
        return Response(PAGE.joinpath(name).read_bytes(), media_type=f"{_TYPES[name]}; charset=utf-8")

    @app.get("/")
    def page() -> Response:
        return file("index.html")

    @app.get("/graphs.js")
    def script() -> Response:
        return file("graphs.js")

    @app.get("/graphs.css")
    def style() -> Response:
        return file("graphs.css")


def _add_reading(app: FastAPI, library: GraphLibrary, steering: Steering | None) -> None:
    @app.get("/api/graphs")
    def graphs() -> dict[str, Any]:
        entries, refused = library.entries()
        return {
            "graphs": [entry.to_dict() for entry in entries],
            "folder": str(library.root),
            "refused": refused,
            "can_steer": steering is not None,
            "can_save": True,
        }

    @app.get("/api/graphs/{slug}")
    def graph(slug: str) -> JSONResponse:
        view = library.view(slug)
        content = view.to_dict()
        content["explained"] = {key: asdict(label) for key, label in library.explained(slug).items()}
        content["notes"] = library.notes(slug)
        content["has_examples"] = library.files is not None
        return JSONResponse(content)

    @app.get("/api/graphs/{slug}/links/{node}")
    def links(slug: str, node: Number) -> JSONResponse:
        view = library.view(slug)
        if node >= view.n_nodes:
            raise GraphError(f"There is no node {node}: the graph has {view.n_nodes:,}.")
        return JSONResponse(view.links(node))

    @app.get("/api/graphs/{slug}/overview")
    def overview(slug: str) -> JSONResponse:
        return JSONResponse(library.view(slug).overview())

    @app.get("/api/graphs/{slug}/features/{layer}/{feature}")
    def examples(slug: str, layer: Number, feature: Number) -> JSONResponse:
        library.entry(slug)
        return JSONResponse(library.examples(layer, feature))

    @app.post("/api/graphs/{slug}/among")
    def among(slug: str, request: AmongRequest) -> JSONResponse:
        view = library.view(slug)
        if any(node >= view.n_nodes for node in request.nodes):
            raise GraphError(f"There is no node {max(request.nodes)}: the graph has {view.n_nodes:,}.")
        return JSONResponse(view.among(request.nodes))


def _add_writing(app: FastAPI, library: GraphLibrary, steering: Steering | None) -> None:
    @app.put("/api/graphs/{slug}/notes")
    def save(slug: str, notes: Annotated[dict[str, Any], Body()]) -> dict[str, bool]:
        library.save_notes(slug, notes)
        return {"saved": True}

    @app.post("/api/graphs/{slug}/steer")
    def steer(slug: str, request: SteerRequest) -> JSONResponse:
        if steering is None:
            raise ConfigError("Live steering needs the model: start `clt serve graphs` with --model and --transcoder.")
        return JSONResponse(steering.steer(library.view(slug), Dose(**request.model_dump())))
