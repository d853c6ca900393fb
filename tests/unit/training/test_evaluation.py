"""Every metric of docs/metrics.md against its definition, computed from all tokens at once."""

import json

import pytest
import torch

from clt.config import CLTConfig, InferenceConfig
from clt.errors import ConfigError, DatasetError
from clt.models import ActivationStatistics, CrossLayerTranscoder
from clt.scripts import evaluate as command
from clt.training.evaluator import CLTEvaluator, evaluate
from clt.types import TokenKind
from tests.tiny_data import sparse_batch, store_of, write_data

WINDOWS = [{}, {"first_target": 1}, {"n_targets": 2}, {"n_targets": 1}]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def transcoder(**window):
    config = CLTConfig(num_features=24, num_layers=3, d_model=8, activation_fn="relu", **window)
    model = CrossLayerTranscoder(config, seed=1)
    batch = sparse_batch()
    parts = [getattr(values, name)(1) for values in (batch.inputs, batch.targets) for name in ("mean", "std")]
    model.fit_standardisation(ActivationStatistics(*parts))
    return model.double()


def everything(data):
    batch = next(store_of(data, tokens=600).one_pass())
    return batch.to("cpu", torch.float64)


def ratio(error, targets):
    return error.square().sum((1, 2)) / (targets - targets.mean(1, keepdim=True)).square().sum((1, 2))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_error_within_a_distance_is_that_of_a_decode_with_near_sources_only(data, window):
    model, batch = transcoder(**window), everything(data)
    result = evaluate(model, [batch], by_distance=True)
    features = model.encode(batch.inputs)
    first, span = model.config.first_target, model.config.span
    assert list(result.nmse_within_distance) == ["none", *(str(first + d) for d in range(span))]
    for used, name in enumerate(result.nmse_within_distance):
        prediction = torch.stack([model.bias(t).expand_as(batch.targets[t]) for t in range(3)])
        for source in range(3):
            for place, target in enumerate(list(model.config.targets_of(source))[:used]):
                prediction[target] += model.contributions(source, features[source])[place]
        expected = ratio(batch.targets - prediction, batch.targets)
        torch.testing.assert_close(torch.tensor(result.nmse_within_distance[name]), expected.float(), rtol=1e-5, atol=0)
    assert list(result.nmse_within_distance.values())[-1] == pytest.approx(result.nmse_per_layer)


def test_each_token_kind_has_its_own_error(data):
    model, batch = transcoder(), everything(data)
    result = evaluate(model, [batch.select(torch.arange(start, start + 100)) for start in range(0, 600, 100)])
    for kind in (TokenKind.TEXT, TokenKind.IMAGE):
        part = batch.select(batch.kind == kind)
        expected = ratio(part.targets - model(part.inputs), part.targets)
        assert result.nmse_per_kind[kind.name.lower()] == pytest.approx(expected.tolist(), rel=1e-5)
    assert result.tokens_per_kind == {"text": 300, "image": 300, "special": 0}


def test_the_seeds_metrics_have_their_own_names(data):
    model, batch = transcoder(), everything(data)
    result = evaluate(model, [batch])
    error = batch.targets - model(batch.inputs)
    per_dimension = error.square().mean(1) / batch.targets.var(1, correction=0)
    assert result.seed_nmse_per_layer == pytest.approx(per_dimension.mean(1).tolist(), rel=1e-5)
    explained = 1 - error.var(1, correction=0).mean(1) / batch.targets.var(1, correction=0).mean(1)
    assert result.seed_explained_variance_per_layer == pytest.approx(explained.tolist(), rel=1e-5)


def test_the_histogram_counts_every_feature_once(data):
    values = evaluate(transcoder(), [everything(data)]).to_dict()["density_histogram"]
    for counts, silent in zip(values["features"], values["silent"], strict=True):
        assert sum(counts) + silent == 24


def test_nothing_to_evaluate_on_is_an_error():
    with pytest.raises(DatasetError, match="no held-out token"):
        CLTEvaluator(transcoder()).result()


def test_the_command_writes_json_and_figures(data, tmp_path, capsys):
    transcoder().float().save_pretrained(tmp_path / "clt")
    options = command.Options(clt_checkpoint_path=str(tmp_path / "clt"), data_path=str(data), device="cpu")
    command.main(options)
    written = json.loads((tmp_path / "clt" / "evaluation.json").read_text())
    assert written["n_tokens"] == 600
    assert set(written["nmse_within_distance"]) == {"none", "0", "1", "2"}
    figures = {path.name for path in (tmp_path / "clt" / "evaluation").iterdir()}
    assert figures == {"explained_variance.png", "l0.png", "density.png", "error_by_distance.png"}
    assert "NMSE when only sources up to a distance are used" in capsys.readouterr().out


def test_inference_config_reads_the_seeds_file(tmp_path):
    seed = {
        "clt_checkpoint_path": "a", "data_path": "b", "eval_batch_size_tokens": 4096, "max_eval_batches": None,
        "device": None, "output_log_dir": "clt_inference_results", "data_source_type": "local_manifest",
        "generation_config_path": None, "activation_dtype": "float16", "normalization_method": "loaded_mean_std",
        "enable_wandb": False, "wandb_project": "clt_evaluation", "wandb_tags": [], "model_world_size_for_load": 1,
    }  # fmt: skip
    (tmp_path / "i.json").write_text(json.dumps(seed))
    assert InferenceConfig.from_json(tmp_path / "i.json").output_log_dir == "clt_inference_results"
    (tmp_path / "i.json").write_text(json.dumps({**seed, "data_source_type": "remote_server"}))
    with pytest.raises(ConfigError, match="only 'local_manifest'"):
        InferenceConfig.from_json(tmp_path / "i.json")
