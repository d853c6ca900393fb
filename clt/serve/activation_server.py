"""The activation server: crosslayer-coding's routes, and ours for whole batches and resumable uploads."""

import errno
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any, no_type_check

import numpy as np
import torch
from fastapi import Body, FastAPI, File, Header, Query, Request, Response, UploadFile
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from jaxtyping import Int64
from pydantic import BaseModel, Field

from clt import __version__
from clt.data.files import sha256_of
from clt.data.metadata import INDEX_FILE, METADATA_FILE, STATISTICS_FILE
from clt.data.sampler import Runs
from clt.data.wire import pack_rows
from clt.errors import DatasetError
from clt.serve.activation_storage import DatasetStorage, Refused
from clt.serve.guards import Guards
from clt.serve.parts import PartsResponse
from clt.serve.slices import chunk_file, read_slice

MAX_BODY_BYTES = 64 * 2**30
MAX_ROWS = 1_000_000
"""Rows per request."""

Chunk = Annotated[int, PathParameter(ge=0, le=10**9 - 1)]
Overwrite = Annotated[bool, Header(alias="X-Overwrite")]
Checksum = Annotated[str | None, Header(alias="X-Checksum-SHA256")]


RowNumber = Annotated[int, Field(ge=0, le=2**31)]


class SliceRequest(BaseModel):
    """Which rows of one chunk."""

    rows: Annotated[list[RowNumber], Field(max_length=MAX_ROWS)]


class RowsRequest(BaseModel):
    """Runs `[shard, start, stop]` of a data set."""

    runs: Annotated[
        list[tuple[RowNumber, RowNumber, RowNumber]],
        Field(min_length=1, max_length=MAX_ROWS),
    ]


class FinishRequest(BaseModel):
    """The checksum of a whole uploaded file."""

    sha256: Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")]


def create_app(
    root: str | Path,
    *,
    token: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    quota_bytes: int | None = None,
) -> FastAPI:
    """The application; torch is set to one thread per request.

    Args:
        root: folder of the data sets.
        token: what clients must send; None only where nobody else can connect.
        max_body_bytes: largest request.
        quota_bytes: how much the root may hold.
    """
    # Requests run in threads of their own; more threads inside each would only wait for one another, spinning.
    torch.set_num_threads(1)
    storage = DatasetStorage(Path(root), quota_bytes)
    app = FastAPI(title="crosslayer activation server", version=__version__)
    _add_errors(app)
    _add_reading(app, storage)
    _add_seed_writing(app, storage)
    _add_uploads(app, storage)
    guards: list[Guards] = []

    def guarded(inner: Any) -> Guards:
        guards.append(Guards(inner, token, max_body_bytes))
        return guards[-1]

    app.add_middleware(guarded)  # pyright: ignore[reportArgumentType]

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> str:
        """Counters in Prometheus' text format."""
        return guards[-1].prometheus()

    return app


def _add_errors(app: FastAPI) -> None:
    # FastAPI's own answer repeats the input, which fails where that is no UTF-8.
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = [{"where": [str(part) for part in item["loc"]], "what": item["msg"]} for item in error.errors()]
        return JSONResponse({"detail": problems}, status_code=422)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=error.status)

    @app.exception_handler(DatasetError)
    async def damaged(_: Request, error: DatasetError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=409)

    @app.exception_handler(OSError)
    async def disk(_: Request, error: OSError) -> JSONResponse:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        detail = "The server's disk is full." if full else f"The server cannot do that ({error.strerror})."
        return JSONResponse({"detail": detail}, status_code=507 if full else 400)


