"""The optimiser, its weight-decay groups, and its state as named tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from clt.config import TrainingConfig
from clt.training.schedules import default_learning_rate


def build_optimizer(model: nn.Module, config: TrainingConfig, n_features: int) -> torch.optim.Optimizer:
    """Fused Adam or AdamW; weight decay reaches matrices only, never biases or thresholds."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    cls = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return cls(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate or default_learning_rate(n_features),
        betas=(config.optimizer_beta1, config.optimizer_beta2),
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """The same learning rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as `<parameter>/<moment>` tensors."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter, key = name.rsplit("/", 1)
        optimizer.state[parameters[parameter]][key] = value.to(value.device if key == "step" else parameters[parameter])
