"""A run is a function of its options: done twice, or interrupted and gone on with, it ends in the same weights."""

import json

import pytest
import torch

from clt.config import CLTConfig, TrainingConfig
from clt.errors import CheckpointError, ConfigError, TrainingError
from clt.models import CrossLayerTranscoder
from clt.training.trainer import CLTTrainer
from tests.interrupting import InterruptAt
from tests.tiny_data import store_of, write_data

FAMILIES = {
    "jumprelu": {"activation_fn": "jumprelu"},
    "topk": {"activation_fn": "topk", "topk_k": 4},
    "batchtopk": {"activation_fn": "batchtopk", "batchtopk_k": 12},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def trainer_of(data, folder, family="topk", steps=12, layers=3, **options):
    training = TrainingConfig(
        training_steps=steps,
        train_batch_size_tokens=64,
        activation_path=str(data),
        log_interval=1,
        checkpoint_interval=4,
        dead_feature_window=100,
        **options,
    )
    config = CLTConfig(num_features=24, num_layers=layers, d_model=8, **FAMILIES[family])
    return CLTTrainer(config, training, folder, "cpu", held_out=store_of(data).one_pass)


def assert_same_weights(one, other):
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_training_twice_gives_identical_weights(data, tmp_path, family):
    one = trainer_of(data, tmp_path / "one", family).train()
    other = trainer_of(data, tmp_path / "other", family).train()
    assert_same_weights(one, other)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stop_at", [3, 4, 9])
def test_a_run_that_died_and_went_on_equals_an_uninterrupted_one(data, tmp_path, family, stop_at):
    whole = trainer_of(data, tmp_path / "whole", family).train()

    broken = trainer_of(data, tmp_path / "broken", family)
    broken._extra_trackers = [InterruptAt(stop_at)]
    with pytest.raises(InterruptedError):
        broken.train()
    again = trainer_of(data, tmp_path / "broken", family)
    assert again.step == max(0, (stop_at - 1) // 4 * 4)
    assert_same_weights(whole, again.train())

    lines = [json.loads(line) for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))


def test_a_finished_run_is_loaded_and_not_trained_again(data, tmp_path):
    first = trainer_of(data, tmp_path).train()
    again = trainer_of(data, tmp_path)
    assert again.folder.is_finished
    assert_same_weights(first, again.train())
    assert_same_weights(first, CrossLayerTranscoder.from_pretrained(tmp_path))


def test_other_options_in_the_same_folder_are_refused_by_name(data, tmp_path):
    trainer_of(data, tmp_path).train()
    with pytest.raises(ConfigError, match=r"training\.sparsity_c: 4\.0 there, 2\.0 asked for now"):
        trainer_of(data, tmp_path, sparsity_c=2.0)


def test_other_data_in_the_same_folder_are_refused(data, tmp_path):
    trainer_of(data, tmp_path / "run").train()
    other = write_data(tmp_path / "other", seed=5)
    trainer = trainer_of(data, tmp_path / "run")
    with pytest.raises(ConfigError, match="fingerprint"):
        CLTTrainer(trainer.clt_config, trainer.config, tmp_path / "run", "cpu", store=store_of(other))


def test_data_of_another_host_are_refused_with_both_numbers(data, tmp_path):
    with pytest.raises(ConfigError, match=r"num_layers = 5, but the activations have num_layers = 3"):
        trainer_of(data, tmp_path, layers=5)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_term(data, tmp_path):
    trainer = trainer_of(data, tmp_path)
    with torch.no_grad():
        trainer.model.b_dec[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"Step 0.*reconstruction = nan.*layer 0: weight b_dec"):
        trainer.train()


def test_half_a_checkpoint_is_refused_by_name(data, tmp_path):
    trainer = trainer_of(data, tmp_path)
    trainer._extra_trackers = [InterruptAt(6)]
    with pytest.raises(InterruptedError):
        trainer.train()
    weights = tmp_path / "checkpoints" / "step_00000004" / "clt.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"(?s)step_00000004.*cut off"):
        trainer_of(data, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_learns_and_held_out_error_agrees_with_its_definition(data, tmp_path, family):
    trainer = trainer_of(data, tmp_path, family, steps=150, learning_rate=1e-2)
    before = trainer.evaluate().nmse
    model = trainer.train()
    result = trainer.evaluate()
    assert result.nmse < 0.5 * before

    batch = next(store_of(data, tokens=600).one_pass())
    targets, error = batch.targets.float(), batch.targets.float() - model(batch.inputs.float())
    expected = error.square().sum((1, 2)) / (targets - targets.mean(1, keepdim=True)).square().sum((1, 2))
    torch.testing.assert_close(torch.tensor(result.nmse_per_layer), expected.detach(), rtol=1e-4, atol=1e-6)
    active = (model.encode(batch.inputs.float()) > 0).float().sum(2).mean(1)
    torch.testing.assert_close(torch.tensor(result.l0_per_layer), active)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("family", ["topk", "batchtopk"])
def test_the_norms_that_inference_knows_are_those_of_the_present_weights(data, tmp_path, family, streams):
    options = {"optimizer_in_backward": True, "gradient_clip_val": None} if streams else {}
    trainer = trainer_of(data, tmp_path, family, steps=40, learning_rate=3e-2, eval_interval=5, **options)
    assert trainer.model.config.ranking == "norm"
    trainer.evaluate()  # norms are known from here on
    model = trainer.train()
    fresh = CrossLayerTranscoder.from_pretrained(tmp_path)
    x = next(store_of(data, tokens=600).one_pass()).inputs.float()
    assert torch.equal(model.encode(x), fresh.encode(x))
    for layer in range(3):
        assert torch.equal(model.threshold(layer), fresh.threshold(layer))
        norm = model.decoder_norm(layer)
        assert not torch.allclose(norm, torch.ones_like(norm) * norm[0], rtol=0.05), "they did change"


def test_evaluation_does_not_depend_on_the_batch_size(data, tmp_path):
    from clt.training.evaluator import evaluate

    model = trainer_of(data, tmp_path).train()
    small, large = (evaluate(model, store_of(data, tokens).one_pass()) for tokens in (7, 600))
    assert small.l0_per_layer == pytest.approx(large.l0_per_layer)
    assert small.nmse_per_layer == pytest.approx(large.nmse_per_layer, rel=1e-5)
    assert small.dead_per_layer == large.dead_per_layer
    assert small.tokens_per_kind == {"text": 300, "image": 300, "special": 0}


def test_dead_features_are_counted_in_tokens_and_revived(data, tmp_path):
    trainer = trainer_of(data, tmp_path, steps=300, aux_loss_factor=1.0, learning_rate=1e-2)
    with torch.no_grad():
        for bias in trainer.model.b_enc:
            bias[:12] = -100.0  # the first half can never fire again without help
    for _ in range(2):
        trainer.update(next(trainer.store))
    assert trainer.dead.dead[:, :12].all()
    assert int(trainer.dead.silent_for[0, 0]) == 128
