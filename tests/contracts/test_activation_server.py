"""The activation server: the seeds' routes and payloads, resumable uploads, and requests that mean harm."""

import io
import json
import signal
import subprocess
import sys
import threading
import time
from hashlib import sha256
from urllib.parse import quote

import h5py
import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clt.data import ActivationWriter, DatasetInfo
from clt.data.codecs import Codec
from clt.serve.activation_server import create_app, require_token_off_loopback
from clt.serve.activation_storage import Refused
from tests.contracts.serving import serving
from tests.tiny_data import sparse_batch, write_data

ID = "org/model/corpus_train"


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def client(root):
    with TestClient(create_app(root), raise_server_exceptions=True) as client:
        yield client


def chunk_bytes(layers=11, rows=6, width=4, seed=0):
    """A chunk as crosslayer-coding writes it, and its values `[layer, side, row, d_model]`."""
    values = np.random.default_rng(seed).standard_normal((layers, 2, rows, width)).astype(np.float32)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver="latest") as file:
        for layer in range(layers):
            file.create_dataset(f"layer_{layer}/inputs", data=values[layer, 0], compression="gzip")
            file.create_dataset(f"layer_{layer}/targets", data=values[layer, 1], compression="gzip")
    return buffer.getvalue(), values


def post_chunk(client, data, index=0, dataset=ID, **headers):
    url = f"/datasets/{quote(dataset, safe='')}/chunks/{index}"
    return client.post(url, files={"chunk_file": ("c.h5", data, "application/x-hdf5")}, headers=headers)


def test_the_seeds_client_can_store_and_read_everything(client, root):
    data, values = chunk_bytes()
    url = f"/datasets/{quote(ID, safe='')}"
    assert client.get("/api/v1/health").json()["status"] == "ok"
    assert post_chunk(client, data).status_code == 201
    assert client.post(f"{url}/manifest", files={"manifest_file": b"abc"}).status_code == 201
    assert client.post(f"{url}/metadata", json={"num_layers": 11}).status_code == 201
    assert client.post(f"{url}/norm_stats", json={"0": {}}).status_code == 201

    assert client.get(f"{url}/manifest").content == b"abc"
    assert client.get(f"{url}/info").json() == {"num_layers": 11}
    assert client.get(f"{url}/norm_stats").json() == {"0": {}}
    answer = client.post(f"{url}/slice?chunk=0", json={"rows": [4, 1, 1]})
    assert answer.status_code == 200
    assert answer.content == values[:, :, [1, 1, 4]].tobytes()
    assert (root / ID / "chunk_0.h5").read_bytes() == data
    assert client.get("/datasets").json() == [ID]


def test_status_codes_are_the_seeds(client):
    url = f"/datasets/{quote(ID, safe='')}"
    for name in ("info", "norm_stats", "manifest"):
        assert client.get(f"{url}/{name}").status_code == 404
    assert client.post(f"{url}/slice?chunk=0", json={"rows": [0]}).status_code == 404
    post_chunk(client, chunk_bytes()[0])
    assert client.post(f"{url}/slice?chunk=0", json={"rows": []}).status_code == 400
    assert client.post(f"{url}/slice?chunk=0", json={"rows": [6]}).status_code == 400
    assert client.post(f"{url}/slice?chunk=-1", json={"rows": [0]}).status_code == 422


@pytest.mark.parametrize("codec", [Codec(), Codec("hdf5")])
def test_our_formats_can_be_read_the_seeds_way(client, root, codec):
    batch = sparse_batch(layers=3, tokens=20)
    info = DatasetInfo(model_name="tiny", dataset="x", split="train", num_layers=3, d_model=8)
    with ActivationWriter(root / ID, info, dtype="float32", codec=codec) as writer:
        writer.append(batch)
    answer = client.post(f"/datasets/{ID}/slice?chunk=0", json={"rows": list(range(20))})
    found = torch.from_numpy(np.frombuffer(answer.content, np.float32).reshape(3, 2, 20, 8).copy())
    key = found[0, 0, :, 0].argsort()
    wanted = batch.inputs[0, :, 0].argsort()
    assert torch.equal(found[:, 0][:, key], batch.inputs[:, wanted])
    assert torch.equal(found[:, 1][:, key], batch.targets[:, wanted])


