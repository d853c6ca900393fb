"""One training step of a small model by each route, as the tests compare them."""

import dataclasses

import torch

from clt.config import CLTConfig, TrainingConfig
from clt.models import CrossLayerTranscoder
from clt.training.step import Engine
from clt.types import ActivationBatch

KINDS = {
    "relu": {"activation_fn": "relu"},
    "jumprelu": {"activation_fn": "jumprelu"},
    "jumprelu narrow": {"activation_fn": "jumprelu", "jumprelu_bandwidth": 0.3, "jumprelu_threshold": 0.4},
    "jumprelu h all": {"activation_fn": "jumprelu", "jumprelu_gradient": "h", "jumprelu_reach": "all"},
    "topk": {"activation_fn": "topk", "topk_k": 3},
    "topk all": {"activation_fn": "topk", "topk_k": 9, "ranking": "value"},
    "topk global": {"activation_fn": "topk", "topk_k": 5, "topk_mode": "global"},
    "batchtopk": {"activation_fn": "batchtopk", "batchtopk_k": 6},
    "batchtopk per layer": {"activation_fn": "batchtopk", "batchtopk_k": 2, "batchtopk_mode": "per_layer"},
    "batchtopk few": {"activation_fn": "batchtopk", "batchtopk_k": 0.2, "ranking": "value"},
    "batchtopk all": {"activation_fn": "batchtopk", "batchtopk_k": 27},
}
OPTIONS = {
    "defaults": {},
    "seeds": {
        "loss_normalisation": "none",
        "sparsity_reduction": "sum_tokens",
        "preactivation_form": "negative",
        "preactivation_coef": 0.1,
        "sparsity_c": 1.0,
    },
    "strong": {"preactivation_coef": 0.2, "sparsity_lambda": 0.3, "apply_sparsity_penalty_to_batchtopk": True},
    "small parts": {"micro_batch_tokens": 3, "sparsity_lambda": 0.3},
    "recomputed": {"recompute_encoder": True, "aux_loss_factor": None},
}


def model_of(kind, window=(0, None), features=9, width=5, seed=0, dtype=torch.float64):
    config = CLTConfig(
        num_features=features, num_layers=3, d_model=width, first_target=window[0], n_targets=window[1], **KINDS[kind]
    )
    model = CrossLayerTranscoder(config, seed=seed).to(dtype)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for bias in model.b_enc:
            bias.copy_(torch.randn(features, generator=rng) * 0.5)
            bias[:2] = -50.0  # features that never fire, the second with no decoder either
        for weight in model.W_dec:
            weight[1] = 0.0
        model.b_dec.copy_(torch.randn(model.b_dec.shape, generator=rng))
        model.target_scale.copy_(torch.rand(model.target_scale.shape, generator=rng) + 0.5)
        model.target_variance.fill_(2.0)
    return model


def batch_of(model, tokens=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shape = model.config.num_layers, tokens, model.config.d_model
    inputs = 2 * torch.randn(shape, generator=rng, dtype=torch.float64).to(model.b_dec.dtype)
    inputs[:, 0] = -inputs[:, 0]
    inputs[:, tokens // 2] = 0.0  # a token on which little or nothing fires
    rows = torch.arange(tokens)
    kind = torch.zeros(tokens, dtype=torch.uint8)
    return ActivationBatch(inputs, torch.randn(shape, generator=rng).to(inputs.dtype), kind, rows, rows)


def engine_of(model, route, mesh=None, **options):
    """An engine that keeps to a route; mixed is one that only `auto` takes."""
    config = TrainingConfig(
        **{"training_steps": 10, "gradient_clip_val": None, **options, "route": "auto" if route == "mixed" else route}
    )
    engine = Engine(model, config, mesh)
    if route == "mixed":
        engine.routes.route = "mixed"
        engine.routes.observe = lambda active, touched: None
    return engine


def one_step(route, kind, window, options, seed, dtype=torch.float64, device="cpu", **shape):
    """Losses, firing counts, running threshold and gradients of one step."""
    model = model_of(kind, window, seed=seed, dtype=dtype, **shape).to(device)
    dead = torch.zeros(3, model.config.num_features, dtype=torch.bool, device=device)
    dead[:, :2] = True
    result = engine_of(model, route, **OPTIONS[options]).step(batch_of(model, seed=seed), 4, dead)
    grads = {n: (p.grad if p.grad is not None else torch.zeros_like(p)).cpu() for n, p in model.named_parameters()}
    losses = {name: value.cpu() for name, value in dataclasses.asdict(result.losses).items()}
    return losses, result.fired.cpu(), model.running_threshold.cpu(), grads


def routes_of(kind, options):
    """The hand-written ways a case can go; the seeds' pull on all of topk's silent features is autograd's alone."""
    if "relu" in kind:
        return ["dense", "mixed", "sparse"]
    return [] if options == "seeds" else ["dense", "sparse"]


def assert_same_step(one, other, **tolerances):
    torch.testing.assert_close(one[0], other[0], **tolerances)
    assert torch.equal(one[1], other[1])
    torch.testing.assert_close(one[2], other[2])
    for name, grad in one[3].items():
        torch.testing.assert_close(grad, other[3][name], **tolerances, msg=lambda text, name=name: f"{name}: {text}")
