"""Which features have been silent for too long, counted in tokens."""

import torch
from jaxtyping import Bool, Integer
from torch import Tensor


class DeadFeatureTracker:
    """Tokens seen since each feature last fired."""

    def __init__(self, num_layers: int, num_features: int, window: int, device: torch.device | str = "cpu") -> None:
        self.window = window
        self.silent_for: Integer[Tensor, "layer feature"] = torch.zeros(
            num_layers, num_features, dtype=torch.int64, device=device
        )

    def update(self, fired: Integer[Tensor, "layer feature"], n_tokens: int) -> None:
        """Count one batch, of which each feature was on at `fired` tokens."""
        self.silent_for += n_tokens
        self.silent_for.masked_fill_(fired > 0, 0)

    @property
    def dead(self) -> Bool[Tensor, "layer feature"]:
        """Silent for longer than the window."""
        return self.silent_for > self.window
