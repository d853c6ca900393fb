"""Conversion to JumpReLU keeps the transcoder, or says that it does not."""

import json
from dataclasses import replace

import pytest
import torch

from clt.config import CLTConfig, TrainingConfig
from clt.data import ActivationWriter, DatasetInfo
from clt.errors import CheckpointError, ConfigError, DatasetError, TrainingError
from clt.models import CrossLayerTranscoder
from clt.scripts import analyze_theta, convert
from clt.training.convert import Adaptation, Calibration, _bisect, estimate_thresholds
from clt.training.loading import load_model
from clt.training.trainer import CLTTrainer
from clt.worlds.features import FeaturesWorld
from tests.tiny_data import store_of, write_data

FAMILIES = {
    "topk": {"activation_fn": "topk", "topk_k": 4},
    "global topk": {"activation_fn": "topk", "topk_k": 12, "topk_mode": "global"},
    "batchtopk": {"activation_fn": "batchtopk", "batchtopk_k": 12},
    "batchtopk per layer": {"activation_fn": "batchtopk", "batchtopk_k": 4, "batchtopk_mode": "per_layer"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), tokens=4000)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folders = {}
    for family, options in FAMILIES.items():
        folder = tmp_path_factory.mktemp("runs")
        training = TrainingConfig(
            training_steps=100, train_batch_size_tokens=128, activation_path=str(data), learning_rate=1e-2
        )
        config = CLTConfig(num_features=24, num_layers=3, d_model=8, **options)
        CLTTrainer(config, training, folder, "cpu").train()
        folders[family] = folder
    return folders


def options_of(folder, tmp_path, **options):
    return convert.Options(
        **{"clt": str(folder), "output": str(tmp_path), "batch_size_tokens": 128, "device": "cpu", **options}
    )


