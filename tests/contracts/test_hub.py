"""`hf://` addresses, read with the real client from a small stand-in for the Hub."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

import pytest
import torch

from clt.data import LocalActivationStore
from tests.tiny_data import write_data

REPOSITORY, FOLDER, REVISION, COMMIT = "someone/activations", "gpt2/pile", "v1", "c" * 40
READ = """
import sys, torch
from clt.data import LocalActivationStore
from clt.errors import DatasetError
torch.set_num_threads(1)
try:
    store = LocalActivationStore(sys.argv[1], batch_size_tokens=50, seed=3)
    store.verify()
    torch.save([(b.inputs, b.targets, b.kind, b.sample) for b in (next(store) for _ in range(4))], sys.argv[2])
except DatasetError as error:
    sys.exit(str(error))
"""


class Hub(BaseHTTPRequestHandler):
    """The routes that reading a data set needs; private: they want the token."""

    root: Path
    ranges: list[str]

    def do_HEAD(self):
        self.answer_file(send=False)

    def do_GET(self):
        path = unquote(self.path).split("?")[0]
        if "/tree/" in path:
            folder = path.split(f"/tree/{REVISION}")[1].strip("/")
            if not (self.root / folder).is_dir():
                return self.answer(404, b"{}", code="EntryNotFound")
            found = sorted((self.root / folder).iterdir())
            return self.answer_json([self.entry(str(file.relative_to(self.root))) for file in found])
        if path.startswith(f"/api/datasets/{REPOSITORY}"):
            return self.answer_json({"_id": "0", "id": REPOSITORY, "sha": COMMIT, "siblings": []})
        return self.answer_file(send=True)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        paths = parse_qs(body).get("paths") or json.loads(body)["paths"]
        found = [path for path in paths if (self.root / path).exists()]
        self.answer_json([self.entry(path) for path in found])

    def entry(self, path):
        file = self.root / path
        return {
            "type": "file" if file.is_file() else "directory",
            "path": path,
            "size": file.stat().st_size,
            "oid": "o",
        }

    def answer_json(self, content):
        if self.headers.get("Authorization") != "Bearer hf_secret":
            return self.answer(401, b"{}")
        return self.answer(200, json.dumps(content).encode())

    def answer_file(self, send):
        _, _, path = unquote(self.path).split("?")[0].partition("/resolve/")
        revision, _, path = path.partition("/")
        if self.headers.get("Authorization") != "Bearer hf_secret" or revision not in (REVISION, COMMIT):
            return self.answer(401, b"")
        data, status = (self.root / path).read_bytes(), 200
        if span := self.headers.get("Range"):
            self.ranges.append(span)
            first, last = span.removeprefix("bytes=").split("-")
            data, status = data[int(first) : int(last) + 1], 206
        return self.answer(status, data, send)

    def answer(self, status, data, send=True, code=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", COMMIT)
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if send:
            self.wfile.write(data)

    def log_message(self, format, *args):
        """Quiet."""


@pytest.fixture
def hub(tmp_path):
    """The stand-in's address; its `ranges` are what was asked for."""
    write_data(tmp_path / "hub" / FOLDER)
    handler = type("Handler", (Hub,), {"root": tmp_path / "hub", "ranges": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def read(address, url, target, token="hf_secret"):
    settings = {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HOME": str(target.parent / "hf")}
    command = [sys.executable, "-c", READ, url, str(target)]
    environment = {**os.environ, **settings}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_batches_of_a_private_repository_are_those_of_the_folder_and_read_by_ranges(hub, tmp_path):
    address, handler = hub
    answer = read(address, f"hf://datasets/{REPOSITORY}@{REVISION}/{FOLDER}", tmp_path / "found.pt")
    assert answer.returncode == 0, answer.stderr[-2000:]
    store = LocalActivationStore(tmp_path / "hub" / FOLDER, batch_size_tokens=50, seed=3)
    for found in torch.load(tmp_path / "found.pt"):
        batch = next(store)
        for one, other in zip(found, (batch.inputs, batch.targets, batch.kind, batch.sample), strict=True):
            assert torch.equal(one, other)
    assert len(handler.ranges) > 8


def test_one_damaged_byte_on_the_hub_is_noticed(hub, tmp_path):
    shard = sorted((tmp_path / "hub" / FOLDER).glob("shard_*"))[-1]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    answer = read(hub[0], f"hf://datasets/{REPOSITORY}@{REVISION}/{FOLDER}", tmp_path / "found.pt")
    assert answer.returncode == 1
    assert f"{shard.name} has the SHA-256" in answer.stderr


@pytest.mark.parametrize(("path", "token"), [("nowhere", "hf_secret"), (FOLDER, "hf_wrong")])
def test_a_missing_folder_or_a_wrong_token_is_said(hub, tmp_path, path, token):
    url = f"hf://datasets/{REPOSITORY}@{REVISION}/{path}"
    answer = read(hub[0], url, tmp_path / "found.pt", token)
    assert answer.returncode == 1
    assert f"{url}/metadata.json cannot be read" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert token not in answer.stderr
