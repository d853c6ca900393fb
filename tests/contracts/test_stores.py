"""One suite for every store: each token once per epoch, exact positions, and the same rows wherever they lie."""

import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import torch
from fastapi.testclient import TestClient

from clt.__main__ import main
from clt.data import ActivationWriter, DatasetInfo, LocalActivationStore, RemoteActivationStore
from clt.data.client import ServerClient
from clt.data.codecs import Codec
from clt.errors import DatasetError
from clt.serve.activation_server import create_app
from tests.contracts.serving import serving
from tests.tiny_data import sparse_batch

INFO = DatasetInfo(model_name="tiny", dataset="made up", split="train", num_layers=3, d_model=8)
N_TOKENS = 90


def numbered():
    """Rows that can be told apart by their first input."""
    batch = sparse_batch(tokens=N_TOKENS)
    batch.inputs[0, :, 0] = torch.arange(N_TOKENS)
    return batch


def through(app, *, as_seed=False):
    """A transport that hands requests to an application in this process."""
    inner = TestClient(app)

    def answer(request: httpx.Request) -> httpx.Response:
        path = request.url.raw_path.decode()
        if as_seed and "health" in path:
            return httpx.Response(200, json={"status": "ok"})
        if as_seed and path.endswith(("/rows", "/files")):
            return httpx.Response(404)
        found = inner.request(request.method, path, content=request.read(), headers=dict(request.headers))
        return httpx.Response(found.status_code, content=found.content)

    return httpx.MockTransport(answer)


def client_of(transport, **options):
    return ServerClient("http://server", "org/set", transport=transport, first_pause_seconds=0.001, **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    for name, codec in (("set", Codec()), ("hdf5", Codec("hdf5"))):
        with ActivationWriter(root / "org" / name, INFO, codec=codec, dtype="float32", shard_tokens=32) as writer:
            writer.append(numbered())
    return root


class Ranges(SimpleHTTPRequestHandler):
    """A plain web server that answers requests for ranges."""

    def do_GET(self):
        data = Path(self.translate_path(self.path)).read_bytes()
        status, wanted = 200, data
        if span := self.headers.get("Range"):
            first, last = span.removeprefix("bytes=").split("-")
            status, wanted = 206, data[int(first) : int(last) + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(wanted)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(wanted) - 1}/{len(data)}")
        self.send_header("Last-Modified", self.date_time_string(0))
        self.end_headers()
        self.wfile.write(wanted)

    def log_message(self, format, *args):
        """Quiet."""


@pytest.fixture(scope="module")
def web(root):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["rows", "hdf5", "server", "seed server", "object store", "web"], scope="module")
def opened(request, root):
    """Opens the same rows in one of the ways there are."""
    if request.param in ("rows", "hdf5"):
        folder = root / "org" / ("set" if request.param == "rows" else "hdf5")
        return partial(LocalActivationStore, folder)
    if request.param == "object store":
        return partial(LocalActivationStore, f"file://{root}/org/set")
    if request.param == "web":
        address = request.getfixturevalue("web")
        return partial(LocalActivationStore, f"{address}/org/set")
    transport = through(create_app(root), as_seed=request.param == "seed server")
    return lambda **options: RemoteActivationStore(client=client_of(transport), **options)


@pytest.mark.parametrize("prefetch_batches", [0, 3])
def test_every_token_once_per_epoch_and_whole_rows(opened, prefetch_batches):
    store = opened(batch_size_tokens=25, prefetch_batches=prefetch_batches)
    exact = numbered()
    for _ in range(2):
        batches = [next(store) for _ in range(store.steps_per_epoch)]
        assert [batch.n_tokens for batch in batches] == [25, 25, 25, 15]
        inputs, targets = (torch.cat([getattr(b, name) for b in batches], dim=1) for name in ("inputs", "targets"))
        order = inputs[0, :, 0].argsort()
        assert torch.equal(inputs[:, order], exact.inputs)
        assert torch.equal(targets[:, order], exact.targets)