def test_a_chunk_that_arrived_damaged_is_refused_and_never_visible(client, root):
    data, _ = chunk_bytes()
    assert post_chunk(client, data, **{"X-Checksum-SHA256": "0" * 64}).status_code == 422
    assert post_chunk(client, data[: len(data) // 2]).status_code == 422
    assert post_chunk(client, b"no HDF5").status_code == 422
    assert not [path for path in root.rglob("*") if path.is_file()]
    assert post_chunk(client, data, **{"X-Checksum-SHA256": sha256(data).hexdigest()}).status_code == 201


def test_another_content_is_not_overwritten_unless_asked(client, root):
    first, second = chunk_bytes()[0], chunk_bytes(seed=1)[0]
    assert post_chunk(client, first).status_code == 201
    assert post_chunk(client, first).status_code == 201
    assert post_chunk(client, second).status_code == 409
    assert (root / ID / "chunk_0.h5").read_bytes() == first
    assert post_chunk(client, second, **{"X-Overwrite": "true"}).status_code == 201


def test_uploads_go_on_where_they_broke_off(client, root):
    data, _ = chunk_bytes()
    url = f"/datasets/{ID}/uploads/chunk_3.hdf5"
    assert client.get(url).json() == {"received": 0, "sha256": None}
    assert client.put(f"{url}?offset=0", content=data[:1000]).json() == {"received": 1000}
    assert client.put(f"{url}?offset=900", content=data[900:]).status_code == 409
    assert client.get(f"/datasets/{ID}/files/chunk_3.hdf5").status_code == 404
    client.put(f"{url}?offset=1000", content=data[1000:])
    assert client.post(url, json={"sha256": sha256(data).hexdigest()}).status_code == 201
    assert client.get(f"/datasets/{ID}/files/chunk_3.hdf5").content == data
    part = client.get(f"/datasets/{ID}/files/chunk_3.hdf5", headers={"Range": "bytes=8-15"})
    assert (part.status_code, part.content) == (206, data[8:16])


def test_a_token_is_needed_for_everything_but_health(root):
    with TestClient(create_app(root, token="secret")) as client:
        assert client.get("/api/v1/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            assert client.get("/datasets", headers=headers).status_code == 401
            assert client.get("/metrics", headers=headers).status_code == 401
        assert client.get("/datasets", headers={"Authorization": "Bearer secret"}).status_code == 200
    with pytest.raises(Refused, match="token is needed"):
        require_token_off_loopback("0.0.0.0", None)
    require_token_off_loopback("127.0.0.1", None)


def test_bodies_that_are_too_large_are_refused_whatever_they_claim(root):
    data, _ = chunk_bytes()

    def parts():
        for start in range(0, len(data), 1000):
            yield data[start : start + 1000]

    with TestClient(create_app(root, max_body_bytes=5000)) as client:
        assert post_chunk(client, data).status_code == 413
        assert client.put(f"/datasets/{ID}/uploads/chunk_0.h5?offset=0", content=parts()).status_code == 413
        assert client.get("/datasets").json() == []
    with TestClient(create_app(root / "other", quota_bytes=5000)) as client:
        assert post_chunk(client, data).status_code == 507


def test_metrics_count(client):
    client.get("/datasets")
    text = client.get("/metrics").text
    assert 'clt_requests_total{method="GET",status="200"} 1' in text
    assert "clt_sent_bytes_total 2" in text


ids = st.one_of(
    st.sampled_from(
        ["../x", "..", ".", "a/../../x", "/etc", "//etc/x", "%2e%2e%2fx", "..%2f..%2fx", "a//b", "a/./b", "~", "a\x00b"]
    ),
    st.text(max_size=30),
    st.from_regex(r"[a-z/.%2]{1,20}", fullmatch=True),
)
paths = st.sampled_from(
    [
        "",
        "/info",
        "/manifest",
        "/metadata",
        "/norm_stats",
        "/chunks/{}",
        "/slice?chunk={}",
        "/rows",
        "/uploads/{}",
        "/files/{}",
    ]
)
bodies = st.one_of(
    st.none(),
    st.binary(max_size=50),
    st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)).map(
        lambda value: json.dumps({"rows": value, "runs": value, "sha256": value}).encode()
    ),
    st.lists(st.lists(st.integers(-1, 9), max_size=4), max_size=3).map(
        lambda runs: json.dumps({"runs": runs}).encode()
    ),
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "PATCH"]),
    dataset=ids,
    path=paths,
    argument=st.one_of(st.integers(-2, 10**12).map(str), st.text(max_size=8), st.just("../../../etc/passwd")),
    body=bodies,
    is_multipart=st.booleans(),
    is_quoted=st.booleans(),
)
def test_no_request_leaves_the_root_or_breaks_the_server(
    client, root, method, dataset, path, argument, body, is_multipart, is_quoted
):
    outside = root.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "metadata.json").write_text("{}")
    if not (root / "x").exists():
        write_data(root / "x", layers=2, tokens=30)
    before = sorted(path for path in root.parent.rglob("*") if not path.is_relative_to(root))
    name = quote(dataset, safe="" if is_quoted else "/%")
    url = f"/datasets/{name}" + path.format(quote(argument, safe=""))
    content = (
        {"files": {"chunk_file": body or b"", "manifest_file": body or b""}} if is_multipart else {"content": body}
    )

    try:
        answer = client.request(method, url, **content)
    except httpx.InvalidURL:
        return
    assert answer.status_code < 500, (answer.status_code, answer.text)
    assert sorted(path for path in root.parent.rglob("*") if not path.is_relative_to(root)) == before
    assert (outside / "metadata.json").read_text() == "{}"
    assert b"root:" not in answer.content


