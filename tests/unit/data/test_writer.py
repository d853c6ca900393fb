"""What the writer leaves on disk, and what it does when something goes wrong."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from clt.data import ActivationWriter, LocalActivationStore
from clt.data.metadata import INDEX_RECORD
from clt.data.rows import RowFile, RowFileWriter, RowLayout
from clt.errors import ConfigError, DatasetError
from clt.types import ActivationBatch


def write(folder, info, batches, **options):
    with ActivationWriter(folder, info, **options) as writer:
        for batch in batches:
            writer.append(batch)
    return folder


def in_order(folder):
    """All rows of a data set, sorted by their sample number."""
    batch = next(LocalActivationStore(folder, batch_size_tokens=10_000).one_pass())
    return batch.select(batch.sample.argsort())


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "metadata.json"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_row_comes_back_with_its_kind_sample_and_position(tmp_path, info, batch_of, dtype):
    batches = [batch_of(tokens, seed=tokens, first_sample=100 * tokens) for tokens in (5, 7, 1, 20)]
    write(tmp_path / "set", info, batches, dtype=dtype, shard_tokens=8)

    found = in_order(tmp_path / "set")
    wanted = sorted(batches, key=lambda batch: int(batch.sample[0]))
    for name in ("inputs", "targets"):
        values = torch.cat([getattr(batch, name) for batch in wanted], dim=1)
        assert torch.equal(getattr(found, name), values.to(getattr(torch, dtype)))
    for name in ("kind", "sample", "position"):
        assert torch.equal(getattr(found, name), torch.cat([getattr(batch, name) for batch in wanted]))


@given(bits=st.lists(st.integers(-(2**15), 2**15 - 1), min_size=12, max_size=60))
def test_bf16_bits_survive_whatever_they_mean(tmp_path_factory, bits):
    """Negative zero, infinities and the payload of a NaN included."""
    path = tmp_path_factory.mktemp("bits") / "rows"
    tokens = len(bits) // 4
    rows = torch.tensor(bits[: 4 * tokens], dtype=torch.int16).view(tokens, 2, 1, 2).view(torch.bfloat16)
    layout = RowLayout(num_layers=1, d_model=2, dtype="bfloat16")
    columns = {"sample": np.arange(tokens), "position": np.zeros(tokens), "kind": np.zeros(tokens)}
    writer = RowFileWriter(path, layout, capacity=tokens + 3, seed=(0, 0))
    writer.put(rows, columns)
    writer.finish()

    file = RowFile(path, layout, tokens)
    back = file.rows[torch.from_numpy(np.argsort(file.columns["sample"]))]
    assert torch.equal(back.view(torch.int16), rows.view(torch.int16))


def test_rows_are_shuffled_within_a_shard_and_the_seed_decides_how(tmp_path, info, batch_of):
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(tmp_path / name, info, [batch_of(50)], shard_tokens=64, seed=seed)
        orders.append(load_file(tmp_path / name / "shard_00000.safetensors")["sample"].tolist())

    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
    assert sorted(orders[0]) == list(range(50))


def test_shards_are_plain_safetensors_and_the_index_is_the_seeds(tmp_path, info, batch_of):
    folder = write(tmp_path / "set", info, [batch_of(20)], shard_tokens=8)

    tensors = load_file(folder / "shard_00002.safetensors")
    assert tensors["activations"].shape == (4, 2, 3, 4)
    assert tensors["activations"].dtype == torch.bfloat16
    index = np.fromfile(folder / "index.bin", dtype=INDEX_RECORD)
    assert index["tokens"].tolist() == [8, 8, 4]
    assert index["offset"].tolist() == [0, 8, 16]
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["total_tokens"] == 20
    assert metadata["hookpoints"][1]["input_path"] == "h.1.mlp.input"
    assert sum(metadata["kinds"].values()) == 20


def test_statistics_are_those_of_the_stored_rows(tmp_path, info, batch_of):
    batches = [batch_of(30, seed=1), batch_of(9, seed=2, first_sample=30)]
    folder = write(tmp_path / "set", info, batches, shard_tokens=16)

    found, rows = LocalActivationStore(folder).statistics, in_order(folder)
    for side, values in ((found.inputs, rows.inputs.double()), (found.targets, rows.targets.double())):
        torch.testing.assert_close(side.mean, values.mean(dim=1))
        torch.testing.assert_close(side.std, values.std(dim=1))
        torch.testing.assert_close(side.mean_squared_norm, values.square().sum(dim=2).mean(dim=1))
    assert found.count == 39


@given(
    sizes=st.lists(st.integers(1, 13), min_size=1, max_size=8),
    shard_tokens=st.integers(1, 20),
    stop_after=st.integers(0, 8),
)
def test_resumed_data_set_is_the_uninterrupted_one_byte_for_byte(
    tmp_path_factory, info, batch_of, sizes, shard_tokens, stop_after
):
    folder = tmp_path_factory.mktemp("resume")
    batches = [batch_of(size, seed=i, first_sample=100 * i) for i, size in enumerate(sizes)]
    write(folder / "whole", info, batches, shard_tokens=shard_tokens)

    first = ActivationWriter(folder / "parts", info, shard_tokens=shard_tokens)
    for batch in batches[:stop_after]:
        first.append(batch)
    # The process dies here: nothing is closed, the unfinished shard stays behind.
    with ActivationWriter(folder / "parts", info, shard_tokens=shard_tokens, resume=True) as second:
        for mark in range(second.resume_mark, len(batches)):
            second.append(batches[mark], mark=mark)

    assert files_of(folder / "parts") == files_of(folder / "whole")


def test_batches_already_written_may_be_given_again(tmp_path, info, batch_of):
    batches = [batch_of(5, seed=i, first_sample=10 * i) for i in range(4)]
    write(tmp_path / "whole", info, batches, shard_tokens=7)
    ActivationWriter(tmp_path / "parts", info, shard_tokens=7).append(batches[0])
    for _ in range(2):
        writer = ActivationWriter(tmp_path / "parts", info, shard_tokens=7, resume=True)
        for mark, batch in enumerate(batches[:3]):
            writer.append(batch, mark=mark)
    with ActivationWriter(tmp_path / "parts", info, shard_tokens=7, resume=True) as writer:
        for mark, batch in enumerate(batches):
            writer.append(batch, mark=mark)

    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def test_an_unfinished_folder_says_so(tmp_path, info, batch_of):
    ActivationWriter(tmp_path / "set", info).append(batch_of(5))
    with pytest.raises(DatasetError, match="unfinished"):
        LocalActivationStore(tmp_path / "set")


def test_an_error_inside_leaves_finished_shards_and_no_metadata(tmp_path, info, batch_of):
    with pytest.raises(DatasetError, match="2 layers"):
        write(tmp_path / "set", info, [batch_of(10), batch_of(1, layers=2)], shard_tokens=4)
    names = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert names == ["progress.safetensors", "shard_00000.safetensors", "shard_00001.safetensors"]


def test_resuming_with_other_options_names_what_differs(tmp_path, info, batch_of):
    ActivationWriter(tmp_path / "set", info, shard_tokens=4).append(batch_of(10))
    with pytest.raises(DatasetError, match=r"shard_tokens: 4 there, 5 now"):
        ActivationWriter(tmp_path / "set", info, shard_tokens=5, resume=True)


def test_a_finished_data_set_is_never_overwritten(tmp_path, info, batch_of):
    folder = write(tmp_path / "set", info, [batch_of(5)])
    with pytest.raises(DatasetError, match="finished data set"):
        ActivationWriter(folder, info)


def test_shards_of_unknown_origin_are_not_deleted(tmp_path, info):
    (tmp_path / "shard_00000.safetensors").write_bytes(b"somebody's")
    with pytest.raises(DatasetError, match=r"no metadata\.json"):
        ActivationWriter(tmp_path, info)
    assert (tmp_path / "shard_00000.safetensors").read_bytes() == b"somebody's"


def test_a_full_disk_says_how_much_is_missing_and_loses_nothing(tmp_path, info, batch_of, monkeypatch):
    batches = [batch_of(4, seed=i, first_sample=10 * i) for i in range(4)]
    write(tmp_path / "whole", info, batches, shard_tokens=6)
    writer = ActivationWriter(tmp_path / "set", info, shard_tokens=6)
    writer.append(batches[0])
    writer.append(batches[1])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DatasetError, match=r"no room: [\d,]+ bytes are needed, [\d,]+ are free"):
            writer.append(batches[2])
    writer.abandon()
    with ActivationWriter(tmp_path / "set", info, shard_tokens=6, resume=True) as writer:
        for mark, batch in enumerate(batches):
            writer.append(batch, mark=mark)
    assert files_of(tmp_path / "set") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "bfloat16"), (1e6, "float16"), (float("-inf"), "float32")])
def test_a_value_that_is_not_finite_is_refused_with_its_place(tmp_path, info, batch_of, value, dtype):
    batch = batch_of(5)
    batch.targets[2, 3, 1] = value
    with pytest.raises(DatasetError, match=r"Layer 2 .* targets \(dimension 1\) at position 3 of sample 3"):
        write(tmp_path / "set", info, [batch], dtype=dtype)


def test_a_batch_of_another_shape_is_refused(tmp_path, info, batch_of):
    with pytest.raises(DatasetError, match=r"2 layers x 4 .* 3 x 4"):
        write(tmp_path / "set", info, [batch_of(5, layers=2)])


def test_an_empty_data_set_and_an_unknown_type_are_refused(tmp_path, info):
    with pytest.raises(DatasetError, match="no tokens"):
        write(tmp_path / "set", info, [])
    with pytest.raises(ConfigError, match="float64"):
        ActivationWriter(tmp_path / "other", info, dtype="float64")


def test_views_of_any_layout_are_written_as_they_are(tmp_path, info, batch_of):
    batch = batch_of(6)
    turned = ActivationBatch(
        inputs=batch.inputs.transpose(1, 2).contiguous().transpose(1, 2),
        targets=batch.targets.flip(1).flip(1),
        kind=batch.kind,
        sample=batch.sample,
        position=batch.position,
    )
    write(tmp_path / "a", info, [batch])
    write(tmp_path / "b", info, [turned])
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
