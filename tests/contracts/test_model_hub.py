"""Transcoders pushed to and fetched from the Hub, with the real client against a small stand-in on loopback."""

import base64
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch

from clt.__main__ import main
from clt.models import CrossLayerTranscoder
from tests.identities.test_foreign_formats import random_clt
from tests.tiny_data import write_data

REPO, TOKEN = "someone/tiny-clt", "hf_secret"


class Hub(BaseHTTPRequestHandler):
    """One model repository with numbered commits; safetensors files are named by their sha256."""

    def log_message(self, *_):
        pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        self.serve(b"")

    do_HEAD = do_GET

    def do_POST(self):
        self.serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def serve(self, body):
        hub, path = self.server, self.path.split("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            return self.answer({"url": f"http://{self.headers['Host']}/{REPO}", "name": REPO})
        if path == f"/api/models/{REPO}/preupload/main":
            files = json.loads(body)["files"]
            return self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        if path == f"/api/models/{REPO}/commit/main":
            files = [json.loads(line)["value"] for line in body.splitlines() if b'"file"' in line]
            hub.commits.append({f["path"]: base64.b64decode(f["content"]) for f in files})
            url = f"http://{self.headers['Host']}/{REPO}/commit/{sha(len(hub.commits))}"
            return self.answer(
                {"success": True, "commitOid": sha(len(hub.commits)), "commitUrl": url, "hookOutput": ""}
            )
        if path.startswith(f"/api/models/{REPO}"):
            _, _, kind, revision = [*path.removeprefix("/api/models/").split("/"), "", "main"][:4]
            return self.listing(kind, revision)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        return self.file(path)

    def listing(self, kind, revision):
        hub = self.server
        named = {"main": len(hub.commits), **hub.tags, **{sha(n): n for n in range(1, len(hub.commits) + 1)}}
        if revision not in named:
            return self.answer({}, 404, X_Error_Code="RevisionNotFound")
        files = hub.commits[named[revision] - 1] if hub.commits else {}
        if kind == "tree":
            return self.answer([entry(name, content) for name, content in files.items()])
        names = [{"rfilename": name} for name in files]
        return self.answer({"_id": "0", "id": REPO, "sha": sha(named[revision]), "siblings": names, "private": False})

    def file(self, path):
        commit, _, name = path.removeprefix(f"/{REPO}/resolve/").partition("/")
        number = int(commit, 16)
        content = self.server.commits[number - 1][name]
        info = entry(name, content)
        etag = info["lfs"]["oid"] if "lfs" in info else info["oid"]
        return self.answer(content, X_Repo_Commit=commit, ETag=f'"{etag}"')


def entry(name, content):
    """A file in a listing; weights are stored by their sha256."""
    digest = hashlib.sha256(content).hexdigest()
    large = {"lfs": {"oid": digest, "size": len(content), "pointerSize": 1}} if name.endswith("safetensors") else {}
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest(), **large}


def sha(number):
    return f"{number:040x}"


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.commits, server.tags = [], {}
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def clt(hub, home, *arguments, token=TOKEN):
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": token, "HF_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-m", "clt", *map(str, arguments)], capture_output=True, text=True, timeout=120,
        env={**os.environ, **settings, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
    )  # fmt: skip


def test_pushed_and_fetched_it_is_the_same_and_an_old_revision_stays(hub, tmp_path):
    models = [random_clt(), random_clt(n_targets=1)]
    for number, model in enumerate(models, start=1):
        model.save_pretrained(tmp_path / str(number))
        if number == 1:
            looked_at = clt(hub, tmp_path / "home", "push", "--clt", tmp_path / "1", "--repo", REPO)
            assert "Nothing was uploaded" in looked_at.stdout, looked_at.stderr
            assert not hub.commits
        pushed = clt(hub, tmp_path / "home", "push", "--clt", tmp_path / str(number), "--repo", REPO, "--yes")
        assert pushed.returncode == 0, pushed.stderr
        assert TOKEN not in pushed.stdout + pushed.stderr
    card = hub.commits[0]["README.md"].decode()
    assert "library_name: crosslayer" in card
    assert "| Layers, features per layer | 3, 6 |" in card
    assert "No held-out evaluation" in card
    hub.tags["v1"] = 1
    for number, revision in ((2, []), (1, ["--revision", "v1"])):
        fetched = clt(hub, tmp_path / "home", "import", REPO, tmp_path / f"fetched{number}", *revision)
        assert fetched.returncode == 0, fetched.stderr
        again = CrossLayerTranscoder.from_pretrained(tmp_path / f"fetched{number}")
        for one, other in zip(models[number - 1].parameters(), again.parameters(), strict=True):
            assert torch.equal(one, other)


