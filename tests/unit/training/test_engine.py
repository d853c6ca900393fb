"""Micro-batches, precision, mean weights, 8-bit moments, and steps whose numbers are not finite."""

import importlib.util
import signal

import pytest
import torch

from clt.config import CLTConfig, TrainingConfig
from clt.errors import ConfigError, TrainingError
from clt.models import CrossLayerTranscoder
from clt.training.interrupts import TimeLimitReached
from clt.training.optim import build_optimizer
from clt.training.trainer import CLTTrainer
from clt.types import ActivationBatch
from tests.tiny_data import store_of, write_data

FAMILIES = {
    "relu": {"activation_fn": "relu"},
    "jumprelu": {"activation_fn": "jumprelu"},
    "topk": {"activation_fn": "topk", "topk_k": 4},
    "batchtopk": {"activation_fn": "batchtopk", "batchtopk_k": 12},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def trainer_of(data, folder, family="topk", trackers=(), **options):
    training = TrainingConfig(
        **{
            "training_steps": 12,
            "train_batch_size_tokens": 64,
            "activation_path": str(data),
            "activation_dtype": "float32",
            "log_interval": 1,
            "dead_feature_window": 100,
            **options,
        }
    )
    config = CLTConfig(num_features=24, num_layers=3, d_model=8, **FAMILIES[family])
    return CLTTrainer(config, training, folder, "cpu", held_out=store_of(data).one_pass, trackers=trackers)


MATRICES = {"W_enc", "W_dec", "W_skip", "U_dec", "V_dec"}


@pytest.mark.parametrize(
    "shape",
    [
        {"enable_feature_offset": True, "enable_feature_scale": True, "post_encoder": "pair", "skip_connection": True},
        {"decoder_rank": 2},
    ],
)
def test_weight_decay_reaches_matrices_and_nothing_else(shape):
    config = CLTConfig(num_features=24, num_layers=3, d_model=8, activation_fn="jumprelu", **shape)
    model = CrossLayerTranscoder(config)
    optimizer = build_optimizer(dict(model.named_parameters()), TrainingConfig(optimizer="adamw", weight_decay=0.1), 24)
    decay = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[parameter] == (0.1 if name.split(".")[0] in MATRICES else 0.0), name


@pytest.mark.parametrize("reduction", ["mean_tokens", "sum_tokens"])
@pytest.mark.parametrize("family", ["relu", "jumprelu", "topk"])
def test_micro_batches_give_the_full_batchs_losses_and_gradients(data, tmp_path, family, reduction):
    whole, parts = (
        trainer_of(data, tmp_path / name, family, sparsity_reduction=reduction, **options)
        for name, options in (("whole", {}), ("parts", {"micro_batch_tokens": 13}))
    )
    for trainer in (whole, parts):
        trainer.model.double()
        trainer.dead.silent_for += 101  # so that the auxiliary loss is on
    batch = next(whole.store)
    batch = batch.to("cpu", torch.float64)
    results = [trainer.update(batch) for trainer in (whole, parts)]
    for term in ("reconstruction", "sparsity", "preactivation", "auxiliary"):
        torch.testing.assert_close(*(getattr(result.losses, term) for result in results), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(results[0].gradient_norm, results[1].gradient_norm, rtol=1e-6, atol=0)
    assert torch.equal(results[0].fired, results[1].fired)
    assert torch.equal(whole.dead.silent_for, parts.dead.silent_for)
    for (name, one), other in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-12, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_fp32_weights_and_learns_like_fp32(data, tmp_path, family, precision):
    results = {}
    for name in ("fp32", precision):
        trainer = trainer_of(data, tmp_path / name, family, precision=name, training_steps=60, learning_rate=1e-2)
        trainer.train()
        assert {value.dtype for value in trainer.model.parameters()} == {torch.float32}
        results[name] = trainer.evaluate().nmse
    assert results[precision] == pytest.approx(results["fp32"], abs=0.05)


def test_fp16_overflow_halves_the_scale_and_leaves_the_weights(data, tmp_path):
    trainer = trainer_of(data, tmp_path, precision="fp16")
    trainer.engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = [value.clone() for value in trainer.model.parameters()]
    result = trainer.update(next(trainer.store))
    assert result.skipped
    assert trainer.engine.scaler.get_scale() == 2.0**59
    assert all(torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.engine.n_skipped == 0, "an overflow is no step with a NaN"


def test_mean_weights_follow_their_formula_and_become_the_result(data, tmp_path):
    trainer = trainer_of(data, tmp_path, ema_decay=0.75)
    expected = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    update = trainer.engine.step

    def follow(*arguments):
        result = update(*arguments)
        for name, value in trainer.model.named_parameters():
            expected[name] = 0.75 * expected[name] + 0.25 * value.detach()
        return result

    trainer.engine.step = follow
    trainer.train()
    saved = CrossLayerTranscoder.from_pretrained(tmp_path)
    for name, value in saved.named_parameters():
        torch.testing.assert_close(value, expected[name])


def poisoned(store, at):
    """The store's batches, one of which holds a NaN at layer 1."""
    real = type(store).__next__

    class Poisoned(type(store)):
        def __next__(self):
            place = (self._epoch, self._step)
            batch = real(self)
            if place != at:
                return batch
            inputs = batch.inputs.clone()
            inputs[1, 5, 2] = float("nan")
            return ActivationBatch(inputs, batch.targets, batch.kind, batch.sample, batch.position)

    store.__class__ = Poisoned
    return store


@pytest.mark.parametrize("family", FAMILIES)
def test_a_nan_in_the_data_is_named_with_step_term_and_layer(data, tmp_path, family):
    trainer = trainer_of(data, tmp_path, family)
    poisoned(trainer.store, (0, 4))
    with pytest.raises(
        TrainingError,
        match=r"Step 4: .*(reconstruction = nan|a gradient is not finite).*layer 1: the inputs of 1 of 64 tokens",
    ):
        trainer.train()


@pytest.mark.parametrize("family", FAMILIES)
def test_up_to_n_such_steps_are_left_out(data, tmp_path, family):
    trainer = trainer_of(data, tmp_path, family, skip_nonfinite_steps=1)
    poisoned(trainer.store, (0, 4))
    model = trainer.train()
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert trainer.folder.record()["summary"]["skipped_steps"] == 1

    again = trainer_of(data, tmp_path / "twice", family, skip_nonfinite_steps=1, training_steps=20)
    poisoned(again.store, (0, 4))
    poisoned(again.store, (1, 4))
    with pytest.raises(TrainingError, match="Step 14 after 1 skipped steps"):
        again.train()


def test_a_time_limit_writes_a_checkpoint_and_the_same_options_go_on(data, tmp_path):
    with pytest.raises(TimeLimitReached, match="Stopped at step 1 of 12"):
        trainer_of(data, tmp_path, time_limit_minutes=1e-9).train()
    again = trainer_of(data, tmp_path)
    assert again.step == 1
    again.train()


class RaiseSignal:
    def log(self, step, values):
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    def close(self):
        pass


def test_sigterm_writes_a_checkpoint_and_stops(data, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trainer_of(data, tmp_path, trackers=[RaiseSignal()]).train()
    assert trainer_of(data, tmp_path).step == 5


def test_compile_compiles_the_pass(data, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    trainer_of(data, tmp_path, torch_compile=True)
    assert compiled == ["_Pass"]


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
def test_eight_bit_moments_without_their_package_are_refused(data, tmp_path):
    with pytest.raises(ConfigError, match=r"pip install 'crosslayer\[torchao\]'"):
        trainer_of(data, tmp_path, optimizer="adamw8bit")
    assert not (tmp_path / "run.json").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile, which torchao uses
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs the torchao extra")
def test_eight_bit_moments_survive_a_checkpoint(data, tmp_path):
    whole = trainer_of(data, tmp_path / "whole", optimizer="adamw8bit", checkpoint_interval=5).train()
    broken = trainer_of(data, tmp_path / "run", optimizer="adamw8bit", checkpoint_interval=5, time_limit_minutes=1e-9)
    with pytest.raises(TimeLimitReached):
        broken.train()
    again = trainer_of(data, tmp_path / "run", optimizer="adamw8bit", checkpoint_interval=5).train()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize(
    ("option", "value"), [("ema_decay", 1.0), ("skip_nonfinite_steps", -1), ("micro_batch_tokens", 0)]
)
def test_impossible_options_are_refused_by_name(option, value):
    with pytest.raises(ConfigError, match=f"TrainingConfig.{option} = {value}"):
        TrainingConfig(**{option: value})
