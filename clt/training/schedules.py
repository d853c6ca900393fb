"""What changes over a run as a function of the step: learning rate, sparsity weight, k."""

import math

from clt.config import TrainingConfig

_STEERINGS = 20


def default_learning_rate(n_features: int) -> float:
    """2e-4 at 2^14 features per layer, growing with 1/sqrt(F) for smaller ones (Anthropic, January 2025)."""
    return 2e-4 / math.sqrt(n_features / 2**14)


def learning_rate_factor(config: TrainingConfig, step: int) -> float:
    """Share of the peak learning rate at `step` (counted from 0)."""
    if step < config.lr_warmup_steps:
        return (step + 1) / config.lr_warmup_steps
    length = config.training_steps - config.lr_warmup_steps
    done = (step - config.lr_warmup_steps) / length
    match config.lr_scheduler:
        case "constant":
            return 1.0
        case "linear":
            return 1 - done
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        case "linear_final20":
            return min(1.0, (1 - done) / 0.2)


def sparsity_weight(config: TrainingConfig, step: int) -> float:
    """λ at `step`: ramps linearly over the whole run (Ameisen et al. 2025), after a delay, or stays constant."""
    done = (step + 1) / config.training_steps
    match config.sparsity_lambda_schedule:
        case "constant":
            return config.sparsity_lambda
        case "linear":
            return config.sparsity_lambda * done
        case "delayed_linear":
            delay = config.sparsity_lambda_delay_frac
            return config.sparsity_lambda * max(0.0, (done - delay) / (1 - delay))


def k_factor(config: TrainingConfig, step: int) -> float:
    """How many times the final k is kept at `step`; falls linearly to 1 over `k_anneal_steps`."""
    if step >= config.k_anneal_steps:
        return 1.0
    return config.k_anneal_start + (1 - config.k_anneal_start) * step / config.k_anneal_steps


def steered(config: TrainingConfig, factor: float, l0: float, step: int) -> float:
    """The factor of the sparsity weight after a step with this L0 per layer; `factor` as it is without a target.

    Integral control: its logarithm moves by a small share of that of L0 / target, so that it settles where L0 is on
    target; at most by a factor of e per `training_steps / _STEERINGS` steps, and never below 1, where L0 is under the
    target without any help. (Features switched off early hardly come back when the weight falls: it should come from
    below, with the target annealed.)
    """
    if config.sparsity_target_l0 is None:
        return factor
    target = config.sparsity_target_l0 * k_factor(config, step)
    miss = math.log(max(l0, 0.01 * target) / target)
    return max(1.0, factor * math.exp(min(max(miss, -1.0), 1.0) * _STEERINGS / config.training_steps))
