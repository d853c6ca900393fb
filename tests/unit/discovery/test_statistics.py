"""Feature statistics: equal to the formulas written down on dense arrays; planted features are found, chance is not."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clt.discovery.features_file import LayerFeatures, save_features
from clt.discovery.statistics import (
    benjamini_hochberg,
    class_statistics,
    length_bins,
    make_strata,
    permutation_test,
)
from clt.discovery.table import FeatureTable, LayerTable, load_table
from clt.errors import DiscoveryError


def table_of(x):
    """A table from strengths [sample, layer, feature], 0 where inactive."""
    layers = {}
    for layer in range(x.shape[1]):
        features, samples = np.nonzero(x[:, layer].T)
        layers[layer] = LayerTable(
            samples.astype(np.int32), features.astype(np.int32), x[samples, layer, features].astype(np.float32)
        )
    return FeatureTable(layers, x.shape[0], x.shape[2])


def random_strengths(seed, n=40, layers=2, features=30, density=0.3):
    rng = np.random.default_rng(seed)
    return ((rng.random((n, layers, features)) < density) * rng.lognormal(size=(n, layers, features))).astype(
        np.float32
    )


@given(seed=st.integers(0, 50))
def test_the_scores_are_the_guides_formulas(seed):
    x = random_strengths(seed)
    good = np.random.default_rng(seed).random(40) < 0.4
    got = class_statistics(table_of(x), good, epsilon=0.01)
    on = x > 0
    good_freq, bad_freq = on[good].mean(0), on[~good].mean(0)
    good_avg = np.divide(x[good].sum(0), on[good].sum(0), out=np.zeros(x.shape[1:]), where=on[good].sum(0) > 0)
    bad_avg = np.divide(x[~good].sum(0), on[~good].sum(0), out=np.zeros(x.shape[1:]), where=on[~good].sum(0) > 0)
    np.testing.assert_allclose(got.good_freq, good_freq, rtol=1e-6)
    np.testing.assert_allclose(got.frequency_ratio, good_freq / (bad_freq + 0.01), rtol=1e-5)
    np.testing.assert_allclose(got.activation_ratio, good_avg / (bad_avg + 0.01), rtol=1e-5)
    np.testing.assert_allclose(got.goodness_score, good_freq / (bad_freq + 0.01) * good_avg, rtol=1e-5)


def test_selecting_samples_of_a_table_is_the_table_of_those_samples():
    x = random_strengths(0)
    chosen = np.random.default_rng(1).random(40) < 0.5
    everyone = np.ones(int(chosen.sum()), dtype=bool)
    for one, two in ((table_of(x).select(chosen), table_of(x[chosen])),):
        np.testing.assert_allclose(one.mean_strength(everyone), two.mean_strength(everyone))


def test_the_statistic_is_in_standard_deviations_of_the_shuffles_themselves():
    x = random_strengths(3, n=60, density=0.5)
    good = np.arange(60) < 25
    strata = make_strata(np.arange(60) % 3)
    got = permutation_test(table_of(x), good, strata, n_permutations=20)
    rng = np.random.default_rng(0)
    sums = []
    for _ in range(4000):
        labels = good.copy()
        for stratum in range(3):
            labels[strata == stratum] = rng.permutation(labels[strata == stratum])
        sums.append((x * labels[:, None, None]).sum(0))
    sums = np.array(sums)
    expected = ((x * good[:, None, None]).sum(0) - sums.mean(0)) / sums.std(0)
    np.testing.assert_allclose(got.z, expected, atol=0.15)


def planted(seed, n=200, features=1500, n_planted=40, strength=1.2):
    rng = np.random.default_rng(seed)
    good = rng.random(n) < 0.45
    x = (rng.random((n, 2, features)) < 0.35) * rng.lognormal(0, 0.5, (n, 2, features))
    x[:, 0, :n_planted] *= np.where(good[:, None], 1 + strength, 1.0)
    x[:, 0, :n_planted] *= rng.random((n, n_planted)) < np.where(good[:, None], 0.95, 0.5)
    return x.astype(np.float32), good


def test_planted_features_are_recovered_and_false_discoveries_stay_below_the_stated_rate():
    found, false, missed = 0, [], 0
    for seed in range(6):
        x, good = planted(seed)
        q = permutation_test(table_of(x), good, np.zeros(len(good), dtype=np.int64), seed=seed).q_value
        hits = q < 0.1
        found += int(hits[0, :40].sum())
        missed += int((~hits[0, :40]).sum())
        false.append((hits.sum() - hits[0, :40].sum()) / max(1, hits.sum()))
    assert found / (found + missed) > 0.9
    assert np.mean(false) < 0.1


def test_without_a_difference_next_to_nothing_is_discovered():
    n_any = 0
    for seed in range(20):
        x, good = planted(seed, features=400, n_planted=0)
        n_any += bool(
            (permutation_test(table_of(x), good, np.zeros(200, dtype=np.int64), seed=seed).q_value < 0.1).any()
        )
    # Under the null the chance of any discovery is the stated rate: 2 of 20 expected, 6 or more in 1 % of such tests.
    assert n_any <= 5


def test_a_feature_that_only_says_yes_is_found_without_balance_and_not_with_it():
    rng = np.random.default_rng(0)
    yes = rng.random(300) < 0.5
    good = rng.random(300) < np.where(yes, 0.9, 0.1)
    x = rng.lognormal(size=(300, 1, 200)) * (rng.random((300, 1, 200)) < 0.5)
    x[:, 0, 0] = yes * rng.lognormal(size=300)
    one = permutation_test(table_of(x.astype(np.float32)), good, np.zeros(300, dtype=np.int64))
    two = permutation_test(table_of(x.astype(np.float32)), good, make_strata(yes))
    assert one.q_value[0, 0] < 0.02
    assert two.q_value[0, 0] > 0.1


def test_rare_features_are_not_tested():
    x = np.zeros((50, 1, 3), dtype=np.float32)
    x[:4, 0, 0] = 1
    x[:30, 0, 1] = 1
    got = permutation_test(table_of(x), np.arange(50) < 25, np.zeros(50, dtype=np.int64), min_active=5)
    assert got.n_tested == 1
    assert got.q_value[0, 0] == got.q_value[0, 2] == 1
    assert got.q_value[0, 1] < 0.05


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_q_values_are_the_smallest_rates_at_which_each_test_is_accepted(p):
    p = np.array(p)
    q = benjamini_hochberg(p)
    n = len(p)
    for one, rate in zip(p, q):
        expected = min(n * other / (p <= other).sum() for other in p if other >= one)
        assert rate == pytest.approx(min(expected, 1))


def test_length_bins_are_about_equal_and_keep_equal_lengths_together():
    bins = length_bins([1, 1, 1, 5, 6, 7, 20, 30])
    assert len(set(bins[:3])) == 1
    assert bins[-1] == bins.max() > bins[0]


def write(path, matrices):
    save_features(path, {layer: LayerFeatures.from_dense(each) for layer, each in enumerate(matrices)}, dense=True)


def test_a_table_counts_the_positions_of_the_mask_only(tmp_path):
    first = torch.zeros(4, 3)
    first[0, 0], first[2, 0], first[3, 0], first[1, 2] = 9, 2, 4, 5
    write(tmp_path / "a.pt", [first, first.flip(0)])
    write(tmp_path / "b.pt", [torch.zeros(2, 3), torch.zeros(2, 3)])
    masks = [np.array([False, False, True, True]), np.array([True, True])]
    table = load_table([tmp_path / "a.pt", tmp_path / "b.pt"], masks)
    both = np.array([True, True])
    np.testing.assert_allclose(table.mean_strength(both), [[3, 0, 0], [9, 0, 5]])
    np.testing.assert_allclose(table.frequency(both), [[0.5, 0, 0], [0.5, 0, 0.5]])


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    write(tmp_path / "a.pt", [torch.ones(2, 3)])
    write(tmp_path / "b.pt", [torch.ones(2, 4)])
    write(tmp_path / "c.pt", [torch.ones(3, 3)])
    mask = np.ones(2, dtype=bool)
    with pytest.raises(DiscoveryError, match="different transcoders"):
        load_table([tmp_path / "a.pt", tmp_path / "b.pt"], [mask, mask])
    with pytest.raises(DiscoveryError, match="3 positions"):
        load_table([tmp_path / "a.pt", tmp_path / "c.pt"], [mask, mask])
