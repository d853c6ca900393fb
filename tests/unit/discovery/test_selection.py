"""Round-robin choice and the halves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clt.discovery.selection import half_of, layer_distribution, round_robin
from clt.errors import ConfigError
from clt.types import FeatureId


@given(seed=st.integers(0, 99), layers=st.integers(1, 6), features=st.integers(1, 20), target=st.integers(1, 60))
def test_layers_take_turns_and_each_gives_its_best(seed, layers, features, target):
    rng = np.random.default_rng(seed)
    scores = rng.random((layers, features))
    can = rng.random((layers, features)) < 0.7
    chosen = round_robin(scores, can, target=target, min_per_layer=0)
    assert len(chosen) == len(set(chosen)) == min(target, int(can.sum()))
    for layer in range(layers):
        mine = {f.feature for f in chosen if f.layer == layer}
        others = [scores[layer, f] for f in np.flatnonzero(can[layer]) if f not in mine]
        assert all(can[layer, f] for f in mine)
        assert not mine or not others or min(scores[layer, f] for f in mine) >= max(others)
    counts = [sum(f.layer == layer for f in chosen) for layer in range(layers)]
    full = [count for count, row in zip(counts, can) if count < row.sum()]
    assert not full or max(counts) - min(full) <= 1


def test_the_guides_numbers():
    scores = np.random.default_rng(0).random((31, 4096))
    chosen = round_robin(scores, np.ones_like(scores, dtype=bool), target=200, min_per_layer=3)
    spread = layer_distribution(chosen)
    assert (spread["0"], spread["1"], spread["30"]) == (7, 7, 6)
    assert sum(spread.values()) == 200
    assert [scores[f] for f in chosen] == sorted((scores[f] for f in chosen), reverse=True)


def test_too_few_for_every_layer_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="at least 217, or lower the second to 6"):
        round_robin(np.ones((31, 5)), np.ones((31, 5), dtype=bool), target=200 - 7, min_per_layer=7)
    with pytest.raises(ConfigError, match="at least 93"):
        round_robin(np.ones((31, 5)), np.ones((31, 5), dtype=bool), target=50, min_per_layer=3)


def test_layers_keep_their_own_numbers():
    assert round_robin(np.ones((1, 1)), np.ones((1, 1), dtype=bool), target=1, min_per_layer=1, layers=[8]) == [
        FeatureId(8, 0)
    ]


def test_halves_are_about_equal_and_depend_on_the_image_alone():
    halves = [half_of(f"image-{n}", 0) for n in range(1000)]
    assert 430 < halves.count("selection") < 570
    assert halves == [half_of(f"image-{n}", 0) for n in range(1000)]
    assert halves != [half_of(f"image-{n}", 1) for n in range(1000)]
