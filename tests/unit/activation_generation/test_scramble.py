"""The global shuffle: the same rows, another order, the same every time."""

import pytest
import torch

from clt.activation_generation.scramble import fingerprint, scramble
from clt.data import ActivationWriter, DatasetInfo, LocalActivationStore
from clt.data.codecs import Codec
from clt.data.sources import open_local
from clt.errors import DatasetError
from tests.tiny_data import sparse_batch

INFO = DatasetInfo(model_name="tiny", dataset="made up", split="train", num_layers=3, d_model=8)


def write(folder, codec, tokens=300, dtype="bfloat16"):
    batch = sparse_batch(tokens=tokens)
    batch = type(batch)(batch.inputs, batch.targets, batch.kind, torch.arange(tokens), batch.position)
    with ActivationWriter(folder, INFO, codec=codec, shard_tokens=64, dtype=dtype) as writer:
        writer.append(batch)
    return folder


def stored(folder):
    return next(LocalActivationStore(folder, batch_size_tokens=10_000).one_pass())


@pytest.mark.parametrize("codec", [Codec(), Codec("hdf5")])
@pytest.mark.parametrize("memory_bytes", [1000, 10_000, 2**29])
def test_the_same_rows_in_another_order(tmp_path, codec, memory_bytes):
    folder = write(tmp_path / "in", codec)
    [result] = scramble(folder, tmp_path / "out", seed=1, memory_bytes=memory_bytes)

    before, after = stored(folder), stored(tmp_path / "out")
    assert result.tokens == 300
    assert before.sample.tolist() != after.sample.tolist()
    order = after.select(after.sample.argsort())
    exact = before.select(before.sample.argsort())
    for name in ("inputs", "targets", "kind", "sample", "position"):
        assert torch.equal(getattr(order, name), getattr(exact, name))
    assert not (tmp_path / "out" / ".buckets").exists()
    # The first output shard has rows of every input shard.
    assert len(set((after.sample[:64] // 64).tolist())) >= 4


def test_the_seed_decides_the_order(tmp_path):
    folder = write(tmp_path / "in", Codec())
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        scramble(folder, tmp_path / name, seed=seed, memory_bytes=5000)
        orders.append(stored(tmp_path / name).sample.tolist())
    assert orders[0] == orders[1] != orders[2]


def test_the_fingerprint_sees_every_bit(tmp_path):
    folder = write(tmp_path / "in", Codec())
    before = fingerprint(open_local(folder))
    path = folder / "shard_00001.safetensors"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    assert fingerprint(open_local(folder)) != before


def test_both_parts_of_a_divided_data_set(tmp_path):
    write(tmp_path / "in" / "train", Codec())
    write(tmp_path / "in" / "held_out", Codec(), tokens=40)
    results = scramble(tmp_path / "in", tmp_path / "out", seed=0)
    assert [result.tokens for result in results] == [300, 40]


def test_a_folder_with_something_in_it_and_int8_are_refused(tmp_path):
    folder = write(tmp_path / "in", Codec())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(DatasetError, match="not empty"):
        scramble(folder, tmp_path / "out", seed=0)
    with pytest.raises(DatasetError, match="is int8"):
        scramble(write(tmp_path / "int8", Codec(), dtype="int8"), tmp_path / "other", seed=0)


def test_an_interrupted_scramble_starts_again(tmp_path, monkeypatch):
    folder = write(tmp_path / "in", Codec())
    with monkeypatch.context() as patch:
        patch.setattr(ActivationWriter, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scramble(folder, tmp_path / "out", seed=1)
    scramble(folder, tmp_path / "out", seed=1)
    scramble(folder, tmp_path / "again", seed=1)
    assert stored(tmp_path / "out").sample.tolist() == stored(tmp_path / "again").sample.tolist()


def interrupted(*_, **__):
    raise KeyboardInterrupt
