"""vlm-clt-training's `transcoder_L{n}.pt`: one file per layer, each trained alone on what the next layers' MLPs write.

    theirs                               ours
    enc.0 (LayerNorm), enc.1 (Linear)    input_norm = "layer"; the norm's learned values go into W_enc and b_enc
    dec.weight [target * d_model, feature]  W_dec.{s} [feature, target, d_model]
    dec.bias                             b_dec[t], summed over s

Layer s writes to s + 1, s + 2, ... (`first_target = 1`); nothing writes to layer 0, whose MLP a replacement leaves
alone. The sum over sources is what the published descriptions promise; as each file was trained to predict its targets
in full, it may overshoot where targets share sources, which `clt fidelity` shows.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from clt.config import CLTConfig
from clt.errors import CheckpointError
from clt.models.formats.files import read_pickle
from clt.models.formats.portable import Named, Portable

NAME = "kokosdev"
_FILE = re.compile(r"transcoder_L(\d+)\.pt")


def detect(folder: Path) -> bool:
    """Whether a folder holds such files."""
    return any(_FILE.fullmatch(file.name) for file in folder.iterdir())


def read(folder: Path, *, host_layers: int | None = None) -> Portable:
    """The transcoders of all layers as one.

    Args:
        host_layers: how many layers the host has; None: one more than there are files, as the last has no later layer
            to write to.

    Raises:
        CheckpointError: a layer's file is missing or damaged, or one has other sizes than the first.
    """
    found = {int(match[1]) for file in folder.iterdir() if (match := _FILE.fullmatch(file.name))}
    layers = max(found) + 2 if host_layers is None else host_layers
    missing, beyond = sorted(set(range(layers - 1)) - found), sorted(layer for layer in found if layer >= layers)
    if missing or beyond:
        raise CheckpointError(
            f"{folder} has transcoders of layers {sorted(found)}; a host of {layers} layers needs those of 0 to "
            f"{layers - 2}: {f'transcoder_L{missing[0]}.pt is missing' if missing else f'{beyond} are beyond it'}. "
            "Train the missing ones, or open the host they are for."
        )
    first = _Layer(folder, 0)
    config = CLTConfig(
        num_features=first.features, num_layers=layers, d_model=first.width, activation_fn="relu", first_target=1,
        n_targets=max(_Layer(folder, layer).n_targets for layer in range(layers - 1)), normalization_method="none",
        input_norm="layer",
    )  # fmt: skip
    return Portable(NAME, config, lambda: _tensors(folder, config))


def _tensors(folder: Path, config: CLTConfig) -> Named:
    bias = torch.zeros(config.num_layers, config.d_model)
    for source in range(config.num_layers - 1):
        layer = _Layer(folder, source)
        if (layer.features, layer.width) != (config.num_features, config.d_model):
            raise CheckpointError(
                f"{folder}: transcoder_L{source}.pt has (features, width) = {(layer.features, layer.width)}, "
                f"transcoder_L0.pt {(config.num_features, config.d_model)}. They are of different runs."
            )
        targets = config.targets_of(source)
        kept = min(len(targets), layer.n_targets)
        # A file may know fewer targets than the longest one: it has no decoder there, so nothing is written.
        decoder = torch.zeros(config.num_features, len(targets), config.d_model)
        decoder[:, :kept] = layer.decoder[:, :kept]
        bias[targets.start : targets.start + kept] += layer.decoder_bias[:kept]
        yield f"W_enc.{source}", layer.encoder
        yield f"b_enc.{source}", layer.encoder_bias
        yield f"W_dec.{source}", decoder
    last = config.num_layers - 1
    yield f"W_enc.{last}", torch.zeros(config.num_features, config.d_model)
    yield f"b_enc.{last}", torch.zeros(config.num_features)
    yield f"W_dec.{last}", torch.zeros(config.num_features, 0, config.d_model)
    yield "b_dec", bias


class _Layer:
    """One file, in our orientation."""

    def __init__(self, folder: Path, layer: int) -> None:
        path = folder / f"transcoder_L{layer}.pt"
        saved = read_pickle(path)
        try:
            state = {name.removeprefix("_orig_mod."): value.float() for name, value in saved["state_dict"].items()}
            encoder, shift = state["enc.1.weight"], state["enc.0.bias"]
            self.features, self.width = encoder.shape
            self.encoder: Tensor = encoder * state["enc.0.weight"]
            self.encoder_bias: Tensor = state["enc.1.bias"] + encoder @ shift
            self.decoder: Tensor = state["dec.weight"].unflatten(0, (-1, self.width)).permute(2, 0, 1)
            self.decoder_bias: Tensor = state["dec.bias"].unflatten(0, (-1, self.width))
        except (KeyError, AttributeError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} is no transcoder_L*.pt: {error!r}.") from None
        self.n_targets = self.decoder.shape[1]
