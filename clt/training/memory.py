"""How much memory a step takes at its peak, from the options alone (docs/performance.md explains each term)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from clt.config import CLTConfig, TrainingConfig
from clt.training.route_options import chooses_k, kept_per_token

# Of a kept entry: h, activation and threshold (4 bytes each), feature (8), on or off (1).
_ENTRY_BYTES = 21
# Of an entry of the layer that is just computed: token and place by feature (8 each), gradients (4 each).
_ENTRY_WORK_BYTES = 40
# Of relu and jumprelu: what share of the features is on where gathers begin to pay; a guess, for want of a k.
_KEPT_SHARE = 1 / 20
# Encoder biases are set from so many tokens; of a pre-activation there: itself and sorted (4 each), and its place (8).
SETUP_TOKENS, _SETUP_BYTES = 8192, 16
# Of an evaluated activation: itself, whether it is on, and that as a number to be counted.
_ENCODED_BYTES = 4 + 1 + 8
# Of an evaluated output: target, prediction, error and a square in fp64, prediction in fp32, batch in bf16.
_EVALUATION_BYTES = 4 * 8 + 4 + 4
# Of the tensors [token, feature] of all layers that autograd keeps: jumprelu h, activation, price and pull.
_SAVED = {"relu": 3, "jumprelu": 4, "topk": 2, "batchtopk": 3}
EVALUATION_TOKENS = 512
"""Tokens that are evaluated at a time."""
BLOCK_PLACES = 3
"""Blocks of an optimiser in the host's memory that are on the device at a time."""
# Of a weight's moments in 8 bits, blocks of 256 with one fp32 scale each.
_EIGHT_BIT_STATES = 2 * (1 + 4 / 256)


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the peak of a step, by what they are for."""

    parameters: int
    """Weights, and their running mean if there is one."""
    gradients: int
    states: int
    """The optimiser's moments."""
    activations: int
    """What a step computes and keeps: pre-activations, codes, and the temporaries of the largest source."""
    batch: int
    """The batch and the error."""
    host: int = 0
    """`HostMemory`, where the host's memory is the device's too."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class HostMemory:
    """Bytes of the host's memory that one rank takes for what is not on its device."""

    states: int
    """Moments and master weights of `offload_optimizer`."""
    snapshot: int
    """The copy that `async_save` writes from, kept from the first checkpoint on."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.states + self.snapshot


def block_numbers(is_gpu: bool) -> int:
    """Numbers of a parameter that are updated at a time where that is done in blocks.

    On a CPU what is widened to fp32 stays in its cache; on a GPU copies from the host are worth their start.
    """
    return 1 << (24 if is_gpu else 18)


def n_parameters(config: CLTConfig, shards: int = 1) -> int:
    """Weights of a transcoder, or of one of `shards` equal parts of its features."""
    layers, width = config.num_layers, config.d_model
    features = math.ceil(config.num_features / shards)
    windows = [len(config.targets_of(source)) for source in range(layers)]
    is_full = config.decoder_tying == "none" and config.decoder_rank is None
    total = (layers + (sum(windows) if is_full else layers)) * features * width
    if config.decoder_rank is not None:
        total += sum(max(n - 1, 0) for n in windows) * config.decoder_rank * (features + width)
    per_target = layers if config.post_encoder == "target" else sum(windows)
    total += per_target * features * (config.enable_feature_offset + config.enable_feature_scale)
    total += sum(len(config.skip_targets_of(source)) for source in range(layers)) * width**2
    return total + layers * (features * (2 if config.activation_fn == "jumprelu" else 1) + width)


def weight_bytes(config: CLTConfig) -> int:
    """Of one weight."""
    return 4 if config.clt_dtype in (None, "float32") else 2


def state_bytes(config: CLTConfig, training: TrainingConfig) -> float:
    """Of one weight's two moments, and of its master if it has one (`offload_optimizer`, half precision).

    Moments are in the weight's own type (or its master's) unless they are quantised or rounded to bf16.
    """
    if training.optimizer == "adamw8bit":
        return _EIGHT_BIT_STATES
    weight = weight_bytes(config)
    master = 4 if training.offload_optimizer and weight < 4 else 0
    return (4 if training.optimizer_state == "bf16" else 2 * (master or weight)) + master


def host_memory(config: CLTConfig, training: TrainingConfig, shards: int = 1) -> HostMemory:
    """What a rank takes of its host's memory beside its device's.

    Args:
        config: the whole transcoder.
        training: options of the run.
        shards: as in `step_memory`.
    """
    count, weight, states = n_parameters(config, shards), weight_bytes(config), state_bytes(config, training)
    saved = weight + (0 if training.ema_decay is None else 4) + states
    return HostMemory(
        states=round(count * states) if training.offload_optimizer else 0,
        snapshot=round(count * saved) if training.async_save else 0,
    )


def _states_here(config: CLTConfig, training: TrainingConfig, count: int, is_gpu: bool) -> float:
    """Of an optimiser's state, what is on the device."""
    if training.offload_optimizer:
        count = min(count, BLOCK_PLACES * block_numbers(is_gpu))
    return count * state_bytes(config, training)


