"""One suite for every format on disk, and the seeds' own layouts written by hand from their description."""

import json

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clt.data import ActivationWriter, DatasetInfo, LocalActivationStore
from clt.data.codecs import Codec
from clt.data.quantise import dequantise, quantise
from clt.errors import ConfigError, DatasetError
from tests.tiny_data import sparse_batch

CODECS = [pytest.param(Codec(), dtype, id=f"rows-{dtype}") for dtype in ("bfloat16", "float16", "float32", "int8")] + [
    pytest.param(Codec("hdf5", compression), dtype, id=f"hdf5-{compression}-{dtype}")
    for compression, dtype in (
        ("none", "bfloat16"),
        ("none", "float16"),
        ("none", "float32"),
        ("gzip", "bfloat16"),
        ("lzf", "float32"),
    )
]
INFO = DatasetInfo(model_name="tiny", dataset="made up", split="train", num_layers=12, d_model=8)


def numbered(tokens=70, seed=0):
    batch = sparse_batch(layers=12, tokens=tokens, seed=seed)
    return type(batch)(batch.inputs - 0.3, batch.targets, batch.kind, torch.arange(tokens), batch.position)


def write(folder, codec, dtype, batches, **options):
    with ActivationWriter(folder, INFO, codec=codec, dtype=dtype, shard_tokens=32, **options) as writer:
        for batch in batches:
            writer.append(batch)
    return folder


def sorted_rows(store):
    batches = [next(store) for _ in range(store.steps_per_epoch)]
    sample = torch.cat([batch.sample for batch in batches])
    order = sample.argsort()
    return [torch.cat([getattr(batch, name) for batch in batches], 1)[:, order] for name in ("inputs", "targets")]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "metadata.json"}


@pytest.mark.parametrize(("codec", "dtype"), CODECS)
def test_rows_come_back(tmp_path, codec, dtype):
    batch = numbered()
    store = LocalActivationStore(write(tmp_path / "set", codec, dtype, [batch]), batch_size_tokens=9)
    store.verify()
    for found, exact in zip(sorted_rows(store), (batch.inputs, batch.targets), strict=True):
        if dtype == "int8":
            torch.testing.assert_close(found.float(), exact, atol=exact.abs().max().item() / 100, rtol=0.02)
        else:
            assert torch.equal(found, exact.to(getattr(torch, dtype)))
    torch.testing.assert_close(store.statistics.inputs.mean, sorted_rows(store)[0].double().mean(1))


@pytest.mark.parametrize(("codec", "dtype"), CODECS)
def test_resumed_is_uninterrupted_byte_for_byte(tmp_path, codec, dtype):
    batches = [numbered(25, seed=i) for i in range(5)]
    write(tmp_path / "whole", codec, dtype, batches)
    first = ActivationWriter(tmp_path / "parts", INFO, codec=codec, dtype=dtype, shard_tokens=32)
    for batch in batches[:3]:
        first.append(batch)
    with ActivationWriter(tmp_path / "parts", INFO, codec=codec, dtype=dtype, shard_tokens=32, resume=True) as second:
        assert second.resume_mark == 2
        for mark, batch in enumerate(batches):
            second.append(batch, mark=mark)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    metadata = [json.loads((tmp_path / name / "metadata.json").read_text()) for name in ("whole", "parts")]
    assert metadata[0]["codec"] == metadata[1]["codec"]


@given(values=st.lists(st.integers(-(10**6), 10**6), min_size=4, max_size=4))
def test_int8_is_off_by_at_most_half_a_step(values):
    rows = torch.tensor(values).view(1, 2, 1, 2) / 997
    stored, scale = quantise(rows)
    error = (dequantise(stored, scale, torch.float32) - rows).abs()
    assert (error <= scale[..., None] * 0.5001).all()


def test_int8_records_its_own_error_and_halves_the_file(tmp_path):
    batch = numbered()
    write(tmp_path / "int8", Codec(), "int8", [batch])
    write(tmp_path / "bf16", Codec(), "bfloat16", [batch])
    codec = json.loads((tmp_path / "int8" / "metadata.json").read_text())["codec"]
    relative = torch.tensor(codec["relative_squared_error"]["inputs"])
    exact, found = batch.inputs.double(), sorted_rows(LocalActivationStore(tmp_path / "int8"))[0].double()
    torch.testing.assert_close(
        relative, ((exact - found).square().sum((1, 2)) / exact.square().sum((1, 2))).float(), atol=1e-9, rtol=1e-4
    )
    assert (relative < 1e-3).all()
    assert min(codec["mean_cosine"]["targets"]) > 0.999


# --- the seeds' layouts, from their description -------------------------------------------------------------------


