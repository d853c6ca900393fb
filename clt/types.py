"""The few types everything else is made of.

Axes are spelled the same everywhere: `layer, token, position, feature, d_model, source, target, node`.
A *token* is one row of a flattened batch; a *position* is a place in one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Integer, UInt8
from PIL import Image
from torch import Tensor

from clt.errors import ConfigError

# The names of the safetensors format's header.
SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
SAFETENSORS_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}


def choose_device(device: torch.device | str | None = None) -> torch.device:
    """The device asked for, or a GPU if there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"{device!r} is no torch device. Use cpu, cuda, cuda:1, mps, ... or leave it out.") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device = {str(device)!r}, but this torch ({torch.__version__}) sees {torch.cuda.device_count()} CUDA "
            "devices. Leave the device out to run on the CPU, or install a CUDA build of torch and check `nvidia-smi`."
        )
    return chosen


class TokenKind(IntEnum):
    """What a token is made of; stored as one byte per token."""

    TEXT = 0
    IMAGE = 1
    SPECIAL = 2


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One thing to show to a host model: a prompt, its images, and (optionally) what it should answer."""

    id: str
    prompt: str
    images: tuple[Image.Image | Path, ...] = ()
    answer: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


class Hookpoint(NamedTuple):
    """Where one layer is read and where its MLP output leaves, as module paths inside the host."""

    layer: int
    input_path: str
    """Module whose value is read, with suffix `.input` or `.output`."""
    output_path: str
    """Module whose value is the target, with suffix `.input` or `.output`."""


class FeatureId(NamedTuple):
    """One feature of a transcoder."""

    layer: int
    feature: int

    @property
    def number(self) -> int:
        """Cantor's pairing `(l + f)(l + f + 1) / 2 + f`: what other projects' files call a feature."""
        total = self.layer + self.feature
        return total * (total + 1) // 2 + self.feature

    @staticmethod
    def from_number(number: int) -> FeatureId:
        """The inverse of `number`, exact for any size."""
        diagonal = (math.isqrt(8 * number + 1) - 1) // 2
        feature = number - diagonal * (diagonal + 1) // 2
        return FeatureId(diagonal - feature, feature)


@dataclass(frozen=True)
class ActivationBatch:
    """What the host's MLPs read and wrote for some tokens: the one object that flows from host to loss.

    The shapes are checked here, at the door, so nothing inside checks them again.
    """

    inputs: Float[Tensor, "layer token d_model"]
    targets: Float[Tensor, "layer token d_model"]
    kind: UInt8[Tensor, " token"]
    sample: Integer[Tensor, " token"]
    position: Integer[Tensor, " token"]

    def __post_init__(self) -> None:
        if self.inputs.dim() != 3 or self.inputs.shape != self.targets.shape:
            raise ValueError(
                f"inputs {tuple(self.inputs.shape)} and targets {tuple(self.targets.shape)} must both be "
                "[layer, token, d_model]."
            )
        for name in ("kind", "sample", "position"):
            length = len(getattr(self, name))
            if length != self.n_tokens:
                raise ValueError(f"{name} has {length} entries for {self.n_tokens} tokens.")

    def __repr__(self) -> str:
        counts = torch.bincount(self.kind.long(), minlength=len(TokenKind)).tolist()
        kinds = ", ".join(f"{n:,} {kind.name.lower()}" for kind, n in zip(TokenKind, counts, strict=False) if n)
        place = f"{self.inputs.dtype}, {self.inputs.device}".removeprefix("torch.")
        return f"ActivationBatch({self.n_layers} layers x {self.n_tokens:,} tokens x {self.d_model}, {place}; {kinds})"

    @property
    def n_layers(self) -> int:
        """How many layers were captured."""
        return self.inputs.shape[0]

    @property
    def n_tokens(self) -> int:
        """How many tokens the batch holds."""
        return self.inputs.shape[1]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.inputs.shape[2]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ActivationBatch:
        """The same batch on another device; `dtype` applies to the activations only."""
        return ActivationBatch(
            inputs=self.inputs.to(device, dtype),
            targets=self.targets.to(device, dtype),
            kind=self.kind.to(device),
            sample=self.sample.to(device),
            position=self.position.to(device),
        )

    def select(self, keep: Tensor) -> ActivationBatch:
        """The tokens that a boolean mask or a list of indices names, in that order."""
        return ActivationBatch(
            inputs=self.inputs[:, keep],
            targets=self.targets[:, keep],
            kind=self.kind[keep],
            sample=self.sample[keep],
            position=self.position[keep],
        )
