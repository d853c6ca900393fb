"""Every way of sharing decoders is the sum over pairs that its formula says, forwards and backwards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clt.config import CLTConfig, TrainingConfig
from clt.models import ActivationStatistics, CrossLayerTranscoder
from clt.models.codes import DenseCodes, SparseCodes
from clt.training.losses import LossManager

LAYERS, FEATURES, WIDTH, TOKENS = 4, 9, 5, 6
SHIFTED = {"enable_feature_offset": True, "enable_feature_scale": True}
FAMILIES = {
    "untied": {},
    "untied, shifted": {**SHIFTED, "post_encoder": "pair"},
    "untied, skip": {"skip_connection": True},
    "untied, own skip": {"skip_connection": "own", "enable_feature_offset": True},
    "per_source": {"decoder_tying": "per_source"},
    "per_source, scaled": {"decoder_tying": "per_source", "enable_feature_scale": True},
    "per_source, shifted, skip": {"decoder_tying": "per_source", **SHIFTED, "skip_connection": "all"},
    "per_target": {"decoder_tying": "per_target"},
    "per_target, shifted, skip": {"decoder_tying": "per_target", **SHIFTED, "skip_connection": True},
    "per_target, shifted by pair": {"decoder_tying": "per_target", **SHIFTED, "post_encoder": "pair"},
    "low rank": {"decoder_rank": 2},
    "low rank, skip": {"decoder_rank": 3, "skip_connection": "all"},
}
KINDS = {
    "jumprelu": {"activation_fn": "jumprelu"},
    "topk": {"activation_fn": "topk", "topk_k": 3},
    "batchtopk": {"activation_fn": "batchtopk", "batchtopk_k": 6},
}
few = settings(max_examples=8)  # of each family
families = pytest.mark.parametrize("family", FAMILIES)
windows = st.sampled_from([(0, None), (1, None), (0, 1), (1, 2), (0, 2), (3, None)])


def config_of(family, kind="topk", window=(0, None), **options):
    return CLTConfig(
        num_features=FEATURES,
        num_layers=LAYERS,
        d_model=WIDTH,
        first_target=window[0],
        n_targets=window[1],
        **FAMILIES[family],
        **{**KINDS[kind], **options},
    )


def transcoder_of(*args, seed=0, **options):
    """A transcoder whose parameters are all random, offsets, scales, thin matrices and skips included."""
    model = CrossLayerTranscoder(config_of(*args, **options), seed=seed).double()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("log_threshold"):
                parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64) * 0.5)
    model.fit_standardisation(ActivationStatistics(*(torch.rand(LAYERS, WIDTH, generator=rng) + 0.5 for _ in range(4))))
    model.running_threshold.fill_(0.05)
    return model


def inputs_for(tokens=TOKENS, seed=0):
    return torch.randn(LAYERS, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def matrix_of(model, source, target):
    """W_dec of a pair in standardised units and before scaling, straight from the definitions."""
    config, first = model.config, source + model.config.first_target
    if config.decoder_rank is not None:
        low = (
            model.U_dec[source][:, target - first - 1] @ model.V_dec[source][target - first - 1]
            if target > first
            else 0
        )
        return model.W_dec[source] + low
    return {
        "none": lambda: model.W_dec[source][:, target - first],
        "per_source": lambda: model.W_dec[source],
        "per_target": lambda: model.W_dec[target],
    }[config.decoder_tying]()


def shift_of(model, source, target):
    """Offset and scale of a pair."""
    config = model.config
    at = (target,) if config.post_encoder == "target" else (source, target - source - config.first_target)
    values = []
    for name in ("feature_offset", "feature_scale"):
        if getattr(config, f"enable_{name}"):
            value = getattr(model, name)[at[0]]
            values.append(value if len(at) == 1 else value[at[1]])
        else:
            values.append(torch.full((FEATURES,), float(name == "feature_scale"), dtype=torch.float64))
    return values


def pairs_of(config):
    for source in range(LAYERS):
        for target in range(LAYERS):
            distance = target - source - config.first_target
            if 0 <= distance < (config.n_targets or LAYERS):
                yield source, target


def reference(model, features, x):
    """The formula of docs/how-it-works.md, written down pair by pair; standardised units."""
    outputs = [model.b_dec[target].expand(features.shape[1], -1) for target in range(LAYERS)]
    skip = model.config.skip_connection
    for source, target in pairs_of(model.config):
        offset, scale = shift_of(model, source, target)
        on = (features[source] != 0).double()
        outputs[target] = outputs[target] + ((features[source] + offset) * scale * on) @ matrix_of(
            model, source, target
        )
        if skip == "all":
            first = source + model.config.first_target
            outputs[target] = outputs[target] + x[source] @ model.W_skip[source][target - first]
    if skip == "own":
        outputs = [y + x[target] @ model.W_skip[target][0] for target, y in enumerate(outputs)]
    return torch.stack(outputs, 1)


def standardised(model, x):
    return [model.standardise_inputs(layer, x[layer]) for layer in range(LAYERS)]


def gradients(model, value):
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(parameters.items(), found)
    }


@families
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@few
@given(window=windows, density=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99))
def test_decoding_is_the_formula_in_value_and_gradient(family, sparse, window, density, seed):
    model = transcoder_of(family, window=window, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    keep = torch.rand(LAYERS, TOKENS, FEATURES, generator=rng) < density
    features = (torch.rand(keep.shape, generator=rng, dtype=torch.float64) * keep).requires_grad_()
    upstream = torch.randn(TOKENS, LAYERS, WIDTH, generator=rng, dtype=torch.float64)
    if sparse:
        codes = [SparseCodes.from_mask(features[layer], keep[layer]) for layer in range(LAYERS)]
    else:
        codes = [DenseCodes(features[layer]) for layer in range(LAYERS)]

    x = [torch.zeros(TOKENS, WIDTH, dtype=torch.float64)] * LAYERS
    expected, ours = reference(model, features, x), model.reconstruct(codes)

    torch.testing.assert_close(ours, expected)
    theirs = gradients(model, (expected * upstream).sum())
    for name, grad in gradients(model, (ours * upstream).sum()).items():
        torch.testing.assert_close(grad, theirs[name], msg=name)
    at_features = [
        torch.autograd.grad((model_y * upstream).sum(), features)[0]
        for model_y in (reference(model, features, x), model.reconstruct(codes))
    ]
    torch.testing.assert_close(at_features[1] * keep, at_features[0] * keep)


@families
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_is_the_formula_of_its_codes_and_inputs(family, kind):
    model, x = transcoder_of(family, kind), inputs_for()
    forward = model.forward_training(x)
    features = torch.stack([code.dense() for code in forward.codes])
    torch.testing.assert_close(forward.reconstruction, reference(model, features, standardised(model, x)))


@families
@few
@given(window=windows, seed=st.integers(0, 20))
def test_contributions_skips_and_biases_add_up_to_the_prediction(family, window, seed):
    model, x = transcoder_of(family, window=window, seed=seed), inputs_for(seed=seed)
    features = model.encode(x)

    total = torch.stack([model.bias(target).expand(TOKENS, -1).clone() for target in range(LAYERS)])
    for source in range(LAYERS):
        for target, part in zip(model.config.targets_of(source), model.contributions(source, features[source])):
            total[target] += part
        for target, part in zip(model.config.skip_targets_of(source), model.skip(source, x[source])):
            total[target] += part

    torch.testing.assert_close(model(x), total)
    standard = reference(model, features, standardised(model, x))
    torch.testing.assert_close(total.transpose(0, 1), standard / model.target_scale + model.target_shift)


@families
@few
@given(window=windows, seed=st.integers(0, 20))
def test_untied_is_the_same_function_with_the_same_norms(family, window, seed):
    model, x = transcoder_of(family, window=window, seed=seed), inputs_for(seed=seed)
    untied = model.untied()
    assert untied.config.decoder_tying == "none"
    assert untied.config.decoder_rank is None
    assert not untied.config.enable_feature_scale
    torch.testing.assert_close(untied(x), model(x))
    for layer in range(LAYERS):
        torch.testing.assert_close(untied.decoder_norm(layer), model.decoder_norm(layer))
        torch.testing.assert_close(untied.decoder_norms(layer), model.decoder_norms(layer))
        for target in model.config.targets_of(layer):
            torch.testing.assert_close(untied.decoder(layer, target), model.decoder(layer, target))


@families
@few
@given(window=windows, seed=st.integers(0, 20))
def test_norms_are_those_of_the_scaled_matrices_in_value_and_gradient(family, window, seed):
    model = transcoder_of(family, window=window, seed=seed)
    for source in range(LAYERS):
        rows = [
            matrix_of(model, source, target) * shift_of(model, source, target)[1][:, None]
            for s, target in pairs_of(model.config)
            if s == source
        ]
        if not rows:
            assert (model.decoder_norm(source) == 0).all()
            continue
        by_pair = torch.stack([row.square().sum(1).sqrt() for row in rows])
        torch.testing.assert_close(model.decoder_norms(source), by_pair)
        whole = torch.cat(rows, 1).square().sum(1).sqrt()
        torch.testing.assert_close(model.decoder_norm(source), whole)
        expected = gradients(model, whole.sum())
        for name, grad in gradients(model, model.decoder_norm(source).sum()).items():
            torch.testing.assert_close(grad, expected[name], msg=name)


@families
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["rms", "mean_std", "none"])
def test_folding_the_standardisation_changes_no_output(family, kind, method):
    model, x = transcoder_of(family, kind, normalization_method=method), inputs_for(tokens=30)
    folded = model.folded()
    assert folded.config.normalization_method == "none"
    assert (model.encode(x) > 0).any()
    torch.testing.assert_close(folded(x), model(x))


@families
def test_saved_and_loaded_is_the_same(family, tmp_path):
    model = CrossLayerTranscoder(config_of(family), seed=3)
    model.save_pretrained(tmp_path)
    again = CrossLayerTranscoder.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def loss_of(model, x, targets, **options):
    losses = LossManager(TrainingConfig(training_steps=10, **options))
    dead = torch.zeros(LAYERS, FEATURES, dtype=torch.bool)
    dead[:, ::2] = True
    return losses.compute(model, model.forward_training(x), x, targets, 9, dead)


@families
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_down_the_gradient_lowers_the_loss_from_fresh_weights(family, kind):
    model = CrossLayerTranscoder(config_of(family, kind), seed=1)
    x = inputs_for(tokens=200).float()
    targets = torch.randn(200, LAYERS, WIDTH)
    before = loss_of(model, x, targets, sparsity_span_penalty=0.1).total
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
    after = loss_of(model, x, targets, sparsity_span_penalty=0.1).total
    assert after < before


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("untied", "untied, skip")])
def test_no_parameter_starts_where_it_cannot_learn(family):
    model = CrossLayerTranscoder(config_of(family, "jumprelu"), seed=1)
    with torch.no_grad():
        for bias in model.b_enc:
            bias.fill_(0.5)
    x, targets = inputs_for(tokens=200).float(), torch.randn(200, LAYERS, WIDTH)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):  # thin matrices wait one step for their partners
        optimizer.zero_grad()
        loss_of(model, x, targets).total.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.numel() == 0 or (parameter.grad is not None and parameter.grad.any()), name


@families
def test_auxiliary_loss_is_what_the_dead_features_decoders_would_add(family):
    model, x = transcoder_of(family), inputs_for()
    targets = torch.randn(TOKENS, LAYERS, WIDTH, dtype=torch.float64)
    auxiliary = loss_of(model, x, targets, aux_loss_factor=1.0, aux_k=2, loss_normalisation="none").auxiliary

    names = list(range(0, FEATURES, 2))
    features = torch.zeros(LAYERS, TOKENS, FEATURES, dtype=torch.float64)
    standard = standardised(model, x)
    for layer in range(LAYERS):
        h = standard[layer] @ model.W_enc[layer].T + model.b_enc[layer]
        for token in range(TOKENS):
            best = sorted(names, key=lambda f: -h[token, f].item())[:2]
            features[layer, token, best] = h[token, best].relu()
    nothing = [torch.zeros_like(each) for each in standard]
    added = reference(model, features, nothing) - model.b_dec
    left_over = (targets - model.forward_training(x).reconstruction - added) / model.target_scale
    torch.testing.assert_close(auxiliary, left_over.square().mean((0, 2)).sum())


@families
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_parameters_train_and_stay_close_to_float32(family, kind):
    wide = CrossLayerTranscoder(config_of(family, kind, ranking="value"), seed=1)
    half = CrossLayerTranscoder(wide.config.replace(clt_dtype="bfloat16"), seed=1)
    half.load_state_dict(wide.state_dict())
    assert half.W_dec[0].dtype == torch.bfloat16
    assert half.input_scale.dtype == torch.float32
    x, targets = inputs_for().bfloat16(), torch.randn(TOKENS, LAYERS, WIDTH)
    loss_of(half, x, targets, sparsity_span_penalty=0.1).total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in half.parameters())
    features = wide.encode(x)
    torch.testing.assert_close(half.decode(features, x), wide.decode(features, x), rtol=0.05, atol=0.05)
    torch.testing.assert_close(half.folded().decode(features, x), half.decode(features, x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_and_dense_agree_under_autocast(kind):
    for family in FAMILIES:
        model = CrossLayerTranscoder(config_of(family, kind), seed=1)
        x = inputs_for().float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            forward = model.forward_training(x)
            dense = model.reconstruct([DenseCodes(code.dense()) for code in forward.codes])
            sparse = model.reconstruct([SparseCodes.from_mask(c.dense(), c.dense() > 0) for c in forward.codes])
        forward.reconstruction.float().square().sum().backward()
        torch.testing.assert_close(dense.float(), sparse.float(), rtol=0.05, atol=0.05)


@few
@given(seed=st.integers(0, 50))
def test_a_per_layer_transcoder_is_a_cross_layer_one_whose_other_decoders_are_zero(seed):
    model = transcoder_of("untied", "topk", seed=seed, ranking="value")
    alone = CrossLayerTranscoder(model.config.replace(n_targets=1)).double()
    tensors = model.state_dict()
    for layer in range(LAYERS):
        tensors[f"W_dec.{layer}"][:, 1:] = 0
        tensors[f"W_dec.{layer}"] = tensors[f"W_dec.{layer}"][:, :1]
    alone.load_state_dict(tensors)
    x = inputs_for(seed=seed)
    torch.testing.assert_close(alone(x), model(x))


def test_decoding_a_skip_transcoder_without_inputs_is_refused():
    model = transcoder_of("untied, skip")
    with pytest.raises(ValueError, match="decode\\(features, inputs\\)"):
        model.decode(model.encode(inputs_for()))