def seed_data_set(folder, version, dtype="bfloat16", sizes=(5, 3), layers=11, width=4):
    """Write chunks and manifest as crosslayer-coding does; returns `[chunk][layer, side]` of the values."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    values, index = [], []
    for chunk, rows in enumerate(sizes):
        name = f"chunk_{chunk}.h5" if version == 1 else f"chunk_{chunk}.hdf5"
        arrays = torch.from_numpy(rng.standard_normal((layers, 2, rows, width)).astype(np.float32))
        arrays = arrays.to(getattr(torch, dtype))
        values.append(arrays)
        with h5py.File(folder / name, "w", libver="latest") as file:
            for layer in range(layers):
                for side, key in enumerate(("inputs", "targets")):
                    data = arrays[layer, side]
                    data = data.view(torch.uint16).numpy() if dtype == "bfloat16" else data.numpy()
                    row_chunks = (1, width) if version == 1 else (min(rows, 16384), width)
                    file.create_dataset(f"layer_{layer}/{key}", data=data, chunks=row_chunks, compression="gzip")
        index += [(chunk, row) for row in range(rows)]
    if version == 1:
        np.array(index, dtype=np.uint32).tofile(folder / "index.bin")
    else:
        record = np.dtype([("c", "<i4"), ("n", "<i4"), ("o", "<i8")])
        offsets = np.cumsum(sizes) - np.array(sizes)
        np.array(list(zip(range(len(sizes)), sizes, offsets, strict=True)), dtype=record).tofile(folder / "index.bin")
    metadata = {"num_layers": layers, "d_model": width, "total_tokens": sum(sizes), "dtype": dtype, "chunk_tokens": 5}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return values


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_seeds_data_sets_open(tmp_path, version, dtype):
    values = seed_data_set(tmp_path / "set", version, dtype)
    store = LocalActivationStore(tmp_path / "set", batch_size_tokens=100)
    [batch] = store.one_pass()
    whole = torch.cat(values, dim=2)
    assert torch.equal(batch.inputs, whole[:, 0])
    assert torch.equal(batch.targets, whole[:, 1])
    assert set(batch.sample.tolist()) == {-1}
    with pytest.raises(DatasetError, match=r"norm_stats\.json does not exist"):
        _ = store.statistics


def test_ours_is_readable_by_the_seeds_description(tmp_path):
    batch = numbered(40)
    folder = write(tmp_path / "set", Codec("hdf5"), "bfloat16", [batch])
    index = np.fromfile(folder / "index.bin", dtype=np.dtype([("chunk", "i4"), ("n", "i4"), ("offset", "i8")]))
    metadata = json.loads((folder / "metadata.json").read_text())
    statistics = json.loads((folder / "norm_stats.json").read_text())

    assert index.tolist() == [(0, 32, 0), (1, 8, 32)]
    assert {"num_layers", "d_model", "total_tokens", "dtype", "model_name", "dataset", "split"} <= set(metadata)
    assert len(statistics["11"]["targets"]["std"]) == 8
    for chunk in (0, 1):
        with h5py.File(folder / f"chunk_{chunk}.hdf5") as file:
            layers = sorted(file, key=lambda name: int(name.split("_")[1]))
            assert layers == [f"layer_{layer}" for layer in range(12)]
            stored = file["layer_10"]["inputs"]
            assert stored.dtype == np.uint16
            assert stored.compression is None
            first = torch.from_numpy(stored[:]).view(torch.bfloat16)
            assert (first < 0).any()


def test_version_1_manifests_may_list_rows_in_any_order(tmp_path):
    seed_data_set(tmp_path / "set", 1)
    path = tmp_path / "set" / "index.bin"
    rows = np.fromfile(path, dtype=np.uint32).reshape(-1, 2)
    np.random.default_rng(1).permutation(rows).tofile(path)
    assert LocalActivationStore(tmp_path / "set").total_tokens == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "chunk_1.hdf5").unlink(), r"lacks chunk_1\.hdf5"),
        (lambda folder: (folder / "index.bin").unlink(), r"index\.bin is missing"),
        (lambda folder: (folder / "index.bin").write_bytes(b"123"), "no whole number of records"),
        (lambda folder: (folder / "index.bin").write_bytes(bytes(24)), "each once"),
        (lambda folder: set_metadata(folder, total_tokens=9), r"lists 8 tokens, but .* total_tokens = 9"),
        (lambda folder: set_metadata(folder, num_layers=12), r"lacks layer_11/inputs"),
        (lambda folder: set_metadata(folder, d_model=5), r"is \(5, 4\), but .* say \(5, 5\)"),
        (lambda folder: set_metadata(folder, dtype="float32"), "stored as bfloat16 .*'float32'"),
        (lambda folder: cut(folder / "chunk_0.hdf5"), "no readable HDF5 file"),
    ],
)
def test_damage_is_named(tmp_path, change, message):
    seed_data_set(tmp_path / "set", 2)
    change(tmp_path / "set")
    with pytest.raises(DatasetError, match=message):
        LocalActivationStore(tmp_path / "set")


def set_metadata(folder, **changes):
    path = folder / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def test_a_chunk_with_fewer_rows_than_its_manifest_is_refused(tmp_path):
    seed_data_set(tmp_path / "set", 2, sizes=(5, 3))
    seed_data_set(tmp_path / "other", 2, sizes=(4, 4))
    (tmp_path / "other" / "chunk_0.hdf5").rename(tmp_path / "set" / "chunk_0.hdf5")
    with pytest.raises(DatasetError, match=r"is \(4, 4\), but the manifest and metadata\.json say \(5, 4\)"):
        LocalActivationStore(tmp_path / "set")


def test_lz4_without_its_package_and_impossible_combinations_are_refused_before_work_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="hdf5plugin"):
        Codec("hdf5", "lz4")
    with pytest.raises(ConfigError, match="needs output_format = 'hdf5'"):
        Codec("safetensors", "gzip")
    with pytest.raises(ConfigError, match="needs output_format = 'safetensors'"):
        ActivationWriter(tmp_path / "set", INFO, codec=Codec("hdf5"), dtype="int8")
