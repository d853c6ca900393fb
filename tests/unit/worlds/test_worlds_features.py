"""The features world: what is written is what was said to be written."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clt.errors import WorldError
from clt.worlds import load
from clt.worlds.features import FeaturesWorld

worlds = st.builds(
    FeaturesWorld,
    n_layers=st.just(3),
    d_model=st.sampled_from([8, 16]),
    n_features=st.sampled_from([6, 24]),
    density=st.floats(0.05, 1.0),
    seed=st.integers(0, 9),
)


@given(world=worlds)
def test_true_decoders_reproduce_the_targets_exactly(world):
    made, truth = world.activations("train", 20), world.features()
    for layer in range(world.n_layers):
        torch.testing.assert_close(made.active @ truth.decoder[layer], made.batch.targets[layer])


@given(world=worlds)
def test_orthonormal_encoders_read_each_feature_at_its_layer(world):
    made, truth = world.activations("train", 20), world.features()
    read = torch.stack([made.batch.inputs[layer] @ truth.encoder[f] for f, layer in enumerate(truth.layer)], dim=1)
    torch.testing.assert_close(read, made.active, atol=1e-5, rtol=1e-5)


def test_a_feature_writes_to_its_own_layer_and_later_ones_only():
    truth = FeaturesWorld(n_layers=4, n_features=16, d_model=8).features()
    for feature, layer in enumerate(truth.layer):
        norms = truth.decoder[:, feature].norm(dim=-1)
        torch.testing.assert_close(norms, (torch.arange(4) >= layer).float())


def test_encoders_are_unit_vectors_also_in_superposition():
    truth = FeaturesWorld(n_layers=2, n_features=64, d_model=8).features()
    torch.testing.assert_close(truth.encoder.norm(dim=-1), torch.ones(64))


def test_the_same_arguments_give_the_same_activations_and_other_splits_do_not():
    world = FeaturesWorld(d_model=16, n_features=32)
    first, again = world.activations("train", 50), world.activations("train", 50)
    torch.testing.assert_close(first.batch.inputs, again.batch.inputs, atol=0, rtol=0)
    assert not torch.equal(first.active, world.activations("held_out", 50).active)
    assert not torch.equal(first.active, world.activations("train", 50, seed=1).active)
    assert not torch.equal(
        world.features().encoder, FeaturesWorld(d_model=16, n_features=32, seed=1).features().encoder
    )


def test_density_is_the_share_of_firing_features():
    active = load("features").activations("train", 4000).active
    assert (active > 0).float().mean().item() == pytest.approx(0.02, rel=0.03)
    assert active[active > 0].min() >= 0.5


def test_noise_moves_the_inputs_and_leaves_the_targets():
    quiet, loud = FeaturesWorld(), FeaturesWorld(noise=0.1)
    first, second = quiet.activations("train", 500).batch, loud.activations("train", 500).batch
    torch.testing.assert_close(first.targets, second.targets)
    assert (second.inputs - first.inputs).std().item() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize(("options", "named"), [({"n_features": 10}, "n_features=10"), ({"density": 0.0}, "density=0")])
def test_impossible_sizes_are_refused_by_name(options, named):
    with pytest.raises(WorldError, match=named):
        FeaturesWorld(**options)
