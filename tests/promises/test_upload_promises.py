"""The VLM seeds' upload command, with the real client against a small Hub on loopback."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from tests.promises.commands import SCRIPTS, smaller, words

UPLOAD = r"""python scripts/upload_activations_to_hf.py \
  --activations_dir /scratch/fkalghan/circuit_discovery_and_supression/benchmarks_llava/activations/amber \
  --repo_id KOKOSde/llava-amber-activations \
  --token YOUR_HF_TOKEN
"""
REPO = "/api/datasets/KOKOSde/llava-amber-activations"


class Hub(BaseHTTPRequestHandler):
    """One repository; every file is a plain git blob."""

    def log_message(self, *_):
        pass

    def answer(self, values, status=200):
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.serve(b"")

    def do_POST(self):
        self.serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def serve(self, body):
        hub = self.server
        hub.requests.append((self.command, self.path))
        info = {"id": REPO[14:], "sha": "0" * 40, "private": hub.private, "siblings": []}
        if self.headers.get("Authorization") != "Bearer YOUR_HF_TOKEN":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            if hub.private is None:
                hub.private = json.loads(body).get("visibility") == "private"
            self.answer({"url": f"http://{self.headers['Host']}/datasets{REPO[13:]}", "name": REPO[14:]})
        elif self.path == f"{REPO}/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            known = [{"oid": git_blob(hub.files[name])} if name in hub.files else {} for name in names]
            more = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": name, **more, **oid} for name, oid in zip(names, known)]})
        elif self.path == f"{REPO}/commit/main":
            files = [json.loads(line)["value"] for line in body.splitlines() if b'"file"' in line]
            hub.files.update({file["path"]: base64.b64decode(file["content"]) for file in files})
            hub.commits.append([file["path"] for file in files])
            url = f"http://{self.headers['Host']}/datasets{REPO[13:]}/commit/{'1' * 40}"
            self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""})
        elif self.path.split("?")[0] in (REPO, f"{REPO}/revision/main"):
            self.answer(info)
        else:
            self.answer({"error": "not found"}, 404)


def git_blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.commits, server.requests, server.private = {}, [], [], None
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def upload(hub, tmp_path):
    folder = tmp_path / "amber"
    (folder / "L0").mkdir(parents=True)
    (folder / "L0" / "batch_0_x.pt").write_bytes(b"inputs")
    (folder / "L0" / "batch_0_y.pt").write_bytes(b"targets")
    (folder / "L0" / ".batch_1_x.pt.tmp").write_bytes(b"half")
    arguments = smaller(words(UPLOAD), activations_dir=folder)

    def run(arguments=arguments, *more, **environment):
        return subprocess.run(
            [sys.executable, str(SCRIPTS / "upload_activations_to_hf.py"), *arguments, *more],
            capture_output=True, text=True, timeout=60,
            env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
                 "PYTHONPATH": str(SCRIPTS.parent),
                 "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", **environment},
        )  # fmt: skip

    run.folder, run.arguments = folder, arguments
    return run


def test_the_command_uploads_the_folder_once_and_prints_no_token(upload, hub):
    answer = upload()
    assert answer.returncode == 0, (answer.stderr, hub.requests)
    assert hub.files == {"L0/batch_0_x.pt": b"inputs", "L0/batch_0_y.pt": b"targets"}
    assert hub.private is False
    assert "YOUR_HF_TOKEN" not in answer.stdout + answer.stderr
    (upload.folder / "L0" / "batch_1_x.pt").write_bytes(b"more")
    again = upload(upload.arguments[:-2], HF_TOKEN="YOUR_HF_TOKEN")
    assert again.returncode == 0, again.stderr
    assert hub.commits[1:] == [["L0/batch_1_x.pt"]], "only what the Hub lacks is sent"


def test_private_is_private_and_a_public_repository_is_not_taken_for_it(upload, hub):
    assert upload(upload.arguments, "--private").returncode == 0
    assert hub.private is True
    answer = upload()
    assert answer.returncode == 2
    assert "is private, not public" in answer.stderr


def test_a_wrong_token_is_refused_in_words_and_not_printed(upload, hub):
    answer = upload(smaller(upload.arguments, token="hf_secret"))
    assert answer.returncode == 2
    assert "write access" in answer.stderr
    assert "hf_secret" not in answer.stdout + answer.stderr
    assert hub.files == {}