@pytest.mark.parametrize("family", ["batchtopk", "batchtopk per layer"])
def test_the_running_threshold_is_the_same_function(data, trained, tmp_path, family):
    converted, drift = convert.convert(options_of(trained[family], tmp_path))
    assert drift is None
    original = CrossLayerTranscoder.from_pretrained(trained[family])
    inputs = next(store_of(data).one_pass()).inputs.float()
    torch.testing.assert_close(converted.encode(inputs), original.encode(inputs))
    torch.testing.assert_close(converted(inputs), original(inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_estimated_and_calibrated_thresholds_keep_l0_on_other_tokens(data, trained, tmp_path, family):
    options = options_of(trained[family], tmp_path, data=str(data), method="estimate", calibrate=True, force=True)
    _, drift = convert.convert(options)
    assert drift.l0 < 0.5
    assert drift.before.n_tokens == drift.after.n_tokens


@pytest.mark.parametrize("family", ["topk", "global topk"])
def test_one_cut_per_layer_keeps_l0_on_other_tokens(data, trained, tmp_path, family):
    converted, drift = convert.convert(options_of(trained[family], tmp_path, data=str(data), method="cut", force=True))
    assert drift.l0 < 0.5
    cut = torch.stack([converted.threshold(layer) * converted.decoder_norm(layer) for layer in range(3)])
    torch.testing.assert_close(cut, cut[:, :1].expand_as(cut), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Data of which a TopK keeps four features where two or eight are on, unlike any threshold."""
    world = FeaturesWorld(n_layers=2, d_model=32, n_features=64, density=4 / 32)
    folder = tmp_path_factory.mktemp("features")
    info = DatasetInfo(model_name="world:features", dataset="features", split="train", num_layers=2, d_model=32)
    with ActivationWriter(folder, info, shard_tokens=4000) as writer:
        writer.append(world.activations("train", 12_000).batch)
    return folder


@pytest.mark.parametrize("options", [{"topk_k": 4}, {"topk_k": 8, "topk_mode": "global"}], ids=["per layer", "global"])
def test_adapted_weights_keep_error_and_l0_on_other_tokens(features, tmp_path, options):
    training = TrainingConfig(
        training_steps=200, train_batch_size_tokens=256, activation_path=str(features), learning_rate=1e-2
    )
    config = CLTConfig(num_features=32, num_layers=2, d_model=32, activation_fn="topk", **options)
    CLTTrainer(config, training, tmp_path / "run", "cpu", shows_progress=False).train()
    asked = options_of(tmp_path / "run", tmp_path / "out", data=str(features), batch_size_tokens=256)
    _, cut = convert.convert(replace(asked, method="cut", force=True))
    converted, drift = convert.convert(replace(asked, adaptation=Adaptation(steps=60)))
    assert drift.nmse < min(0.0, cut.nmse - 0.02), "weights that know of the cut do better with it"
    assert drift.l0 < 0.5
    assert converted.config.activation_fn == "jumprelu"


def test_adaptation_sees_no_token_that_is_calibrated_or_reported_on(data, trained, tmp_path):
    parts = convert.Parts(options_of(trained["topk"], tmp_path, data=str(data)), load_model(trained["topk"]))
    names = [
        {(int(s), int(p)) for b in batches for s, p in zip(b.sample, b.position)}
        for batches in (parts.training(200), parts.calibration(), parts.report())
    ]
    assert len(names[0]) + len(names[1]) + len(names[2]) == 4000
    assert not names[0] & (names[1] | names[2])
    assert not names[1] & names[2]


def test_the_estimate_is_the_mean_of_the_smallest_kept_activations(data, trained):
    model = load_model(trained["batchtopk"])
    before = model.running_threshold.clone()
    store = store_of(data, tokens=100)
    batches = [next(store) for _ in range(3)]
    theta = estimate_thresholds(model, batches, default=1e6, scale=2.0)
    smallest = []
    for batch in batches:
        codes = model.forward_training(batch.inputs.float()).codes
        values = torch.stack([code.dense() for code in codes]).detach()
        smallest.append(values.masked_fill(values <= 0, float("nan")).nan_to_num(nan=torch.inf).amin(1))
    model.running_threshold.copy_(before)
    stacked = torch.stack(smallest)
    fired = stacked.isfinite()
    mean = stacked.where(fired, 0).sum(0) / fired.sum(0)
    torch.testing.assert_close(theta, (2 * mean).where(fired.any(0), 1e6))


def test_a_drift_above_the_tolerance_is_an_error_and_writes_nothing(data, trained, tmp_path):
    options = options_of(trained["batchtopk"], tmp_path / "out", data=str(data), method="estimate", scale_factor=20.0)
    with pytest.raises(TrainingError, match="drifts: L0 of a layer by"):
        convert.main(options)
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_transcoder_and_a_report(data, trained, tmp_path, capsys):
    convert.main(options_of(trained["batchtopk"], tmp_path, data=str(data)))
    report = json.loads((tmp_path / "conversion.json").read_text())
    assert report["method"] == "running"
    assert report["l0_drift"] == pytest.approx(0, abs=1e-6)
    assert CrossLayerTranscoder.from_pretrained(tmp_path).config.activation_fn == "jumprelu"
    analyze_theta.main(analyze_theta.Options(log_dir=str(tmp_path)))
    assert "median" in capsys.readouterr().out


def test_what_cannot_be_converted_is_refused(data, trained, tmp_path):
    with pytest.raises(ConfigError, match="Give --data"):
        convert.convert(options_of(trained["topk"], tmp_path))
    with pytest.raises(ConfigError, match="keeps no running threshold"):
        convert.convert(options_of(trained["topk"], tmp_path, data=str(data), method="running"))
    with pytest.raises(ConfigError, match="adapt is for topk"):
        convert.convert(options_of(trained["batchtopk"], tmp_path, data=str(data), method="adapt"))
    with pytest.raises(DatasetError, match="too few to estimate"):
        convert.convert(options_of(trained["topk"], tmp_path, data=str(data), batch_size_tokens=4000))
    convert.main(options_of(trained["batchtopk"], tmp_path / "jumprelu"))
    with pytest.raises(ConfigError, match="only topk and batchtopk"):
        convert.convert(options_of(tmp_path / "jumprelu", tmp_path))
    with pytest.raises(CheckpointError, match="holds neither"):
        convert.convert(options_of(data, tmp_path))
    with pytest.raises(ConfigError, match="has no thresholds"):
        analyze_theta.thresholds(trained["topk"])


def test_bisection_finds_a_scale_with_the_wanted_count():
    h = torch.arange(1, 101).float()[:, None]
    assert 5 <= _bisect(h, torch.ones(1), 0.95, Calibration(tolerance=0.01)) < 6