def _add_reading(app: FastAPI, storage: DatasetStorage) -> None:
    @app.get("/api/v1/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "crosslayer": __version__}

    @app.get("/")
    def welcome() -> dict[str, str]:
        return {"message": "crosslayer activation server; see /docs"}

    @app.get("/datasets")
    def datasets() -> list[str]:
        return storage.list()

    @app.get("/datasets/{dataset_id:path}/info")
    def info(dataset_id: str) -> Response:
        return Response(storage.read(dataset_id, METADATA_FILE).read_bytes(), media_type="application/json")

    @app.get("/datasets/{dataset_id:path}/norm_stats")
    def norm_stats(dataset_id: str) -> Response:
        return Response(storage.read(dataset_id, STATISTICS_FILE).read_bytes(), media_type="application/json")

    @app.get("/datasets/{dataset_id:path}/manifest")
    def manifest(dataset_id: str) -> Response:
        return Response(storage.read(dataset_id, INDEX_FILE).read_bytes(), media_type="application/octet-stream")

    @app.get("/datasets/{dataset_id:path}/files/{name}")
    def file(dataset_id: str, name: str) -> FileResponse:
        return FileResponse(storage.read(dataset_id, name), media_type="application/octet-stream")

    @app.post("/datasets/{dataset_id:path}/slice")
    def slice_(dataset_id: str, request: SliceRequest, chunk: Annotated[int, Query(ge=0, le=10**9 - 1)]) -> Response:
        path = chunk_file(storage.folder(dataset_id), chunk)
        return Response(read_slice(path, request.rows), media_type="application/octet-stream")

    @app.post("/datasets/{dataset_id:path}/rows")
    def rows(dataset_id: str, request: RowsRequest) -> Response:
        source = storage.source(dataset_id)
        runs = np.array(request.runs, dtype=np.int64)
        _check_runs(runs, np.array([shard.tokens for shard in source.metadata.shards]))
        return PartsResponse(pack_rows(source.read(runs)))


def _check_runs(runs: Runs, shard_tokens: Int64[np.ndarray, " shard"]) -> None:
    shard, start, stop = runs.T
    known = shard_tokens[np.minimum(shard, len(shard_tokens) - 1)]
    bad = np.flatnonzero((shard >= len(shard_tokens)) | (start >= stop) | (stop > known))
    if len(bad):
        raise Refused(400, f"There is no run of rows {start[bad[0]]} to {stop[bad[0]]} in shard {shard[bad[0]]}.")
    if (stop - start).sum() > MAX_ROWS:
        raise Refused(400, f"More than {MAX_ROWS:,} rows were asked for at once.")


def _add_seed_writing(app: FastAPI, storage: DatasetStorage) -> None:
    # FastAPI hands over starlette's UploadFile under its own annotation, which a run-time check refuses.
    @app.post("/datasets/{dataset_id:path}/chunks/{index}", status_code=201)
    @no_type_check
    def chunk(
        dataset_id: str,
        index: Chunk,
        chunk_file: Annotated[UploadFile, File()],
        checksum: Checksum = None,
        overwrite: Overwrite = False,
    ) -> dict[str, str]:
        folder = storage.folder(dataset_id)
        storage.require_room(chunk_file.size or 0)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".chunk_", suffix=".part", delete=False) as file:
            while block := chunk_file.file.read(8 * 2**20):
                file.write(block)
        found = storage.save_chunk(dataset_id, f"chunk_{index}.h5", Path(file.name), checksum, overwrite)
        return {"status": "ok", "sha256": found}

    @app.post("/datasets/{dataset_id:path}/manifest", status_code=201)
    @no_type_check
    def manifest(
        dataset_id: str, manifest_file: Annotated[UploadFile, File()], overwrite: Overwrite = False
    ) -> dict[str, str]:
        storage.save(dataset_id, INDEX_FILE, manifest_file.file.read(), overwrite=overwrite)
        return {"status": "ok"}

    @app.post("/datasets/{dataset_id:path}/metadata", status_code=201)
    def metadata(
        dataset_id: str, content: Annotated[dict[str, Any], Body()], overwrite: Overwrite = False
    ) -> dict[str, str]:
        storage.save(dataset_id, METADATA_FILE, json.dumps(content, indent=2).encode(), overwrite=overwrite)
        return {"status": "ok"}

    @app.post("/datasets/{dataset_id:path}/norm_stats", status_code=201)
    def norm_stats(
        dataset_id: str, content: Annotated[dict[str, Any], Body()], overwrite: Overwrite = False
    ) -> dict[str, str]:
        storage.save(dataset_id, STATISTICS_FILE, json.dumps(content).encode(), overwrite=overwrite)
        return {"status": "ok"}


def _add_uploads(app: FastAPI, storage: DatasetStorage) -> None:
    @app.get("/datasets/{dataset_id:path}/uploads/{name}")
    def received(dataset_id: str, name: str) -> dict[str, Any]:
        """How much of an unfinished upload has arrived, and the SHA-256 of the finished file, if there is one."""
        part, final = storage.part(dataset_id, name), storage.folder(dataset_id) / name
        finished = sha256_of(final) if final.is_file() else None
        return {"received": part.stat().st_size if part.exists() else 0, "sha256": finished}

    @app.put("/datasets/{dataset_id:path}/uploads/{name}")
    async def append(
        dataset_id: str, name: str, request: Request, offset: Annotated[int, Query(ge=0)]
    ) -> dict[str, int]:
        """Add bytes to an upload; a broken connection keeps what has arrived."""
        part = storage.part(dataset_id, name)
        storage.require_room(int(request.headers.get("content-length", 0)))
        return {"received": await storage.append(part, offset, request.stream())}

    @app.post("/datasets/{dataset_id:path}/uploads/{name}", status_code=201)
    def finish(dataset_id: str, name: str, request: FinishRequest, overwrite: Overwrite = False) -> dict[str, str]:
        """Check the whole file and make it visible."""
        part = storage.part(dataset_id, name)
        if not part.exists():
            raise Refused(404, f"No upload of {name} was begun.")
        return {"sha256": storage.save_chunk(dataset_id, name, part, request.sha256, overwrite)}


def require_token_off_loopback(host: str, token: str | None) -> None:
    """Refuse to serve strangers without a token.

    Raises:
        Refused: the address can be reached from elsewhere.
    """
    if token is None and host not in ("127.0.0.1", "localhost", "::1"):
        raise Refused(
            401,
            f"host = {host!r} can be reached from other machines, so a token is needed: set CLT_SERVER_TOKEN, or bind "
            "to 127.0.0.1.",
        )