@pytest.mark.parametrize("prefetch_batches", [0, 3])
@pytest.mark.parametrize("steps", [0, 2, 5])
def test_resumed_is_uninterrupted(opened, prefetch_batches, steps):
    store = opened(batch_size_tokens=25, prefetch_batches=prefetch_batches)
    for _ in range(steps):
        next(store)
    state = json.loads(json.dumps(store.state_dict()))
    rest = [next(store) for _ in range(6)]
    again = opened(batch_size_tokens=25, prefetch_batches=1)
    next(again)
    again.load_state_dict(state)
    for wanted in rest:
        assert torch.equal(next(again).inputs, wanted.inputs)


def test_one_pass_statistics_and_shape(opened):
    store = opened(batch_size_tokens=25)
    assert (store.n_layers, store.d_model, store.total_tokens) == (3, 8, N_TOKENS)
    assert sum(batch.n_tokens for batch in store.one_pass()) == N_TOKENS
    torch.testing.assert_close(store.statistics.targets.mean, numbered().targets.double().mean(1))


def test_all_stores_give_the_same_order(root):
    local = LocalActivationStore(root / "org" / "set", batch_size_tokens=25)
    remote = RemoteActivationStore(client=client_of(through(create_app(root))), batch_size_tokens=25)
    for _ in range(5):
        here, there = next(local), next(remote)
        assert torch.equal(here.inputs, there.inputs)
        assert torch.equal(here.sample, there.sample)
        assert torch.equal(here.kind, there.kind)


def test_a_real_server_and_its_token(root, monkeypatch):
    with serving(root, token="secret") as address:
        with pytest.raises(DatasetError, match=r"answered 401 .*\n.*CLT_SERVER_TOKEN"):
            RemoteActivationStore(address, "org/set")
        monkeypatch.setenv("CLT_SERVER_TOKEN", "secret")
        store = RemoteActivationStore(address, "org/set", batch_size_tokens=25)
        assert sum(next(store).n_tokens for _ in range(4)) == N_TOKENS
        with pytest.raises(DatasetError, match=r"answered 404 .*\n.*id right"):
            RemoteActivationStore(address, "org/other")


def test_a_server_that_stumbles_is_asked_again(root):
    inner, fails = through(create_app(root)), iter([503, "drop", 500, 429] * 100)

    def answer(request):
        fail = next(fails) if answer.n % 2 == 0 else None
        answer.n += 1
        if fail == "drop":
            raise httpx.ReadError("connection lost")
        return httpx.Response(fail) if fail else inner.handle_request(request)

    answer.n = 0
    client = client_of(httpx.MockTransport(answer))
    store = RemoteActivationStore(client=client, batch_size_tokens=25, prefetch_batches=0)
    assert sum(next(store).n_tokens for _ in range(4)) == N_TOKENS


@pytest.mark.parametrize(("status", "tries"), [(500, 4), (404, 1), (507, 1)])
def test_a_server_that_stays_broken_is_an_error_after_the_attempts_that_make_sense(status, tries):
    asked = []

    def answer(request):
        asked.append(request)
        return httpx.Response(status, text="out of order")

    with pytest.raises(DatasetError, match=rf"answered {status} to GET .*out of order"):
        RemoteActivationStore(client=client_of(httpx.MockTransport(answer)))
    assert len(asked) == tries


def test_no_server_and_a_slow_server(tmp_path):
    with pytest.raises(DatasetError, match=r"no answer after 1 attempts \(ConnectError"):
        RemoteActivationStore("http://127.0.0.1:9", "org/set", max_retries=0)

    def slow(request):
        raise httpx.ReadTimeout("too slow", request=request)

    with pytest.raises(DatasetError, match=r"no answer after 4 attempts \(ReadTimeout"):
        RemoteActivationStore(client=client_of(httpx.MockTransport(slow)))


