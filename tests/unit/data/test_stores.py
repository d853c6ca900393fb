"""Every token once per epoch, exact positions, and damaged data sets."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clt.data import ActivationWriter, LocalActivationStore
from clt.data.buffers import BufferPool
from clt.data.sampler import RunSampler
from clt.errors import ConfigError, DatasetError

STRATEGIES = ["mixed", "random_chunk", "sequential"]


@pytest.fixture
def folder(tmp_path, info, batch_of):
    with ActivationWriter(tmp_path / "set", info, shard_tokens=16) as writer:
        writer.append(batch_of(75))
    return tmp_path / "set"


@given(
    shards=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    batch_size=st.integers(1, 60),
    run_tokens=st.integers(1, 9),
    strategy=st.sampled_from(STRATEGIES),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_each_epoch_has_every_row_exactly_once(shards, batch_size, run_tokens, strategy, seed, epoch):
    sampler = RunSampler(shards, batch_size, seed, strategy, run_tokens)
    batches = [sampler.batch(epoch, step) for step in range(sampler.steps_per_epoch)]

    runs = [run for batch in batches for run in batch.tolist()]
    rows = [(shard, row) for shard, start, stop in runs for row in range(start, stop)]
    assert sorted(rows) == [(shard, row) for shard, tokens in enumerate(shards) for row in range(tokens)]
    sizes = [int((batch[:, 2] - batch[:, 1]).sum()) for batch in batches]
    assert set(sizes[:-1]) <= {batch_size}
    assert 0 < sizes[-1] <= batch_size


def test_epochs_come_in_different_orders_and_never_end(folder):
    store = LocalActivationStore(folder, batch_size_tokens=20, run_tokens=1)
    epochs = [torch.cat([next(store).sample for _ in range(store.steps_per_epoch)]) for _ in range(3)]

    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(75))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])


def test_mixed_batches_come_from_many_shards(folder):
    store = LocalActivationStore(folder, batch_size_tokens=30, run_tokens=2)
    assert len(set((next(store).sample // 16).tolist())) > 2


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 9])
def test_resumed_order_is_the_uninterrupted_one(folder, strategy, steps):
    options = {"batch_size_tokens": 20, "sampling_strategy": strategy, "run_tokens": 3}
    store = LocalActivationStore(folder, **options)
    for _ in range(steps):
        next(store)
    state = json.loads(json.dumps(store.state_dict()))
    rest = [next(store) for _ in range(6)]

    assert all(type(value) is int for value in state.values())
    again = LocalActivationStore(folder, **options)
    again.load_state_dict(state)
    for wanted in rest:
        found = next(again)
        assert torch.equal(found.sample, wanted.sample)
        assert torch.equal(found.inputs, wanted.inputs)


def test_position_of_another_order_is_refused(folder):
    state = LocalActivationStore(folder, batch_size_tokens=20).state_dict()
    with pytest.raises(DatasetError, match=r"batch_size_tokens = 20, but this store has 10"):
        LocalActivationStore(folder, batch_size_tokens=10).load_state_dict(state)


def test_a_batch_that_is_kept_never_changes(folder):
    store = LocalActivationStore(folder, batch_size_tokens=20)
    kept = [next(store) for _ in range(3)]
    layer = next(store).inputs[1]
    copies = [batch.inputs.clone() for batch in kept]
    layer_copy = layer.clone()
    for _ in range(30):
        next(store)
    for batch, copy in zip(kept, copies, strict=True):
        assert torch.equal(batch.inputs, copy)
    assert torch.equal(layer, layer_copy)


def test_memory_is_used_again_only_when_nobody_holds_it():
    pool = BufferPool()
    first = pool.empty((4, 8), torch.bfloat16)
    part = first[1:3].transpose(0, 1)
    address = first.data_ptr()
    del first
    assert pool.empty((4, 8), torch.bfloat16).data_ptr() != address
    del part
    assert address in {tensor.data_ptr() for tensor in [pool.empty((4, 8), torch.bfloat16) for _ in range(2)]}


def test_one_pass_has_every_token_once_in_stored_order_and_moves_nothing(folder):
    store = LocalActivationStore(folder, batch_size_tokens=20)
    next(store)
    before = store.state_dict()
    sizes = [batch.n_tokens for batch in store.one_pass()]
    samples = torch.cat([batch.sample for batch in store.one_pass()])

    assert sizes == [20, 20, 20, 15]
    assert sorted(samples.tolist()) == list(range(75))
    assert store.state_dict() == before


def test_bf16_stays_bf16_unless_another_type_is_asked_for(folder):
    assert next(LocalActivationStore(folder)).inputs.dtype == torch.bfloat16
    batch = next(LocalActivationStore(folder, dtype=torch.float32, batch_size_tokens=20))
    assert batch.inputs.dtype == torch.float32
    assert batch.inputs.shape == (3, 20, 4)


def test_inputs_and_targets_are_views_of_the_same_rows(folder):
    batch = next(LocalActivationStore(folder, batch_size_tokens=20))
    assert batch.inputs.untyped_storage().data_ptr() == batch.targets.untyped_storage().data_ptr()
    assert batch.inputs.stride() == (4, 24, 1)


def test_drop_last_keeps_all_batches_of_one_size(folder):
    store = LocalActivationStore(folder, batch_size_tokens=20, drop_last=True)
    assert [next(store).n_tokens for _ in range(7)] == [20] * 7
    assert store.steps_per_epoch == 3
    with pytest.raises(DatasetError, match="75 tokens, fewer than one batch of 80"):
        LocalActivationStore(folder, batch_size_tokens=80, drop_last=True)


def test_the_parent_of_train_opens_train(tmp_path, info, batch_of):
    with ActivationWriter(tmp_path / "set" / "train", info) as writer:
        writer.append(batch_of(5))
    assert LocalActivationStore(tmp_path / "set").total_tokens == 5


def test_a_cut_off_shard_is_refused_with_both_sizes(folder):
    shard = folder / "shard_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(DatasetError, match=r"shard_00001.* has 5,065 bytes, but 16 tokens need 5,072"):
        LocalActivationStore(folder)


def test_a_changed_byte_is_found_by_verify_which_names_the_shard(folder):
    LocalActivationStore(folder).verify()
    shard = folder / "shard_00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[4500] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DatasetError, match=r"1 of 5 shards .*\n  shard_00002"):
        LocalActivationStore(folder).verify()


def test_a_missing_shard_is_refused(folder):
    (folder / "shard_00003.safetensors").unlink()
    with pytest.raises(DatasetError, match=r"shard_00003.* is missing"):
        LocalActivationStore(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dtype", "float16", "dtype BF16, but metadata.json says F16"),
        ("dtype", "float8", "dtype = 'float8'"),
        ("total_tokens", 74, "says total_tokens = 74, but its shards hold 75"),
        ("format", "zarr", "format = 'zarr'"),
        ("shards", None, "lacks or garbles"),
    ],
)
def test_metadata_that_disagrees_is_refused(folder, key, value, message):
    path = folder / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(DatasetError, match=message):
        LocalActivationStore(folder)


def test_damaged_metadata_missing_folder_and_foreign_folder(folder, tmp_path):
    (folder / "metadata.json").write_text('{"model')
    with pytest.raises(DatasetError, match="is not JSON"):
        LocalActivationStore(folder)
    with pytest.raises(DatasetError, match="does not exist"):
        LocalActivationStore(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(DatasetError, match="holds no activations"):
        LocalActivationStore(tmp_path / "other")


def test_a_shard_that_is_no_shard_is_refused(folder):
    shard = folder / "shard_00000.safetensors"
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(DatasetError, match="header of a shard"):
        LocalActivationStore(folder)


def test_statistics_that_are_missing_or_incomplete_are_refused(folder):
    path = folder / "norm_stats.json"
    layers = json.loads(path.read_text())
    del layers["1"]
    path.write_text(json.dumps(layers))
    with pytest.raises(DatasetError, match="layers 0 to 2"):
        _ = LocalActivationStore(folder).statistics
    path.unlink()
    with pytest.raises(DatasetError, match="does not exist"):
        _ = LocalActivationStore(folder).statistics


def test_activations_of_another_host_are_refused(folder):
    store = LocalActivationStore(folder)
    store.require_host("tiny", 3, 4)
    with pytest.raises(DatasetError, match=r"of tiny \(3 layers x 4\), but gpt2 \(12 layers x 768\)"):
        store.require_host("gpt2", 12, 768)


def test_sizes_that_are_not_positive_are_refused(folder):
    with pytest.raises(ConfigError, match="batch_size_tokens = 0"):
        LocalActivationStore(folder, batch_size_tokens=0)