def step_memory(
    config: CLTConfig, training: TrainingConfig, tokens: int, route: str, shards: int = 1, is_gpu: bool = False
) -> StepMemory:
    """Peak memory of a step on one device, without what Python and torch take for themselves.

    Args:
        config: the whole transcoder.
        training: options of the run.
        tokens: per micro-batch and device.
        route: dense, mixed, sparse or plain.
        shards: the device holds one of so many equal parts of the features.
        is_gpu: the device has a memory of its own; a CPU's is the host's.
    """
    layers, width = config.num_layers, config.d_model
    features = math.ceil(config.num_features / shards)
    count, weight = n_parameters(config, shards), weight_bytes(config)
    largest = features * width * max(len(config.targets_of(source)) for source in range(layers))
    streams = training.optimizer_in_backward
    if route == "plain":
        activations = _autograd(config, training, tokens, features, shards)
    else:
        activations = _by_hand(config, training, tokens, features, tokens * kept_here(config) / shards, route)
    return StepMemory(
        parameters=count * (weight + (0 if training.ema_decay is None else 4)),
        gradients=weight * (largest + features * width if streams else count),
        states=round(_states_here(config, training, count, is_gpu)),
        activations=round(activations),
        batch=tokens * layers * width * (4 + 2 * 2),  # the error, and a batch in bf16
        host=0 if is_gpu else host_memory(config, training, shards).total,
    )


def kept_here(config: CLTConfig) -> float:
    """Features that are on, per token and layer."""
    return kept_per_token(config) if chooses_k(config) else config.num_features * _KEPT_SHARE


def setup_bytes(config: CLTConfig, shards: int = 1) -> int:
    """Peak while a new run's encoder biases are set, when there are weights but no gradients and no moments yet."""
    features = math.ceil(config.num_features / shards)
    tokens = SETUP_TOKENS * (features * _SETUP_BYTES + config.num_layers * config.d_model * 2 * 2 * 2)
    return n_parameters(config, shards) * weight_bytes(config) + tokens


def evaluation_bytes(
    config: CLTConfig, training: TrainingConfig, tokens: int, shards: int = 1, is_gpu: bool = False
) -> int:
    """Peak of an evaluation between two steps, which encodes all layers of a batch; the last gradients are still there.

    Args:
        config: the whole transcoder.
        training: options of the run.
        tokens: per batch and device.
        shards: as in `step_memory`.
        is_gpu: as in `step_memory`.
    """
    features, width = math.ceil(config.num_features / shards), config.d_model
    pairs = sum(len(config.targets_of(source)) for source in range(config.num_layers))
    counted = config.num_layers * (_ENCODED_BYTES * features + _EVALUATION_BYTES * width) + 4 * pairs * width
    count, weight = n_parameters(config, shards), weight_bytes(config)
    weights = weight * (1 + (not training.optimizer_in_backward))
    # The mean weights take the place of the last, which are put aside.
    weights += 0 if training.ema_decay is None else 4 + weight
    held = count * weights + _states_here(config, training, count, is_gpu)
    held += 0 if is_gpu else host_memory(config, training, shards).total
    return round(held) + min(tokens, EVALUATION_TOKENS) * counted


def _by_hand(config: CLTConfig, training: TrainingConfig, tokens: int, features: int, kept: float, route: str) -> float:
    """Of the hand-written step, of one device."""
    layers, half = config.num_layers, training.precision == "bf16"
    size = 2 if half else 4
    outputs = config.d_model * max(len(config.targets_of(source)) for source in range(layers))
    matrix = tokens * features * size
    if route == "sparse":
        return matrix + kept * (layers * _ENTRY_BYTES + _ENTRY_WORK_BYTES)
    total = matrix * (1 if training.recompute_encoder else layers)
    total += 3 * matrix + tokens * outputs * size
    # The cast decoder, and its gradient before it is widened.
    return total + (features * outputs * 2 * size if half else 0)


def _autograd(config: CLTConfig, training: TrainingConfig, tokens: int, features: int, shards: int) -> float:
    """Of autograd's step, beyond gradients: most is held at the end of the forward pass, when there are none yet."""
    layers, width = config.num_layers, config.d_model
    count, weight = n_parameters(config, shards), weight_bytes(config)
    size = 4 if training.precision == "fp32" and weight == 4 else 2
    matrix = tokens * features * size
    pairs = sum(len(config.targets_of(source)) for source in range(layers))
    cast = count * size if size < weight else 0
    forward = matrix * layers * _SAVED[config.activation_fn] + tokens * pairs * width * size + cast
    return max(forward - count * weight, 3 * matrix + cast)
