"""crosslayer-coding's state dicts, of both versions, compute here what its own formulas compute."""

import json

import pytest
import torch
from safetensors.torch import save_file

from clt.__main__ import main
from clt.config import CLTConfig
from clt.errors import CheckpointError, ConfigError
from clt.models import CrossLayerTranscoder
from clt.models.formats import read_crosslayer_coding
from clt.scripts import convert
from tests.tiny_data import write_data

LAYERS, WIDTH, FEATURES = 3, 4, 6
FAMILIES = {
    "untied": {},
    "untied with skip": {"skip_connection": True},
    "per source": {"decoder_tying": "per_source", "enable_feature_offset": True, "enable_feature_scale": True},
    "per target": {
        "decoder_tying": "per_target", "enable_feature_offset": True, "enable_feature_scale": True,
        "skip_connection": True,
    },
}  # fmt: skip


def config_of(family="untied", **options):
    given = {"activation_fn": "jumprelu", "jumprelu_threshold": 0.0, "normalization_method": "none", **options}
    return {
        "num_features": FEATURES, "num_layers": LAYERS, "d_model": WIDTH, "tl_input_template": None,
        "decoder_tying": "none", **FAMILIES[family], **given,
    }  # fmt: skip


def seed_weights(config, version="v2"):
    """A state dict with its names and shapes."""
    rng = torch.Generator().manual_seed(0)
    untied, layers = config["decoder_tying"] == "none", range(LAYERS)
    decoders = [f"{s}->{t}" for t in layers for s in range(t + 1)] if untied else [str(i) for i in layers]
    parts = {}
    for layer in layers:
        parts[f"encoder_module.encoders.{layer}.weight"] = (FEATURES, WIDTH)
        parts[f"encoder_module.encoders.{layer}.bias_param"] = (FEATURES,)
        for name in ("offset", "scale"):
            if config.get(f"enable_feature_{name}"):
                parts[f"decoder_module.feature_{name}.{layer}"] = (FEATURES,)
    for each in decoders:
        parts[f"decoder_module.decoders.{each}.weight"] = (WIDTH, FEATURES)
        parts[f"decoder_module.decoders.{each}.bias_param"] = (WIDTH,)
        if config.get("skip_connection"):
            parts[f"decoder_module.skip_weights.{each}"] = (WIDTH, WIDTH)
    tensors = {name: torch.randn(shape, generator=rng) for name, shape in parts.items()}
    if config["activation_fn"] == "jumprelu":
        tensors["theta_manager.log_threshold"] = torch.randn(LAYERS, FEATURES, generator=rng) - 1
    if version == "v1":
        tensors = {name.split("_module.")[-1].removeprefix("theta_manager."): each for name, each in tensors.items()}
    return {f"_orig_mod.{name}": each for name, each in tensors.items()} if version == "compiled" else tensors


def seed_forward(tensors, config, x):
    """Its model, written down from its formulas: one pair after the other, one bias each."""
    w = {name.removeprefix("_orig_mod.").split("_module.")[-1]: value for name, value in tensors.items()}
    theta = w.get("theta_manager.log_threshold", w.get("log_threshold")).exp()
    outputs, untied = [], config["decoder_tying"] == "none"
    for t in range(LAYERS):
        y = torch.zeros_like(x[0])
        for s in range(t + 1):
            h = x[s] @ w[f"encoders.{s}.weight"].T + w[f"encoders.{s}.bias_param"]
            a = h * (h >= theta[s])
            if not untied:
                on = (a != 0).float()
                a = (a + w[f"feature_offset.{t}"] * on) * (w[f"feature_scale.{t}"] * on)
            key = f"{s}->{t}" if untied else str(s if config["decoder_tying"] == "per_source" else t)
            y = y + a @ w[f"decoders.{key}.weight"].T
            if config["decoder_tying"] != "per_target" or s == t:
                y = y + w[f"decoders.{key}.bias_param"]
            if untied and config.get("skip_connection"):
                y = y + x[s] @ w[f"skip_weights.{key}"].T
        if not untied and config.get("skip_connection"):
            y = y + x[t] @ w[f"skip_weights.{t}"].T
        outputs.append(y)
    return torch.stack(outputs)


