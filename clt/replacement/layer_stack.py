"""vlm-clt-training's `transcoder_L{layer}.pt` files as one transcoder: all sources of a target are summed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clt.config import CLTConfig
from clt.errors import CheckpointError
from clt.models import BaseTranscoder
from clt.training.layer_transcoder import LayerTranscoder, load_layer_transcoder

_FILE = re.compile(r"transcoder_L(\d+)\.pt")


def is_layer_folder(folder: Path) -> bool:
    """Whether a folder holds such files."""
    return folder.is_dir() and any(_FILE.fullmatch(file.name) for file in folder.iterdir())


class LayerStack(BaseTranscoder):
    """One `LayerTranscoder` per layer; that of layer s writes to the MLPs of layers s+1, s+2, ...

    Each was trained alone to predict its targets in full. Their sum is what the published descriptions promise, and
    what a jointly trained transcoder gets right by training; here it may overshoot where targets share sources, which
    `clt fidelity` shows. Nothing is written to layer 0, so its MLP is left alone.
    """

    def __init__(self, layers: Sequence[LayerTranscoder], n_layers: int) -> None:
        """Put together the transcoders of layers 0, 1, 2, ... of a host.

        Args:
            n_layers: of the host; what would be written beyond its last layer is left out.
        """
        super().__init__()
        self.layers = nn.ModuleList(layers)
        hidden = layers[0].dec.out_features // layers[0].n_targets
        self.config = CLTConfig(
            num_features=layers[0].dec.in_features,
            num_layers=n_layers,
            d_model=hidden,
            activation_fn="relu",
            first_target=1,
            n_targets=max(layer.n_targets for layer in layers),
            normalization_method="none",
        )
        self.requires_grad_(False)

    @classmethod
    def from_folder(cls, folder: Path, n_layers: int) -> LayerStack:
        """Read the files of all layers that have a layer after them.

        Raises:
            CheckpointError: a layer's file is missing or damaged, or one has other sizes than the first.
        """
        found = {int(match[1]) for file in folder.iterdir() if (match := _FILE.fullmatch(file.name))}
        missing = [layer for layer in range(n_layers - 1) if layer not in found]
        if missing:
            raise CheckpointError(
                f"{folder} has transcoders of layers {sorted(found)}, but the host has {n_layers} layers, and "
                f"transcoder_L{missing[0]}.pt is missing. Train the missing ones, or open the host they are for."
            )
        beyond = [layer for layer in found if layer >= n_layers]
        if beyond:
            raise CheckpointError(
                f"{folder} has transcoders up to layer {max(beyond)}, but the host has only {n_layers} layers. Open "
                "the host they were trained on."
            )
        layers = [load_layer_transcoder(folder / f"transcoder_L{layer}.pt") for layer in range(n_layers - 1)]
        sizes = [(layer.dec.in_features, layer.enc[1].in_features) for layer in layers]
        for layer, size in enumerate(sizes):
            if size != sizes[0]:
                raise CheckpointError(
                    f"{folder}: transcoder_L{layer}.pt has (features, width) = {size}, transcoder_L0.pt {sizes[0]}. "
                    "They are of different runs."
                )
        return cls(layers, n_layers)

    def predicts(self, target: int) -> bool:
        """Layer 0 has no source."""
        return target > 0 and super().predicts(target)

    def encode_layer(self, layer: int, inputs: Float[Tensor, "token d_model"]) -> Float[Tensor, "token feature"]:
        """Activations of one layer; none where no transcoder reads."""
        if layer >= len(self.layers):
            return inputs.new_zeros(len(inputs), self.config.num_features)
        return self._of(layer).encode(inputs.float())

    def encode(self, inputs: Float[Tensor, "layer token d_model"]) -> Float[Tensor, "layer token feature"]:
        """Activations of all layers."""
        return torch.stack([self.encode_layer(layer, x).float() for layer, x in enumerate(inputs)])

    def contributions(
        self, source: int, features: Float[Tensor, "token feature"]
    ) -> Float[Tensor, "target token d_model"]:
        """What one layer's features add to each target; 0 for targets in the window that its file lacks."""
        n = len(self.config.targets_of(source))
        out = features.new_zeros(n, len(features), self.config.d_model)
        if source < len(self.layers):
            layer = self._of(source)
            kept = min(n, layer.n_targets)
            rows = layer.dec.weight[: kept * self.config.d_model]
            out[:kept] = (features.to(rows) @ rows.T).unflatten(1, (kept, -1)).transpose(0, 1) if kept else 0
        return out

    def bias(self, target: int) -> Float[Tensor, " d_model"]:
        """The decoder biases of all sources together."""
        total = torch.zeros_like(self._of(0).dec.bias[: self.config.d_model])
        for source in range(min(target, len(self.layers))):
            layer = self._of(source)
            if target - source <= layer.n_targets:
                total = total + layer.dec.bias.unflatten(0, (layer.n_targets, -1))[target - source - 1]
        return total

    def decode(
        self,
        features: Float[Tensor, "layer token feature"],
        inputs: Float[Tensor, "layer token d_model"] | None = None,
    ) -> Float[Tensor, "layer token d_model"]:
        """All MLP outputs; 0 for layer 0."""
        biases = [self.bias(target) for target in range(self.config.num_layers)]
        out = torch.stack([bias.expand(features.shape[1], -1) for bias in biases]).clone()
        for source, active in enumerate(features):
            for target, part in zip(self.config.targets_of(source), self.contributions(source, active)):
                out[target] += part
        return out

    def _of(self, layer: int) -> LayerTranscoder:
        found = self.layers[layer]
        assert isinstance(found, LayerTranscoder)
        return found
