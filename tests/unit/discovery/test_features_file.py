"""Activation files: what is written is read, in both forms, by us and by plain torch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clt.discovery.features_file import LARGEST_ERROR, LayerFeatures, _integers, _varints, load_features, save_features
from clt.errors import DiscoveryError


def random_layer(seed, n_positions=7, n_features=90, density=0.1):
    rng = torch.Generator().manual_seed(seed)
    on = torch.rand(n_positions, n_features, generator=rng) < density
    return on * (torch.randn(n_positions, n_features, generator=rng).exp())


@given(st.lists(st.integers(0, 2**40), max_size=60))
def test_varints_are_read_back(numbers):
    data = np.array(numbers, dtype=np.int64)
    assert _integers(_varints(data), np.uint64).tolist() == numbers


@given(
    seed=st.integers(0, 99),
    positions=st.integers(1, 9),
    features=st.integers(1, 300),
    density=st.sampled_from([0, 0.1, 1]),
)
def test_packed_features_are_the_same_places_and_nearly_the_same_values(
    tmp_path_factory, seed, positions, features, density
):
    matrix = random_layer(seed, positions, features, density)
    path = tmp_path_factory.mktemp("features") / "sample_0000.pt"
    save_features(path, {3: LayerFeatures.from_dense(matrix)})
    read = load_features(path)[3].dense()
    assert torch.equal(read > 0, matrix > 0)
    assert ((read - matrix).abs() <= LARGEST_ERROR * matrix * 1.001).all()


def test_dense_files_are_the_seeds_dictionary(tmp_path):
    matrix = random_layer(0)
    save_features(
        tmp_path / "s.pt", {0: LayerFeatures.from_dense(matrix), 5: LayerFeatures.from_dense(matrix)}, dense=True
    )
    content = torch.load(tmp_path / "s.pt", weights_only=True)
    assert list(content) == [0, 5]
    assert torch.equal(content[5], matrix)
    assert torch.equal(load_features(tmp_path / "s.pt")[5].dense(), matrix)


def test_packed_files_are_read_by_torch_alone_and_are_small(tmp_path):
    layer = LayerFeatures.from_dense(random_layer(0, 200, 4000, 0.01))
    save_features(tmp_path / "s.pt", {0: layer})
    content = torch.load(tmp_path / "s.pt", weights_only=True)
    assert set(content[0]) == {"entries", "values", "shape", "largest"}
    assert (tmp_path / "s.pt").stat().st_size < 3 * len(layer.features) + 2000


def test_a_seeds_file_with_a_batch_axis_is_read(tmp_path):
    matrix = random_layer(1)
    torch.save({8: matrix[None]}, tmp_path / "s.pt")
    assert torch.equal(load_features(tmp_path / "s.pt")[8].dense(), matrix)


@pytest.mark.parametrize("content", [b"", b"not a file", None])
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "sample_0007.pt"
    if content is None:
        save_features(path, {0: LayerFeatures.from_dense(random_layer(0))})
        content = path.read_bytes()[:-200]
    path.write_bytes(content)
    with pytest.raises(DiscoveryError, match=r"sample_0007\.pt"):
        load_features(path)


def test_other_content_is_refused(tmp_path):
    torch.save([torch.zeros(2, 2)], tmp_path / "list.pt")
    torch.save({0: "text"}, tmp_path / "text.pt")
    for name in ("list.pt", "text.pt"):
        with pytest.raises(DiscoveryError, match=name):
            load_features(tmp_path / name)
    with pytest.raises(DiscoveryError, match="does not exist"):
        load_features(tmp_path / "none.pt")
