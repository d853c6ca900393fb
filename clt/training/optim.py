"""The optimiser, its weight-decay groups, and its state as named tensors."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clt.config import TrainingConfig
from clt.errors import CheckpointError, ConfigError
from clt.parallel.gradients import gradient_norm
from clt.parallel.mesh import Mesh
from clt.training.block_adam import BlockAdam
from clt.training.half_adam import HalfAdam
from clt.training.schedules import default_learning_rate

# What weight decay reaches.
_MATRICES = frozenset({"W_enc", "W_dec", "U_dec", "V_dec", "W_skip"})


def build_optimizer(
    named: Mapping[str, nn.Parameter], config: TrainingConfig, n_features: int
) -> torch.optim.Optimizer:
    """Fused Adam or AdamW, with bf16 moments or in the host's memory if asked for, or AdamW with 8-bit ones.

    Weight decay reaches matrices only.

    Biases (`b_dec` holds one per target), thresholds, offsets and scales are named, not told by their shape, and never
    decay.

    Raises:
        ConfigError: adamw8bit without torchao.
    """
    matrices = [parameter for name, parameter in named.items() if name.split(".")[0] in _MATRICES]
    others = [parameter for name, parameter in named.items() if name.split(".")[0] not in _MATRICES]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    options: dict[str, Any] = {
        "lr": config.learning_rate or default_learning_rate(n_features),
        "betas": (config.optimizer_beta1, config.optimizer_beta2),
    }
    if config.optimizer == "adamw8bit":
        return _eight_bit()(groups, **options)
    by_blocks: dict[str, Any] = {"is_decoupled": config.optimizer == "adamw", "is_offloaded": config.offload_optimizer}
    if config.optimizer_state == "bf16":
        optimizer = HalfAdam(groups, **options, **by_blocks, seed=config.seed)
    elif config.offload_optimizer:
        optimizer = BlockAdam(groups, **options, **by_blocks)
    else:
        cls = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        optimizer = cls(groups, **options, fused=True)
    optimizer.register_step_post_hook(_count_change)
    return optimizer


def _count_change(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Fused optimisers change weights without telling their version counters, which the model's known norms go by."""
    torch.autograd.graph.increment_version([weight for group in optimizer.param_groups for weight in group["params"]])


def _eight_bit() -> Any:
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "TrainingConfig.optimizer = 'adamw8bit' needs torchao, which is not installed.\n"
            "`pip install 'crosslayer[torchao]'`, or use --optimizer adamw (8 instead of 2 bytes per weight)."
        )
    from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]  # optional

    return AdamW8bit


def clip_gradients(model: nn.Module, limit: float | None, mesh: Mesh) -> Tensor:
    """Scale all gradients together so that their norm is at most `limit`; returns the norm before.

    The gradients are not touched where nothing is to be done: that pass over them costs as much as the norm itself,
    more than the wait for it.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = gradient_norm(model, mesh)
    if limit is not None and norm > limit:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
    return norm.detach()


def require_streaming(config: TrainingConfig, odd: str | None) -> None:
    """Refuse what an optimiser that runs inside the backward pass cannot do.

    Args:
        config: asks for `optimizer_in_backward`, or not.
        odd: an option that only autograd knows, as `field = value`.

    Raises:
        ConfigError: naming the option and why.
    """
    if not config.optimizer_in_backward:
        return
    needs_all = "needs the gradients of all layers before the first weight changes"
    for name, allowed, why in (
        ("gradient_clip_val", None, needs_all),
        ("skip_nonfinite_steps", 0, needs_all),
        ("micro_batch_tokens", None, "adds gradients up over several passes"),
    ):
        if getattr(config, name) != allowed:
            raise ConfigError(
                f"TrainingConfig.optimizer_in_backward does not go with {name} = {getattr(config, name)}, which {why}. "
                f"Set {name} = {allowed}, or leave optimizer_in_backward off."
            )
    if odd is not None or config.route == "plain":
        raise ConfigError(
            f"TrainingConfig.optimizer_in_backward needs the hand-written step, which does not know "
            f"{odd or 'route = plain'}. Leave one of the two at its default."
        )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """The same learning rate for every group."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)  # torchao keeps it as a tensor
        else:
            group["lr"] = value


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimiser's state as `<parameter>/<moment>` tensors; an 8-bit moment as its parts, `<moment>:<part>`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in named.items()}
    return {
        f"{names[parameter]}/{name}": part
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        for name, part in _parts(key, value)
    }


def _parts(key: str, value: Any) -> list[tuple[str, Tensor]]:
    """A plain tensor as it is, a quantised one as the tensors it is made of."""
    if isinstance(value, Tensor) and type(value) is not Tensor:
        inner, _ = value.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
        return [(f"{key}:{name}", getattr(value, name)) for name in inner]
    return [(key, torch.as_tensor(value))]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave; weights must be back already.

    Raises:
        CheckpointError: master weights were saved, which this optimiser has no use for.
    """
    if any(":" in name for name in tensors):
        _take_a_first_step(optimizer, list(parameters.values()))
    if isinstance(optimizer, BlockAdam):
        optimizer.begin()
    for name, value in tensors.items():
        parameter, key = name.rsplit("/", 1)
        state = optimizer.state[parameters[parameter]]
        if ":" in key:
            moment, part = key.split(":")
            getattr(state[moment], part).copy_(value)
        elif key in state:
            state[key].copy_(value)
        elif key == "master":
            raise CheckpointError(
                f"The checkpoint holds fp32 master weights of {parameter}, which only an optimiser in the host's "
                "memory keeps. Go on with --offload-optimizer."
            )
        else:
            state[key] = value.to(parameters[parameter].device)


def _take_a_first_step(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Let the optimiser make its quantised moments, whose values are then replaced; the weights stay."""
    weights = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for parameter, old in zip(parameters, weights, strict=True):
            parameter.copy_(old)
