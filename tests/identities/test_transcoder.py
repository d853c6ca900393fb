"""The transcoder is one function, however it is computed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clt.config import CLTConfig
from clt.models import ActivationStatistics, CrossLayerTranscoder
from clt.models.codes import DenseCodes, SparseCodes

KINDS = {
    "relu": {"activation_fn": "relu"},
    "jumprelu": {"activation_fn": "jumprelu"},
    "topk": {"activation_fn": "topk", "topk_k": 3},
    "topk global": {"activation_fn": "topk", "topk_k": 5, "topk_mode": "global"},
    "topk by value": {"activation_fn": "topk", "topk_k": 3, "ranking": "value"},
    "batchtopk": {"activation_fn": "batchtopk", "batchtopk_k": 6},
    "batchtopk per layer": {"activation_fn": "batchtopk", "batchtopk_k": 2, "batchtopk_mode": "per_layer"},
}
windows = st.sampled_from([(0, None), (1, None), (0, 1), (1, 2), (0, 2), (3, None)])


def transcoder_of(kind="topk", window=(0, None), layers=4, features=12, width=5, seed=0, **options):
    config = CLTConfig(
        num_features=features,
        num_layers=layers,
        d_model=width,
        first_target=window[0],
        n_targets=window[1],
        **KINDS[kind],
        **options,
    )
    model = CrossLayerTranscoder(config, seed=seed).double()
    for bias in model.b_enc:
        torch.nn.init.normal_(bias, std=0.3)
    torch.nn.init.normal_(model.b_dec)
    statistics = ActivationStatistics(*(torch.rand(layers, width) + 0.5 for _ in range(4)))
    model.fit_standardisation(statistics)
    model.running_threshold.fill_(0.05)
    return model


def inputs_for(model, tokens=7):
    return torch.randn(model.config.num_layers, tokens, model.config.d_model, dtype=torch.float64)


@given(window=windows, seed=st.integers(0, 99))
def test_window_decode_is_the_sum_over_pairs(window, seed):
    model = transcoder_of(window=window, seed=seed)
    features = torch.rand(4, 7, 12, dtype=torch.float64)

    by_pairs = torch.stack([model.bias(target).expand(7, -1).clone() for target in range(4)])
    for source in range(4):
        for target in model.config.targets_of(source):
            assert source in model.config.sources_of(target)
            by_pairs[target] += features[source] @ model.decoder(source, target)

    torch.testing.assert_close(model.decode(features), by_pairs)


@pytest.mark.parametrize("kind", KINDS)
@given(window=windows, seed=st.integers(0, 20))
def test_contributions_and_biases_add_up_to_decode(kind, window, seed):
    model = transcoder_of(kind, window, seed=seed)
    features = model.encode(inputs_for(model))

    total = torch.stack([model.bias(target).expand(7, -1).clone() for target in range(4)])
    for source in range(4):
        for target, part in zip(model.config.targets_of(source), model.contributions(source, features[source])):
            total[target] += part

    torch.testing.assert_close(model.decode(features), total)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["rms", "mean_std", "sqrt_d_model"])
def test_folding_the_standardisation_changes_no_output(kind, method):
    model = transcoder_of(kind, normalization_method=method)
    x = inputs_for(model, tokens=50)

    folded = model.folded().double()

    assert folded.config.normalization_method == "none"
    assert (model.encode(x) > 0).any()
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "topk global", "topk by value"])
def test_training_and_inference_agree_where_no_batch_is_involved(kind):
    model = transcoder_of(kind)
    x = inputs_for(model)

    trained = model.forward_training(x)

    torch.testing.assert_close(torch.stack([code.dense() for code in trained.codes]), model.encode(x))
    host_units = trained.reconstruction / model.target_scale + model.target_shift
    torch.testing.assert_close(host_units.transpose(0, 1), model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_one_layer_is_encoding_all_and_taking_one(kind):
    model = transcoder_of(kind)
    x = inputs_for(model)
    if kind == "topk global":
        with pytest.raises(ValueError, match="global"):
            model.encode_layer(0, x[0])
        return
    for layer in range(4):
        torch.testing.assert_close(model.encode_layer(layer, x[layer]), model.encode(x)[layer])


@given(
    tokens=st.integers(1, 9),
    features=st.integers(1, 8),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 99),
)
def test_sparse_and_dense_codes_agree_in_value_and_gradient(tokens, features, density, seed):
    rng = torch.Generator().manual_seed(seed)
    values = torch.rand(tokens, features, generator=rng, dtype=torch.float64)
    keep = torch.rand(tokens, features, generator=rng) < density
    weight = torch.randn(features, 6, generator=rng, dtype=torch.float64)
    upstream = torch.randn(tokens, 6, generator=rng, dtype=torch.float64)

    results = []
    for make in (lambda v: DenseCodes(v * keep), lambda v: SparseCodes.from_mask(v, keep)):
        v, w = values.clone().requires_grad_(), weight.clone().requires_grad_()
        codes = make(v)
        (codes.decode(w) * upstream).sum().backward()
        price = codes.price(torch.ones(features, dtype=torch.float64), 2.0)
        results.append((codes.dense(), v.grad, w.grad, price, codes.fired()))

    for dense, sparse in zip(*results):
        torch.testing.assert_close(sparse, dense)


def test_global_topk_keeps_k_over_all_layers_and_per_layer_topk_k_in_each():
    for kind, expected in (("topk", 3), ("topk global", None)):
        model = transcoder_of(kind)
        for bias in model.b_enc:
            bias.data.fill_(9.0)  # every pre-activation positive, so exactly k survive
        active = (model.encode(inputs_for(model)) > 0).sum(-1)
        if expected:
            assert (active == expected).all()
        else:
            assert (active.sum(0) == 5).all()


@pytest.mark.parametrize(("kind", "total"), [("batchtopk", 6 * 7), ("batchtopk per layer", 4 * 2 * 7)])
def test_batchtopk_keeps_k_per_token_on_average(kind, total):
    model = transcoder_of(kind)
    for bias in model.b_enc:
        bias.data.fill_(9.0)
    codes = model.forward_training(inputs_for(model)).codes
    assert sum(int(code.fired().sum()) for code in codes) == total


def test_batchtopk_at_inference_does_not_depend_on_the_batch():
    model = transcoder_of("batchtopk")
    x = inputs_for(model)
    torch.testing.assert_close(model.encode(x)[:, :1], model.encode(x[:, :1]))


def test_saved_and_loaded_is_the_same(tmp_path):
    model = CrossLayerTranscoder(CLTConfig(num_features=12, num_layers=3, d_model=5), seed=3)
    model.save_pretrained(tmp_path)
    again = CrossLayerTranscoder.from_pretrained(tmp_path)
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_initial_weights_of_the_first_features_do_not_depend_on_how_many_there_are():
    small = CrossLayerTranscoder(CLTConfig(num_features=256, num_layers=2, d_model=5))
    large = CrossLayerTranscoder(CLTConfig(num_features=1024, num_layers=2, d_model=5))
    # the bound shrinks with 1/sqrt(F), the direction stays
    torch.testing.assert_close(large.W_enc[1][:256] * 2, small.W_enc[1].data)
    torch.testing.assert_close(large.W_dec[0][:256], small.W_dec[0].data)


def test_folding_goes_by_the_numbers_not_by_the_name_of_the_method():
    model = transcoder_of("relu", normalization_method="none")
    with torch.no_grad():
        model.input_scale.mul_(2.0)
        model.target_shift.add_(1.0)
    x = inputs_for(model)
    folded = model.folded()
    assert torch.equal(folded.input_scale, torch.ones_like(folded.input_scale))
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-6)