def test_symbolic_links_out_of_the_root_are_not_followed(client, root, tmp_path):
    write_data(tmp_path / "secret", layers=2, tokens=10)
    (root / "a").parent.mkdir(exist_ok=True)
    (root / "a").symlink_to(tmp_path / "secret")
    assert client.get("/datasets/a/info").status_code == 400


@pytest.fixture
def server(tmp_path):
    """A real process; gives its address and its root."""
    with serving(tmp_path / "served") as address:
        yield address, tmp_path / "served"


def test_eight_clients_of_a_real_server_one_killed_while_uploading(server, tmp_path):
    address, root = server
    files = {f"chunk_{i}.h5": chunk_bytes(rows=200, width=64, seed=i)[0] for i in range(8)}
    victim = subprocess.Popen([sys.executable, "-c", _SLOW_UPLOAD, address, ID])
    threads = [
        threading.Thread(target=_upload, args=(address, name, data)) for name, data in files.items() if name[6] > "0"
    ]
    for thread in threads:
        thread.start()
    while not (part := list((root / ID).glob(".chunk_0.h5.part"))) or part[0].stat().st_size < 100_000:
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    for thread in threads:
        thread.join()

    assert httpx.get(f"{address}/datasets/{ID}/files/chunk_0.h5").status_code == 404
    _upload(address, "chunk_0.h5", files["chunk_0.h5"], prefix_is_known=True)
    for name, data in files.items():
        assert (root / ID / name).read_bytes() == data


def _upload(address, name, data, prefix_is_known=False):
    url = f"{address}/datasets/{ID}/uploads/{name}"
    start = httpx.get(url).json()["received"]
    assert not prefix_is_known or start > 0
    httpx.put(f"{url}?offset={start}", content=data[start:]).raise_for_status()
    httpx.post(url, json={"sha256": sha256(data).hexdigest()}).raise_for_status()


_SLOW_UPLOAD = """
import sys, time, httpx
sys.path.insert(0, ".")
from tests.contracts.test_activation_server import chunk_bytes
data = chunk_bytes(rows=200, width=64, seed=0)[0]
def slowly():
    for start in range(0, len(data), 20_000):
        yield data[start : start + 20_000]
        time.sleep(0.05)
httpx.put(f"{sys.argv[1]}/datasets/{sys.argv[2]}/uploads/chunk_0.h5?offset=0", content=slowly(), timeout=60)
"""
