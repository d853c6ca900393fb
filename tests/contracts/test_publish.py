"""Generation that uploads as it goes: nothing lost, nothing deleted too early, read back equal."""

import json

import httpx
import pytest
import torch
from fastapi.testclient import TestClient

from clt.activation_generation import ActivationGenerator
from clt.config import ActivationConfig
from clt.data import LocalActivationStore, RemoteActivationStore
from clt.errors import ConfigError, DatasetError
from clt.serve.activation_server import create_app
from tests.contracts.serving import serving
from tests.contracts.test_stores import through
from tests.tiny_hosts import tiny_adapter

ID = "tiny/text_train"


@pytest.fixture(scope="module")
def llama():
    return tiny_adapter("llama")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} "}) + "\n" for i in range(40)))
    return path


def config_of(text, **options):
    defaults = {
        "model_name": "tiny",
        "dataset_path": str(text),
        "activation_dir": str(text.parent / "activations"),
        "context_size": 16,
        "chunk_token_threshold": 100,
        "held_out_fraction": 0.0,
        "upload_initial_backoff": 0.001,
        "remote_server_url": "http://server",
    }
    return ActivationConfig(**{**defaults, **options})


@pytest.fixture
def on(monkeypatch):
    """Let every client reach an application, or what stands in for one, in this process."""

    def patch(transport):
        plain = httpx.Client

        def client(**options):
            return plain(**{**options, "transport": transport})

        monkeypatch.setattr("clt.data.client.httpx.Client", client)

    return patch


def rows(store):
    batch = next(store.one_pass())
    return batch.select((batch.sample * 1000 + batch.position).argsort())


@pytest.mark.parametrize("output_format", ["safetensors", "hdf5"])
def test_what_is_uploaded_is_what_was_made(text, llama, tmp_path, output_format):
    with serving(tmp_path / "served") as address:
        config = config_of(text, remote_server_url=address, output_format=output_format)
        folder = ActivationGenerator(config, llama).run()
        remote = RemoteActivationStore(address, ID, batch_size_tokens=10_000)
        here, there = rows(LocalActivationStore(folder, batch_size_tokens=10_000)), rows(remote)
    for name in ("inputs", "targets", "kind", "sample", "position"):
        assert torch.equal(getattr(here, name), getattr(there, name))
    for path in (tmp_path / "served" / ID).iterdir():
        if path.suffix != ".json":
            assert path.read_bytes() == (folder / path.name).read_bytes()


def test_shards_are_deleted_only_after_the_server_has_them(text, llama, tmp_path, on):
    root = tmp_path / "served"
    inner, full = through(create_app(root)), [True]

    def answer(request):
        finishing = request.method == "POST" and b"shard_00002" in request.url.raw_path
        return httpx.Response(507, text="disk full") if finishing and full[0] else inner.handle_request(request)

    on(httpx.MockTransport(answer))
    config = config_of(text, delete_after_upload=True)
    with pytest.raises(DatasetError, match="answered 507"):
        ActivationGenerator(config, llama).run()
    here = {path.name for path in (tmp_path / "activations" / ID).glob("shard_*")}
    there = {path.name for path in (root / ID).glob("shard_*")}
    assert "shard_00002.safetensors" in here - there
    assert not (root / ID / "metadata.json").exists()

    full[0] = False
    folder = ActivationGenerator(config, llama).run()
    assert not list(folder.glob("shard_*"))
    plain = ActivationGenerator(
        config_of(text, remote_server_url=None, activation_dir=str(tmp_path / "plain")), llama
    ).run()
    for path in plain.glob("shard_*"):
        assert (root / ID / path.name).read_bytes() == path.read_bytes()


def test_the_seeds_server_takes_hdf5_and_only_that(text, llama, tmp_path, on):
    app = create_app(tmp_path / "served")
    inner = TestClient(app)

    def answer(request):
        path = request.url.raw_path.decode()
        if "health" in path:
            return httpx.Response(200, json={"status": "ok"})
        assert "/uploads/" not in path
        found = inner.request(request.method, path, content=request.read(), headers=dict(request.headers))
        return httpx.Response(found.status_code, content=found.content)

    on(httpx.MockTransport(answer))
    ActivationGenerator(config_of(text, output_format="hdf5"), llama).run()
    assert len(list((tmp_path / "served" / ID).glob("chunk_*.h5"))) > 2
    with pytest.raises(ConfigError, match="only takes HDF5"):
        ActivationGenerator(config_of(text, activation_dir=str(tmp_path / "other")), llama).run()


def test_deleting_without_a_server_is_refused():
    with pytest.raises(ConfigError, match="remote_server_url is not set"):
        ActivationConfig(model_name="m", dataset_path="d", delete_after_upload=True)
