"""How much memory a step takes at its peak, from the options alone (docs/performance.md explains each term)."""

from __future__ import annotations

from clt.config import CLTConfig, TrainingConfig

# Of a kept entry: h, activation and threshold (4 bytes each), feature (8), on or off (1).
_ENTRY_BYTES = 21
# Of an entry of the layer that is just computed: token and place by feature (8 each), gradients (4 each).
_ENTRY_WORK_BYTES = 40


def n_parameters(config: CLTConfig) -> int:
    """Of an untied transcoder without low rank or skip connection."""
    layers, features, width = config.num_layers, config.num_features, config.d_model
    pairs = sum(len(config.targets_of(source)) for source in range(layers))
    biases = layers * (features * (2 if config.activation_fn == "jumprelu" else 1) + width)
    return (layers + pairs) * features * width + biases


def predicted_bytes(config: CLTConfig, training: TrainingConfig, tokens: int, route: str) -> int:
    """Peak memory of the hand-written step, without what Python and torch take for themselves.

    Args:
        config: an untied transcoder.
        training: options of the run.
        tokens: per micro-batch.
        route: dense, mixed or sparse.
    """
    layers, features, width = config.num_layers, config.num_features, config.d_model
    half = training.precision == "bf16"
    size = 2 if half else 4
    largest = features * width * max(len(config.targets_of(source)) for source in range(layers))
    gradients = 4 * (largest + features * width if training.optimizer_in_backward else n_parameters(config))
    average = 0 if training.ema_decay is None else 4
    total = (12 + average) * n_parameters(config) + gradients
    total += tokens * layers * width * (4 + 2 * 2)  # the error, and a batch in bf16
    matrix = tokens * features * size
    if route == "sparse":
        total += matrix + tokens * _kept_per_token(config) * (layers * _ENTRY_BYTES + _ENTRY_WORK_BYTES)
    else:
        total += matrix * (1 if training.recompute_encoder else layers)
        total += 3 * matrix + tokens * largest // features * size
        total += largest * 2 * size if half else 0  # the cast decoder, and its gradient before it is widened
    return total


def _kept_per_token(config: CLTConfig) -> int:
    """And layer, on average; for relu and jumprelu a guess at what makes them go sparse."""
    if config.activation_fn == "topk":
        return config.topk_count // (config.num_layers if config.topk_mode == "global" else 1)
    if config.activation_fn == "batchtopk":
        k = config.batchtopk_k or 0
        return round(k / (config.num_layers if config.batchtopk_mode == "global" else 1))
    return config.num_features // 20