def inputs():
    return torch.randn(LAYERS, 50, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("version", ["v1", "v2", "compiled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_its_weights_compute_what_its_formulas_say(family, version):
    config = config_of(family)
    tensors = seed_weights(config, version)
    model = read_crosslayer_coding(tensors, CLTConfig.from_dict(config))
    x = inputs()
    assert (model.encode(x) > 0).any()
    torch.testing.assert_close(model(x), seed_forward(tensors, config, x), rtol=1e-5, atol=1e-5)


def statistics(path):
    rng = torch.Generator().manual_seed(2)
    values = torch.rand(LAYERS, 2, 2, WIDTH, generator=rng) + 0.5
    named = {
        str(layer): {
            side: {"mean": values[layer, i, 0].tolist(), "std": values[layer, i, 1].tolist()}
            for i, side in enumerate(("inputs", "targets"))
        }
        for layer in range(LAYERS)
    }
    path.write_text(json.dumps(named))
    return values


def test_the_data_sets_statistics_become_part_of_the_transcoder(tmp_path):
    config = config_of(normalization_method="auto")
    tensors, x = seed_weights(config), inputs()
    values = statistics(tmp_path / "norm_stats.json")
    model = read_crosslayer_coding(tensors, CLTConfig.from_dict(config), tmp_path / "norm_stats.json")
    standard = (x - values[:, 0, 0][:, None]) / (values[:, 0, 1][:, None] + 1e-6)
    wanted = seed_forward(tensors, config, standard) * (values[:, 1, 1][:, None] + 1e-6) + values[:, 1, 0][:, None]
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"Give the norm_stats\.json"):
        read_crosslayer_coding(tensors, CLTConfig.from_dict(config))


def test_sqrt_d_model_needs_no_statistics():
    config = config_of(sqrt_d_model_normalize=True)
    tensors, x = seed_weights(config), inputs()
    model = read_crosslayer_coding(tensors, CLTConfig.from_dict(config))
    torch.testing.assert_close(model(x), seed_forward(tensors, config, x * 2) / 2, rtol=1e-5, atol=1e-5)


def test_tensors_that_are_missing_unknown_or_of_another_shape_are_named():
    config = CLTConfig.from_dict(config_of())
    tensors = seed_weights(config_of())
    with pytest.raises(CheckpointError, match=r"lack decoders\.0->1\.weight"):
        read_crosslayer_coding({k: v for k, v in tensors.items() if "0->1.weight" not in k}, config)
    with pytest.raises(CheckpointError, match=r"lora is no tensor"):
        read_crosslayer_coding({**tensors, "lora": torch.zeros(1)}, config)
    with pytest.raises(CheckpointError, match=r"encoders\.0\.weight has the shape \(6, 4\)"):
        read_crosslayer_coding(tensors, config.replace(num_features=7))


def save(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "clt.pt")


def test_clt_convert_writes_its_weights_as_ours(tmp_path):
    config = config_of("per source")
    tensors, x = seed_weights(config), inputs()
    save(tmp_path / "theirs", config, tensors)
    options = convert.Options(clt=str(tmp_path / "theirs"), output=str(tmp_path / "ours"), device="cpu")
    with pytest.raises(ConfigError, match="--method import"):
        convert.main(options)
    convert.main(convert.Options(**{**vars(options), "method": "import"}))
    model = CrossLayerTranscoder.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(model(x), seed_forward(tensors, config, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_clt_import_reads_its_safetensors_folder(family, version, tmp_path):
    config, x = config_of(family), inputs()
    tensors = seed_weights(config, version)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    (theirs / "cfg.json").write_text(json.dumps(config))
    save_file(tensors, theirs / "model.safetensors")
    main(["import", str(theirs), str(ours)])
    for folder in (theirs, ours):
        model = CrossLayerTranscoder.from_pretrained(folder)
        torch.testing.assert_close(model(x), seed_forward(tensors, config, x), rtol=1e-5, atol=1e-5)


def test_its_batchtopk_becomes_jumprelu_with_the_same_l0(tmp_path):
    data = write_data(tmp_path / "data", tokens=3000, width=WIDTH)
    config = config_of(activation_fn="batchtopk", batchtopk_k=4, normalization_method="auto")
    save(tmp_path / "theirs", config, seed_weights(config))
    options = convert.Options(
        clt=str(tmp_path / "theirs"), output=str(tmp_path / "ours"), data=str(data), method="estimate", calibrate=True,
        batch_size_tokens=200, nmse_tolerance=10.0, device="cpu",
    )  # fmt: skip
    converted, drift = convert.convert(options)
    assert converted.config.activation_fn == "jumprelu"
    assert drift is not None
    assert drift.l0 < 0.5
    assert sum(drift.before.l0_per_layer) == pytest.approx(4, abs=0.5)
