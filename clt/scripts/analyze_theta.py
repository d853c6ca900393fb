"""The thresholds of a transcoder in a few numbers per layer: `clt analyze-theta RUN`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clt.errors import ConfigError
from clt.training.loading import load_model

# A threshold from here on says "never fired" (`default_theta_value` is 1e6).
_OFF = 1e5
_QUANTILES = {"min": 0.0, "1 %": 0.01, "median": 0.5, "99 %": 0.99, "max": 1.0}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which transcoder."""

    log_dir: Annotated[str, tyro.conf.Positional]
    """Folder of a run or of a transcoder (JumpReLU or BatchTopK)."""


def thresholds(folder: Path) -> list[Tensor]:
    """Per layer, the threshold of each feature.

    Raises:
        ConfigError: a family without thresholds.
    """
    model = load_model(folder)
    if model.config.activation_fn not in ("jumprelu", "batchtopk"):
        raise ConfigError(f"{folder} has activation_fn = {model.config.activation_fn!r}, which has no thresholds.")
    with torch.no_grad():
        return [model.threshold(layer).float() for layer in range(model.config.num_layers)]


def main(options: Options) -> None:
    """Print the table."""
    view = Table(title=f"Thresholds in {options.log_dir}")
    for column in ("layer", *_QUANTILES, "switched off"):
        view.add_column(column, justify="right")
    for layer, theta in enumerate(thresholds(Path(options.log_dir))):
        alive = theta[theta < _OFF]
        numbers = [f"{float(alive.quantile(q)):.4g}" if len(alive) else "-" for q in _QUANTILES.values()]
        view.add_row(str(layer), *numbers, str(int((theta >= _OFF).sum())))
    Console().print(view)