def test_the_card_holds_the_command_that_trains_the_same_weights(hub, tmp_path):
    for split in ("train", "held_out"):
        write_data(tmp_path / "my data" / split)
    options = "--num-features 16 --activation-fn topk --topk-k 4 --training-steps 3 --gradient-clip-val None --seed 7"
    given = ["train", "--data", str(tmp_path / "my data"), "--output-dir", str(tmp_path / "run")]
    main([*given, *options.split(), "--no-write-final-folder", "--log-interval", "1"])
    main(["evaluate", "--clt", str(tmp_path / "run"), "--data", str(tmp_path / "my data"), "--no-plots"])
    flags = ["--clt", tmp_path / "run", "--repo", REPO, "--license", "mit"]
    assert clt(hub, tmp_path / "home", "push", *flags, "--yes").returncode == 0
    card = hub.commits[0]["README.md"].decode()
    assert "license: mit" in card
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert f"| Data | {tmp_path / 'my data' / 'train'}, fingerprint {record['data']['fingerprint']} |" in card
    measured = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert f"| nmse | {measured['nmse']:.4g} |" in card
    assert f"| dead_share | {measured['dead_share']:.4g} |" in card

    command = shlex.split(re.search(r"```sh\n(.*?)\n```", card, re.S)[1].replace("\\\n", ""))
    assert command[:4] == ["clt", "train", "--output-dir", "runs/again"]
    assert "--log-interval" not in command, "it does not decide the result"
    command[3] = str(tmp_path / "again")
    main(command[1:])
    first, again = ((tmp_path / name / "clt.safetensors").read_bytes() for name in ("run", "again"))
    assert first == again

    refused = clt(hub, tmp_path / "home", "push", *flags[:-1], "apache-2.0", "--yes")
    assert refused.returncode == 2
    assert "does not say `license: apache-2.0`" in refused.stderr
    assert len(hub.commits) == 1


def test_a_token_given_as_a_flag_is_not_in_what_is_uploaded(tmp_path, monkeypatch):
    data = write_data(tmp_path / "data")
    for number, given in enumerate((["--server-token", "secret"], ["--server_token=secret"])):
        run = tmp_path / str(number)
        options = "train --num-features 8 --activation-fn topk --topk-k 2 --training-steps 2 --output-dir"
        words = ["clt", *options.split(), str(run), "--data", str(data), *given]
        monkeypatch.setattr(sys, "argv", words)
        main()
        record = (run / "run.json").read_text()
        assert "secret" not in record
        assert "***" in record
        assert str(data) in json.loads(record)["command"]


def test_what_goes_wrong_is_said_and_nothing_is_kept(hub, tmp_path):
    random_clt().save_pretrained(tmp_path / "mine")
    home = tmp_path / "home"
    assert clt(hub, home, "push", "--clt", tmp_path / "mine", "--repo", REPO, "--yes").returncode == 0
    for words, arguments, token in (
        ("could not be written", ("push", "--clt", tmp_path / "mine", "--repo", REPO, "--yes"), "hf_wrong"),
        ("at revision v9", ("import", REPO, tmp_path / "out", "--revision", "v9"), TOKEN),
        ("is a local folder", ("import", tmp_path / "mine", tmp_path / "out", "--revision", "v9"), TOKEN),
    ):
        answer = clt(hub, home, *arguments, token=token)
        assert answer.returncode == 2
        assert words in answer.stderr
        assert token not in answer.stderr
        assert not (tmp_path / "out").exists()


def test_a_download_that_was_changed_on_the_way_is_not_used(hub, tmp_path, monkeypatch):
    random_clt().save_pretrained(tmp_path / "mine")
    home = tmp_path / "home"
    assert clt(hub, home, "push", "--clt", tmp_path / "mine", "--repo", REPO, "--yes").returncode == 0
    plain = Hub.file

    def changed(self, path):
        if path.endswith("clt.safetensors") and self.command == "GET":
            content = self.server.commits[0]["clt.safetensors"]
            return self.answer(content[:-1] + bytes([content[-1] ^ 1]), X_Repo_Commit=sha(1), ETag='"x"')
        return plain(self, path)

    monkeypatch.setattr(Hub, "file", changed)
    answer = clt(hub, home, "import", REPO, tmp_path / "out")
    assert answer.returncode == 2
    assert "was downloaded with the sha256" in answer.stderr
    monkeypatch.setattr(Hub, "file", plain)
    assert clt(hub, home, "import", REPO, tmp_path / "out").returncode == 0