def consume(store, n):
    for _ in range(n):
        next(store)


def test_a_failed_read_ahead_does_not_lose_its_rows(root):
    inner, broken = through(create_app(root)), [False]

    def answer(request):
        return httpx.Response(400) if broken[0] else inner.handle_request(request)

    store = RemoteActivationStore(client=client_of(httpx.MockTransport(answer)), batch_size_tokens=25)
    first = next(store).inputs[0, :, 0]
    broken[0] = True
    with pytest.raises(DatasetError):
        consume(store, 9)
    broken[0] = False
    state = store.state_dict()
    plain = LocalActivationStore(root / "org" / "set", batch_size_tokens=25)
    plain.load_state_dict(state)
    assert torch.equal(next(store).inputs, next(plain).inputs)
    assert len(first) == 25


def test_answers_of_the_wrong_size_are_refused(root):
    inner = through(create_app(root), as_seed=True)

    def answer(request):
        found = inner.handle_request(request)
        return httpx.Response(200, content=found.content[:-4]) if b"/slice" in request.url.raw_path else found

    store = RemoteActivationStore(client=client_of(httpx.MockTransport(answer)), prefetch_batches=0)
    with pytest.raises(DatasetError, match=r"sent [\d,]+ bytes for .* rows of chunk \d, but [\d,]+ were expected"):
        next(store)


def test_object_stores_that_lack_something_say_so(root, tmp_path):
    with pytest.raises(DatasetError, match=r"metadata\.json cannot be read"):
        LocalActivationStore(f"file://{tmp_path}")
    with pytest.raises(DatasetError, match="only rows in float types"):
        LocalActivationStore(f"file://{root}/org/hdf5")
    cut = tmp_path / "cut"
    shutil.copytree(root / "org" / "set", cut)
    shard = cut / "shard_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:5000])
    store = LocalActivationStore(f"file://{cut}", batch_size_tokens=N_TOKENS)
    with pytest.raises(DatasetError, match=r"shard_00001.safetensors has 5,000 bytes, but 32 tokens need"):
        store.verify()
    with pytest.raises(DatasetError, match=r"shard_00001"):
        next(store)


@pytest.mark.parametrize("place", ["file", "http"])
def test_one_damaged_byte_at_an_address_is_noticed(root, web, monkeypatch, capsys, place):
    monkeypatch.setattr("clt.data.objects._BLOCK_BYTES", 1000)
    copy = root / f"damaged_{place}"
    shutil.copytree(root / "org" / "set", copy)
    url = f"file://{copy}" if place == "file" else f"{web}/{copy.name}"
    main(["data", "verify", url])
    assert "the sizes of 3 shards agree, 3 checksums agree" in capsys.readouterr().out
    shard = LocalActivationStore(copy).metadata.shards[1]
    data = bytearray((copy / shard.file).read_bytes())
    data[-5] ^= 1
    (copy / shard.file).write_bytes(data)
    main(["data", "verify", url, "--sizes-only"])
    assert "the sizes of 3 shards agree, 0 checksums" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["data", "verify", url])
    assert stopped.value.code == 2
    assert f"{shard.file} has the SHA-256" in capsys.readouterr().err
    with pytest.raises(DatasetError, match="says"):
        LocalActivationStore(url).verify()


def test_one_damaged_byte_on_a_server_is_noticed(root, tmp_path):
    shutil.copytree(root / "org", tmp_path / "org")
    app = create_app(tmp_path)
    store = RemoteActivationStore(client=client_of(through(app)), prefetch_batches=0)
    store.verify()
    shard = tmp_path / "org" / "set" / store.metadata.shards[1].file
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DatasetError, match=f"1 of 3 shards.*\n.*{shard.name}"):
        store.verify()
    theirs = RemoteActivationStore(client=client_of(through(app, as_seed=True)), prefetch_batches=0)
    with pytest.raises(DatasetError, match="names none"):
        theirs.verify()
