"""How a graph is computed; every field is a flag of `clt attribute`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clt.config.base import Config, require_one_of, require_positive
from clt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AttributionOptions(Config):
    """Which nodes a graph has and how its rows are computed."""

    max_feature_nodes: int | None = 7500
    """Features with a row of their own, the most influential ones; None: all that fire."""
    batch_size: int | None = None
    """Rows per backward pass; None: as many as keep a pass within 2 GB."""
    unselected: Literal["error", "drop"] = "error"
    """What becomes of the other features' effects: part of their layer's error, or (as in circuit-tracer) dropped."""
    ignored_positions: int = 1
    """The first so many positions have neither features nor errors, as in circuit-tracer; 0 keeps all."""
    max_n_logits: int = 10
    """At most this many logits as targets."""
    desired_logit_prob: float = 0.95
    """The fewest top logits whose probabilities add up to this are the targets."""
    position: int = -1
    """The position whose prediction is explained; -1: the last."""
    update_interval: int = 4
    """The ranking of features is renewed after this many batches."""
    group_patches: float | None = None
    """Make one node of an image's patches whose embeddings have at least this cosine, e.g. 0.95; None: one each."""

    def __post_init__(self) -> None:
        require_positive(
            "attribution",
            max_feature_nodes=self.max_feature_nodes,
            batch_size=self.batch_size,
            max_n_logits=self.max_n_logits,
            update_interval=self.update_interval,
        )
        require_one_of("attribution", "unselected", self.unselected, ("error", "drop"))
        if not 0 < self.desired_logit_prob <= 1:
            raise ConfigError(
                f"attribution.desired_logit_prob = {self.desired_logit_prob} is a probability: choose it above 0 and "
                "at most 1."
            )
        if self.group_patches is not None and not -1 <= self.group_patches <= 1:
            raise ConfigError(
                f"attribution.group_patches = {self.group_patches} is a cosine: choose it between -1 and 1, e.g. 0.95."
            )
        if self.ignored_positions < 0:
            raise ConfigError(f"attribution.ignored_positions = {self.ignored_positions} must be 0 or more.")
