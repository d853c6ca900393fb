"""What a transcoder's configuration accepts, in its own words and in other projects', and what it refuses."""

import json

import jaxtyping
import pytest
import torch

from clt.config import CLTConfig, eleuther_config
from clt.errors import ConfigError
from clt.models import ActivationStatistics, CrossLayerTranscoder

SIZE = {"num_features": 8, "num_layers": 3, "d_model": 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_tying": "both"}, "decoder_tying = 'both' is not one of 'none', 'per_source', 'per_target'"),
        ({"decoder_rank": 2, "decoder_tying": "per_source"}, "decoder_rank = 2 does not go with decoder_tying"),
        ({"decoder_rank": 2, "enable_feature_scale": True}, "does not go with enable_feature_scale = True"),
        ({"decoder_rank": 2, "enable_feature_offset": True}, "does not go with enable_feature_offset = True"),
        ({"decoder_rank": 5}, "decoder_rank = 5 is more than 8 features by d_model = 4"),
        ({"decoder_rank": 0}, "decoder_rank = 0 must be greater than 0"),
        ({"skip_connection": "some"}, "skip_connection = 'some' is not one of"),
        ({"post_encoder": "source"}, "post_encoder = 'source' is not one of 'target', 'pair'"),
        ({"jumprelu_reach": "encoder"}, "jumprelu_reach = 'encoder' is not one of"),
        ({"ranking": "zscore"}, "ranking = 'zscore' is not one of 'norm', 'value'"),
        ({"activation_fn": "topk", "topk_k": 0}, "topk_k = 0 must be greater than 0"),
        ({"activation_fn": "topk", "topk_k": 2.5}, "topk_k = 2.5 is neither a whole number"),
        ({"activation_fn": "topk", "topk_k": 9.0}, "topk_k = 9 is more than the 8 features"),
    ],
)
def test_what_cannot_work_is_refused_by_name(options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users run without the tests' type checks
    with pytest.raises(ConfigError) as error:
        CLTConfig(**SIZE, **options)
    assert message in str(error.value)


def test_a_k_below_one_is_a_share_of_the_features_there_are_to_choose_from():
    config = CLTConfig(**SIZE, activation_fn="topk", topk_k=0.3)
    assert config.topk_count == 3
    assert config.replace(topk_mode="global").topk_count == 8
    assert config.replace(topk_k=5).topk_count == 5


@pytest.mark.parametrize(
    ("tying", "given", "meant"),
    [("none", True, "all"), ("per_source", True, "own"), ("per_target", True, "own"), ("none", False, "none")],
)
def test_a_skip_connection_of_true_means_what_it_meant_in_crosslayer_coding(tying, given, meant):
    assert CLTConfig(**SIZE, decoder_tying=tying, skip_connection=given).skip_connection == meant


CROSSLAYER_CODING = {
    **SIZE,
    "model_name": "gpt2",
    "normalization_method": "auto",
    "activation_fn": "topk",
    "jumprelu_threshold": 0.03,
    "batchtopk_k": None,
    "batchtopk_straight_through": True,
    "topk_k": 6,
    "topk_straight_through": False,
    "clt_dtype": None,
    "expected_input_dtype": "float32",
    "mlp_input_template": None,
    "mlp_output_template": None,
    "tl_input_template": None,
    "tl_output_template": None,
    "decoder_tying": "per_target",
    "enable_feature_offset": True,
    "enable_feature_scale": True,
    "skip_connection": True,
}


def test_a_config_file_of_crosslayer_coding_is_read_as_it_meant(tmp_path):
    (tmp_path / "cfg.json").write_text(json.dumps(CROSSLAYER_CODING))
    config = CLTConfig.from_json(tmp_path / "cfg.json")
    assert (config.topk_mode, config.topk_k) == ("global", 6)
    assert config.normalization_method == "mean_std"
    assert (config.decoder_tying, config.skip_connection) == ("per_target", "own")
    assert config.enable_feature_offset
    assert config.enable_feature_scale
    assert "topk_straight_through" not in config.to_dict()
    assert CLTConfig.from_dict(config.to_dict()) == config


def test_offset_and_scale_without_tying_are_ignored_as_there():
    config = CLTConfig.from_dict({**CROSSLAYER_CODING, "decoder_tying": "none"})
    assert not config.enable_feature_offset
    assert not config.enable_feature_scale


def test_a_converted_model_and_a_share_of_batchtopk_are_read():
    converted = CLTConfig.from_dict({**SIZE, "activation_fn": "jumprelu", "jumprelu_threshold": 0.0})
    assert converted.jumprelu_threshold > 0
    share = CLTConfig.from_dict({**SIZE, "activation_fn": "batchtopk", "batchtopk_frac": 0.25, "batchtopk_k": None})
    assert share.batchtopk_k == 6


@pytest.mark.parametrize(
    "old",
    [
        {"normalization_method": "sqrt_d_model"},
        {"normalization_method": "auto_sqrt_d_model"},
        {"normalization_method": "estimated_mean_std_sqrt_d_model"},
        {"normalization_method": "auto", "sqrt_d_model_normalize": True},
    ],
)
def test_the_spellings_of_multiplying_by_sqrt_d_model_mean_one_thing(old):
    config = CLTConfig.from_dict({**CROSSLAYER_CODING, **old})
    assert config.normalization_method == "sqrt_d_model"
    model = CrossLayerTranscoder(config)
    model.fit_standardisation(ActivationStatistics(*torch.rand(4, 3, 4)))
    x = torch.rand(5, 4)
    torch.testing.assert_close(model.standardise_inputs(1, x), x * 2)


def test_the_constructor_takes_the_old_flags_and_forgets_them():
    old = CLTConfig(**SIZE, topk_straight_through=False, batchtopk_straight_through=True)
    assert old == CLTConfig(**SIZE)
    assert old.replace(num_features=9).num_features == 9


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {"num_features": 128, "span": 1, "decoder_tying": "none", "topk_k": 32, "enable_feature_scale": False}),
        ({"cross_layer": 2}, {"span": 2, "enable_feature_offset": True, "post_encoder": "pair"}),
        ({"cross_layer": 12, "train_post_encoder": False}, {"span": 3, "enable_feature_offset": False}),
        ({"cross_layer": 12, "post_encoder_scale": True}, {"enable_feature_scale": True, "ranking": "value"}),
        ({"cross_layer": 3, "coalesce_topk": "concat"}, {"decoder_tying": "per_target"}),
        ({"cross_layer": 3, "coalesce_topk": "per-layer", "skip_connection": True}, {"decoder_tying": "none"}),
        ({"cross_layer": 3, "per_source_tied": True, "skip_connection": True}, {"skip_connection": "all"}),
        ({"coalesce_topk": "concat", "skip_connection": True}, {"skip_connection": "own"}),
        ({"num_latents": 48, "k": 4}, {"num_features": 48, "topk_k": 4, "topk_mode": "per_layer"}),
        ({"activation": "batchtopk"}, {"batchtopk_k": 32, "batchtopk_mode": "per_layer", "topk_k": None}),
        ({"normalize_io": True, "dtype": "bfloat16"}, {"normalization_method": "rms", "clt_dtype": "bfloat16"}),
    ],
)
def test_eleuther_options_become_ours(theirs, ours):
    config = eleuther_config({"num_layers": 3, "d_in": 4, **theirs})
    assert {name: getattr(config, name) for name in ours} == ours
    CrossLayerTranscoder(config)


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        ({"transcode": False}, "transcode = False has no counterpart"),
        ({"topk_coalesced": True}, "anew for every target"),
        ({"coalesce_topk": "group"}, "not implemented there either"),
        ({"coalesce_topk": "all"}, "not one of none, concat, per-layer"),
        ({"activation": "groupmax"}, "Use topk or batchtopk"),
        ({"divide_cross_layer": True}, "post_encoder_scale"),
        ({"secondary_target_tied": True}, "decodes every feature twice"),
        ({"use_fp8": True}, "dtype = bfloat16"),
        ({"coalesce_topk": "concat", "per_source_tied": True}, "Choose one"),
        ({"cross_layer": 2, "post_encoder_scale": True, "train_post_encoder": False}, "nothing would be cross-layer"),
        ({"expansion": 3}, "no option 'expansion'"),
        ({"num_layers": None}, "needs num_layers and d_model"),
        ({"k": 1000}, "topk_k = 1000 is more than the 128 features"),
    ],
)
def test_eleuther_options_without_counterpart_are_refused_with_the_reason(theirs, reason):
    with pytest.raises(ConfigError) as error:
        eleuther_config({"num_layers": 3, "d_model": 4, **theirs})
    assert reason in str(error.value)
