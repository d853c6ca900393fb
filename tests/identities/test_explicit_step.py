"""The hand-written step is autograd's: losses, what fired, and the gradient of every parameter."""

import dataclasses
import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clt.config import CLTConfig, TrainingConfig
from clt.config.training_config import BOOKKEEPING
from clt.errors import ConfigError, TrainingError
from clt.models import CrossLayerTranscoder
from clt.models.kernels import build
from clt.training.routes import RouteChooser
from clt.training.step import Engine
from clt.types import ActivationBatch
from tests.explicit_steps import KINDS, OPTIONS, assert_same_step, batch_of, engine_of, model_of, one_step, routes_of

windows = st.sampled_from([(0, None), (1, None), (0, 1), (1, 2), (2, None)])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=3)
@given(window=windows, seed=st.integers(0, 99), shape=st.sampled_from([(9, 5), (12, 1), (40, 3)]))
def test_every_gradient_is_autograds(kind, options, window, seed, shape):
    shape = {"features": shape[0], "width": shape[1]}
    plain = one_step("plain", kind, window, options, seed, **shape)
    for route in routes_of(kind, options):
        assert_same_step(plain, one_step(route, kind, window, options, seed, **shape), rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton extra")
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are for the GPU then: tests/gpu")
@pytest.mark.parametrize("kind", KINDS)
def test_triton_kernels_give_autograds_gradients(monkeypatch, kind):
    """On a CPU, by Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for window, options in (((0, None), "strong"), ((1, 2), "small parts")):
        monkeypatch.setenv("CLT_KERNELS", "torch")
        plain = one_step("plain", kind, window, options, 3)
        monkeypatch.setenv("CLT_KERNELS", "triton")
        assert_same_step(plain, one_step("sparse", kind, window, options, 3), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("kind", ["jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("route", ["dense", "sparse"])
def test_compiled_kernels_in_fp32_and_their_torch_form_agree_with_autograd(monkeypatch, kernels, kind, route):
    monkeypatch.setenv("CLT_KERNELS", kernels)
    build.library.cache_clear()
    try:
        if kernels == "auto" and build.library() is None:
            pytest.skip("no C compiler on this machine")
        shape = {"features": 300, "width": 70, "dtype": torch.float32}  # more than a block, and a rest, of both
        plain = one_step("plain", kind, (0, None), "strong", 3, **shape)
        assert_same_step(plain, one_step(route, kind, (0, None), "strong", 3, **shape), rtol=2e-4, atol=2e-5)
    finally:
        build.library.cache_clear()


def test_a_loss_over_many_tokens_keeps_its_digits_in_fp32():
    losses = []
    for dtype in (torch.float32, torch.float64):
        model = model_of("relu", width=50, dtype=dtype)
        batch = batch_of(model, tokens=8000)
        losses.append(engine_of(model, "dense").step(batch, 0, torch.zeros(3, 9, dtype=torch.bool)).losses)
    torch.testing.assert_close(losses[0].reconstruction.double(), losses[1].reconstruction, rtol=1e-6, atol=0)


@pytest.mark.parametrize("route", ["dense", "sparse"])
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_the_number_of_threads_changes_no_sum_of_the_kernels(kind, route):
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(one_step(route, kind, (0, None), "strong", 3, dtype=torch.float32, features=300))
    for name, grad in results[0][3].items():
        torch.testing.assert_close(grad, results[1][3][name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("route", ["dense", "sparse"])
def test_an_optimiser_inside_the_backward_pass_takes_the_same_steps(kind, route):
    weights = []
    for streams in (False, True):
        model = model_of(kind)
        engine = engine_of(model, route, optimizer_in_backward=streams, learning_rate=1e-2)
        for step in range(3):
            engine.step(batch_of(model, seed=step), step, torch.zeros(3, 9, dtype=torch.bool))
        assert all(p.grad is None for p in model.parameters()) is streams
        weights.append(dict(model.named_parameters()))
    torch.testing.assert_close(*weights)


def test_an_optimiser_inside_the_backward_pass_reports_the_norm_of_the_whole_gradient():
    norms = []
    for streams in (False, True):
        model = model_of("jumprelu")
        engine = engine_of(model, "dense", optimizer_in_backward=streams)
        norms.append(engine.step(batch_of(model), 0, torch.zeros(3, 9, dtype=torch.bool)).gradient_norm)
    torch.testing.assert_close(*norms)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "gradient_clip_val = 1.0"),
        ({"gradient_clip_val": None, "skip_nonfinite_steps": 2}, "skip_nonfinite_steps = 2"),
        ({"gradient_clip_val": None, "micro_batch_tokens": 4}, "micro_batch_tokens = 4"),
        ({"gradient_clip_val": None, "route": "plain"}, "route = plain"),
        ({"gradient_clip_val": None, "torch_compile": True}, "torch_compile = True"),
    ],
)
def test_what_cannot_stream_its_gradients_is_refused_by_name(options, named):
    with pytest.raises(ConfigError, match=named):
        Engine(model_of("relu"), TrainingConfig(optimizer_in_backward=True, **options))


def test_a_route_that_does_not_know_an_option_is_refused_and_auto_lets_autograd_do_it():
    config = CLTConfig(num_features=9, num_layers=3, d_model=5, decoder_tying="per_source")
    model = CrossLayerTranscoder(config)
    assert Engine(model, TrainingConfig()).routes is None
    with pytest.raises(ConfigError, match="decoder_tying = 'per_source'"):
        Engine(model, TrainingConfig(route="sparse"))


def test_every_option_is_known_to_the_hand_written_step_or_named_by_it():
    """A new field fails here until someone has decided what the hand-written step does about it."""
    computes = {
        *("num_features", "num_layers", "d_model", "first_target", "n_targets", "activation_fn", "ranking"),
        *("jumprelu_threshold", "jumprelu_bandwidth", "jumprelu_gradient", "jumprelu_reach", "normalization_method"),
        *("topk_k", "input_norm", "topk_mode", "batchtopk_k", "batchtopk_mode"),
        *("loss_normalisation", "sparsity_lambda", "sparsity_lambda_schedule", "sparsity_lambda_delay_frac"),
        *(
            "sparsity_c",
            "sparsity_reduction",
            "sparsity_target_l0",
            "apply_sparsity_penalty_to_batchtopk",
            "preactivation_coef",
        ),
        *("preactivation_form", "aux_loss_factor", "aux_k", "k_anneal_steps", "k_anneal_start", "micro_batch_tokens"),
        *("precision", "route", "recompute_encoder", "optimizer_in_backward", "torch_compile"),
    }
    hands_over = {
        *("decoder_tying", "decoder_rank", "enable_feature_offset", "enable_feature_scale", "post_encoder"),
        *("skip_connection", "sparsity_span_penalty", "clt_dtype", "debug_anomaly"),
    }
    outside = {
        *("model_name", "expected_input_dtype", "mlp_input_template", "mlp_output_template"),
        *("training_steps", "train_batch_size_tokens", "learning_rate", "lr_scheduler", "lr_warmup_steps"),
        *(
            "optimizer",
            "optimizer_state",
            "optimizer_beta1",
            "optimizer_beta2",
            "weight_decay",
            "gradient_clip_val",
            "ema_decay",
            "seed",
        ),
        *("sampling_strategy", "activation_dtype", "dead_feature_window", "sparsity_target_tokens"),
    }
    fields = {f.name for config in (CLTConfig, TrainingConfig) for f in dataclasses.fields(config)}
    assert fields - BOOKKEEPING == (computes | hands_over | outside) - BOOKKEEPING


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("route", ["dense", "sparse"])
def test_a_nan_anywhere_is_noticed(kind, route):
    for side in ("inputs", "targets"):
        model = model_of(kind, dtype=torch.float32)
        batch = batch_of(model)
        getattr(batch, side)[1, 3, 2] = float("nan")
        with pytest.raises(TrainingError, match=f"layer 1: the {side} of 1 of 8 tokens"):
            engine_of(model, route).step(batch, 0, torch.zeros(3, 9, dtype=torch.bool))


def chooser(**options):
    config = CLTConfig(num_features=1000, num_layers=2, d_model=4, **options)
    return RouteChooser(config, TrainingConfig(), torch.device("cpu"))


def test_jumprelu_goes_from_products_to_gathers_as_it_becomes_sparse_and_back_only_after_a_margin():
    routes = chooser(activation_fn="jumprelu")
    seen = []
    low = routes._low
    for active, touched in (
        (0.45, 1),
        (low / 2, 1),
        (1.2 * low, 1),
        (low / 2, low / 2),
        (0.01, 1.2 * low),
        (0.01, 0.9),
    ):
        routes.observe(active, touched)
        seen.append(routes.route)
    assert seen == ["dense", "mixed", "mixed", "sparse", "sparse", "mixed"]
    routes.observe(2 * low, 1)
    assert routes.route == "dense"


def test_topk_starts_with_gathers_unless_it_keeps_much():
    assert chooser(activation_fn="topk", topk_k=4).route == "sparse"
    assert chooser(activation_fn="topk", topk_k=400).route == "dense"


def learns(route, kind, precision, steps, tokens, features, width, layers, dtype=torch.float32):
    """The losses of a run on made-up sparse data."""
    options = {"num_features": features, "num_layers": layers, "d_model": width}
    model = CrossLayerTranscoder(CLTConfig(**options, **KINDS[kind]), seed=1).to(dtype)
    rng = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * width, 2, layers, width, generator=rng)
    engine = engine_of(model, route, training_steps=steps, learning_rate=2e-3, precision=precision)
    losses, dead = [], torch.zeros(layers, features, dtype=torch.bool)
    for step in range(steps):
        on = (torch.rand(tokens, 4 * width, generator=rng) < 0.03) * torch.rand(tokens, 4 * width, generator=rng)
        x, y = torch.einsum("ns,sild->ilnd", on, directions)
        rows = torch.arange(tokens)
        batch = ActivationBatch(x, y, torch.zeros(tokens, dtype=torch.uint8), rows, rows)
        losses.append(float(engine.step(batch, step, dead).losses.total))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_in_float64_fifty_steps_are_the_plain_ones(kind):
    """So where fp32 curves part, it is by rounding."""
    sizes = {"steps": 50, "tokens": 64, "features": 48, "width": 16, "layers": 3, "dtype": torch.float64}
    plain = learns("plain", kind, "fp32", **sizes)
    for route in routes_of(kind, "defaults"):
        torch.testing.assert_close(learns(route, kind, "fp32", **sizes), plain, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "batchtopk"])
def test_the_loss_curve_is_the_plain_one(kind):
    sizes = {"steps": 60, "tokens": 64, "features": 48, "width": 16, "layers": 3}
    plain = learns("plain", kind, "fp32", **sizes)
    for route in routes_of(kind, "defaults"):
        torch.testing.assert_close(learns(route, kind, "fp32", **sizes), plain, rtol=1e-4, atol=0)
        half = learns(route, kind, "bf16", **sizes)
        torch.testing.assert_close(half, plain, rtol=2e-2, atol=0)
    assert plain[-1] < 0.9 * plain[0]
