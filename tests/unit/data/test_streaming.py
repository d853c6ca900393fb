"""The stream: every token of the source, mixed, the same again from a saved step."""

import json

import pytest
import torch

from clt.data.streaming import StreamingActivationStore
from clt.errors import TrainingError


def source_of(batch_of, n=12):
    def make(epoch):
        return (batch_of(10, seed=i, first_sample=1000 * epoch + 10 * i) for i in range(n))

    return make


def test_every_token_comes_once_before_the_source_begins_again(batch_of):
    store = StreamingActivationStore(source_of(batch_of), batch_size_tokens=8, buffer_tokens=40)
    samples = torch.cat([next(store).sample for _ in range(45)])
    assert len(set(samples.tolist())) == 360
    assert set(range(120)) <= set(samples.tolist())
    assert samples[:8].tolist() != sorted(samples[:8].tolist())


def test_neighbours_are_spread(batch_of):
    store = StreamingActivationStore(source_of(batch_of), batch_size_tokens=10, buffer_tokens=60)
    assert len(set((next(store).sample // 10).tolist())) >= 4


@pytest.mark.parametrize("steps", [0, 3, 20])
def test_resumed_is_uninterrupted(batch_of, steps):
    def make():
        return StreamingActivationStore(source_of(batch_of), batch_size_tokens=8, buffer_tokens=40)

    store = make()
    for _ in range(steps):
        next(store)
    state = json.loads(json.dumps(store.state_dict()))
    rest = [next(store) for _ in range(5)]
    again = make()
    next(again)
    again.load_state_dict(state)
    for wanted in rest:
        assert torch.equal(next(again).inputs, wanted.inputs)
    with pytest.raises(TrainingError, match="seed = 42, but this stream has 7"):
        StreamingActivationStore(source_of(batch_of), batch_size_tokens=8, buffer_tokens=40, seed=7).load_state_dict(
            state
        )


def test_shape_statistics_and_types(batch_of):
    store = StreamingActivationStore(
        source_of(batch_of), batch_size_tokens=8, statistics_tokens=30, dtype=torch.bfloat16
    )
    assert (store.n_layers, store.d_model, store.total_tokens) == (3, 4, None)
    assert store.statistics.count == 30
    assert next(store).inputs.dtype == torch.bfloat16


def test_an_empty_source_is_an_error():
    with pytest.raises(TrainingError, match="no activations at all"):
        StreamingActivationStore(lambda epoch: iter(()))
