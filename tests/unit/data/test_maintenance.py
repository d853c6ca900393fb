"""Info, verify, drop-chunk, stats and convert."""

import shutil

import pytest
import torch

from clt.data import LocalActivationStore
from clt.data.codecs import Codec
from clt.data.maintenance import convert, describe, drop_chunk, measure, parts_of, verify
from clt.errors import DatasetError
from tests.tiny_data import write_data


@pytest.fixture
def folder(tmp_path):
    return write_data(tmp_path / "set", tokens=600)


def whole(folder):
    return next(LocalActivationStore(folder, batch_size_tokens=10_000).one_pass())


def test_info_names_host_tokens_and_size(folder):
    text = describe(folder)
    assert "tiny: 3 layers x 8" in text
    assert "600 in 3 shards" in text
    assert "300 text, 300 image" in text


def test_verify_names_every_shard_that_is_wrong(folder):
    assert verify(folder) == 3
    (folder / "shard_00000.safetensors").write_bytes(b"short")
    data = bytearray((folder / "shard_00002.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "shard_00002.safetensors").write_bytes(data)
    with pytest.raises(DatasetError, match=r"2 of 3 shards are wrong:[\s\S]*shard_00000[\s\S]*shard_00002"):
        verify(folder)


def test_a_damaged_chunk_can_be_left_out(folder):
    (folder / "shard_00001.safetensors").unlink()
    with pytest.raises(DatasetError, match="drop-chunk"):
        LocalActivationStore(folder)
    drop_chunk(folder, "shard_00001.safetensors")
    store = LocalActivationStore(folder)
    assert store.total_tokens == 400
    torch.testing.assert_close(store.statistics.inputs.mean, whole(folder).inputs.double().mean(1))
    with pytest.raises(DatasetError, match="has no shard"):
        drop_chunk(folder, "shard_00001.safetensors")
    drop_chunk(folder, "shard_00000.safetensors")
    with pytest.raises(DatasetError, match="only shard"):
        drop_chunk(folder, "shard_00002.safetensors")


def test_a_dropped_hdf5_chunk_leaves_a_data_set_the_seeds_can_read(folder, tmp_path):
    convert(folder, tmp_path / "hdf5", codec=Codec("hdf5"))
    drop_chunk(tmp_path / "hdf5", "chunk_1.hdf5")
    assert LocalActivationStore(tmp_path / "hdf5").total_tokens == 400
    assert not list((tmp_path / "hdf5").glob("chunk_1*"))


def test_lost_statistics_can_be_computed_again(folder):
    before = LocalActivationStore(folder).statistics
    (folder / "norm_stats.json").unlink()
    measure(folder)
    after = LocalActivationStore(folder).statistics
    torch.testing.assert_close(after.targets.std, before.targets.std)


@pytest.mark.parametrize(("codec", "dtype"), [(Codec("hdf5"), None), (Codec(), "float32"), (Codec(), "int8")])
def test_converting_there_and_back_keeps_the_rows(folder, tmp_path, codec, dtype):
    convert(folder, tmp_path / "there", codec=codec, dtype=dtype)
    convert(tmp_path / "there", tmp_path / "back", codec=Codec(), dtype="bfloat16")
    first, last = whole(folder), whole(tmp_path / "back")
    before, after = (b.inputs.float().sum((0, 2)).sort().values for b in (first, last))
    torch.testing.assert_close(before, after, rtol=1e-2 if dtype == "int8" else 0, atol=0.1 if dtype == "int8" else 0)


def test_parts_of_a_divided_data_set(folder, tmp_path):
    assert parts_of(folder) == [folder]
    for part in ("train", "held_out"):
        shutil.copytree(folder, tmp_path / "divided" / part)
    assert [part.name for part in parts_of(tmp_path / "divided")] == ["train", "held_out"]
